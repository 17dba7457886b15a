"""What is fuzzed: a target takes bytes, and raises unless they are read or refused as documented.

Beyond that a target compares its result with that of a second, slower way to read the same bytes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class FuzzTarget:
    """A target.

    Attributes:
        run: Takes an input; raises if it finds a fault.
        modules: Packages whose coverage guides the search.
    """

    run: Callable[[bytes], None]
    modules: tuple[str, ...]


def check_decode(data: bytes) -> None:
    """An image file: what the header says, and what is decoded."""
    from pipeline.decode import decode_image, open_image, peek_hw
    from pipeline.errors import DecodeError

    most = 1_000_000
    peek_hw(data)
    try:
        pixels = decode_image(data, max_pixels=most)
    except DecodeError:
        return
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert pixels.shape == (*open_image(data, max_pixels=most).upright_hw, 3)


def check_tiff(data: bytes) -> None:
    """A TIFF, OME-Zarr or DICOM: the header, and pixels of the first plane and of all planes."""
    from pipeline.decode import open_image, read_header
    from pipeline.errors import DecodeError
    from pipeline.formats.planes import PlaneChoice

    most = 1_000_000
    for choice in (PlaneChoice("0", 0, 0), PlaneChoice("0", "max", 0), PlaneChoice()):
        try:
            image = open_image(data, max_pixels=most, choice=choice)
            pixels = image.decode()
        except DecodeError as error:
            str(error).encode("utf-8", "surrogateescape")
            continue
        header = read_header(data, max_pixels=most)
        assert (header.height, header.width) == (image.height, image.width)
        assert pixels.dtype == np.uint8 and pixels.shape == (*image.upright_hw, 3)


def check_form(data: bytes) -> None:
    """A line with Content-Type, then a body; how it is split must make no difference.

    Except for a bare line feed in a header, which the parser sees only at the end of a chunk.
    """
    head, _, body = data.partition(b"\n")
    content_type = head.decode("latin-1")
    whole = _read_form(content_type, [body])
    step = 1 + len(body) % 7
    pieces = [body[at : at + step] for at in range(0, len(body), step)]
    assert _read_form(content_type, pieces) == whole or b"\n" in body.replace(b"\r\n", b"")


def _read_form(content_type: str, chunks: list[bytes]) -> Any:
    from service.errors import InvalidRequest
    from service.http.form import ImageForm

    try:
        form = ImageForm(content_type, ("masks", "score_threshold"), max_files=4)
        for chunk in chunks:
            form.feed(chunk)
        form.finish()
    except InvalidRequest as error:
        str(error).encode()
        return type(error)
    for name in [
        *form.fields,
        *form.fields.values(),
        *(part.file_name or "" for part in form.files),
    ]:
        name.encode()
    return form.fields, [(part.file_name, b"".join(part.chunks)) for part in form.files]


def check_oip(data: bytes) -> None:
    """A byte, how much of the body is binary data, then the body of an infer request."""
    from service.errors import BodyTooLarge, InvalidRequest
    from service.http.oip.read import read_request

    if not data:
        return
    body, binary = data[1:], data[0]
    length = None if binary == 0 else max(1, len(body) - binary + 1)
    try:
        call = read_request(body, length, max_images=4)
    except (InvalidRequest, BodyTooLarge) as error:
        str(error).encode()
        return
    assert call.images
    tensor = json.loads(body[:length])["inputs"][0]
    if tensor.get("data") is None:
        return
    if tensor["datatype"] == "UINT8":
        (pixels,) = call.images
        assert np.array_equal(pixels, np.array(tensor["data"], np.int64).reshape(tensor["shape"]))
    else:
        import base64

        assert call.images == [base64.b64decode(text, validate=True) for text in tensor["data"]]


def check_config(data: bytes) -> None:
    """config.json of a model."""
    from pipeline.errors import ConfigError
    from pipeline.repository_config import parse_model_config

    try:
        config = parse_model_config(data)
        for version in config.version_numbers[:3]:
            config.for_version(version)
        assert config.served_versions
    except ConfigError as error:
        str(error)


@cache
def _data_set() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-coco-"))


def check_coco(data: bytes) -> None:
    """A COCO annotation file."""
    from training.data.coco_json import read_coco_json
    from training.data.records import DatasetError
    from training.data.validate import check_content

    file = _data_set() / "val.json"
    file.write_bytes(data)
    try:
        checked = check_content(read_coco_json(file, _data_set()), None)
    except DatasetError:
        return
    assert checked.report.text()
    for record in checked.records[:3]:
        if record.height * record.width > 1_000_000:
            continue
        for annotation in record.annotations:
            assert len(annotation.box_xywh) == 4


def check_rle(data: bytes) -> None:
    """Two bytes with a size, then the counts of a mask; then the same bytes as a mask's pixels."""
    from pipeline.runs import BoxMask, encode_box_mask
    from solo_client.result import Instance

    if len(data) < 3:
        return
    height, width = data[0] % 64, data[1] % 64
    rle = {"size": [height, width], "counts": data[2:]}
    try:
        mask = Instance(1, "a", 0.5, (0, 0, 1, 1), 1, rle).mask
    except ValueError:
        pass
    else:
        assert mask.shape == (height, width) and mask.dtype == np.bool_
    bits = np.unpackbits(np.frombuffer(data[2:], np.uint8))
    if height and width and len(bits) >= height * width and bits[: height * width].any():
        pixels = bits[: height * width].reshape(height, width).astype(np.bool_)
        encoded = encode_box_mask(BoxMask(0, 0, pixels), (height, width))
        again = Instance(1, "a", 0.5, (0, 0, 1, 1), 1, encoded).mask
        assert np.array_equal(again, pixels)


TARGETS = {
    "decode": FuzzTarget(check_decode, ("pipeline", "PIL")),
    "tiff": FuzzTarget(check_tiff, ("pipeline", "tifffile")),
    "form": FuzzTarget(check_form, ("service", "multipart")),
    "oip": FuzzTarget(check_oip, ("service",)),
    "config": FuzzTarget(check_config, ("pipeline",)),
    "coco": FuzzTarget(check_coco, ("training", "pipeline")),
    "rle": FuzzTarget(check_rle, ("pipeline", "solo_client", "pycocotools")),
}
