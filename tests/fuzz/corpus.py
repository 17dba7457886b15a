"""The inputs of a target: seeds, and those of earlier runs that reach something new."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.fuzz.targets import FuzzTarget
from tests.support import dicom_files, zarr_files

FOLDER = Path(__file__).with_name("corpus")


def build_seeds(name: str) -> list[bytes]:
    """Good inputs of a target, from which a search can begin."""
    builders = {
        "decode": _build_images,
        "tiff": _build_stacks,
        "form": _build_forms,
        "oip": _build_requests,
        "config": _build_configs,
        "coco": _build_annotations,
        "rle": _build_masks,
    }
    return builders[name]()


def _build_images() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3)).astype(np.uint8)
    colour = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("JPEG", colour, {"exif": exif}),
        ("JPEG", colour.convert("L"), {"progressive": True}),
        ("JPEG", colour.convert("CMYK"), {}),
        ("PNG", colour, {"exif": exif}),
        ("PNG", colour.convert("P"), {"transparency": 3}),
        ("PNG", colour.convert("RGBA"), {}),
        ("PNG", Image.fromarray(pixels[..., 0].astype(np.uint16) * 17), {}),
        ("WEBP", colour, {"lossless": True, "exif": exif}),
        ("WEBP", colour, {}),
        ("BMP", colour, {}),
        ("BMP", colour.convert("1"), {}),
        ("JPEG2000", colour, {"num_resolutions": 2, "tile_size": (8, 8)}),
        ("JPEG2000", colour.convert("LA"), {"no_jp2": True}),
    ]
    files = []
    for kind, image, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


def _build_stacks() -> list[bytes]:
    import tifffile

    grey = np.random.default_rng(0).integers(0, 3000, (9, 13)).astype(np.uint16)
    colour = np.dstack([grey, grey, grey]).astype(np.uint8)
    stack = np.stack([grey, grey, grey, grey]).reshape(2, 2, 9, 13)
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (grey, {"byteorder": ">"}),
        (grey, {"compression": "zlib", "predictor": True, "rowsperstrip": 4}),
        (grey.astype(np.float32), {"bigtiff": True}),
        (colour, {"photometric": "rgb", "compression": "lzw", "tile": (16, 16)}),
        (colour, {"photometric": "rgb", "compression": "jpeg"}),
        (stack, {"ome": True, "metadata": {"axes": "ZCYX", "PhysicalSizeX": 0.5}}),
        (stack, {"imagej": True, "metadata": {"axes": "ZCYX", "unit": "um"}}),
    ]
    files = []
    for pixels, options in kinds:
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, pixels, **options)
        files.append(buffer.getvalue())
    slide = dicom_files.save(dicom_files.build_slide(grey.astype(np.uint8), (4, 4)), rle=True)
    return [*files, slide, *_build_zarrs(grey)]


def _build_zarrs(grey: NDArray[np.uint16]) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        chunked = zarr_files.write(
            Path(folder, "a"), np.stack([grey, grey]), "zyx", chunks=(1, 8, 8)
        )
        sharded = zarr_files.write(
            Path(folder, "b"), grey, version="0.5", chunks=(4, 4), shards=(12, 16)
        )
        return [zarr_files.pack(zarr_files.read_files(path)) for path in (chunked, sharded)]


def _build_forms() -> list[bytes]:
    head = b"multipart/form-data; boundary=x\n"
    file = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\nab\r\n'
    field = b'--x\r\nContent-Disposition: form-data; name="masks"\r\n\r\nrle\r\n'
    extended = (
        b"--x\r\nContent-Disposition: form-data; name=images; filename*=UTF-8''%c3%a9\r\n\r\n\r\n"
    )
    end = b"--x--\r\n"
    return [
        head + file + end,
        head + file + field + end,
        head + b"preamble\r\n" + extended + end + b"epilogue",
        b'multipart/form-data; charset=utf-7; boundary="x"\n' + file + file[:-20],
    ]


def _build_requests() -> list[bytes]:
    def build(binary: bytes = b"", **members: Any) -> bytes:
        tensor = {"name": "image", **members}
        text = json.dumps({"id": "a", "inputs": [tensor], "outputs": [{"name": "rle"}]}).encode()
        return bytes([len(binary) + 1 if binary else 0]) + text + binary

    text = base64.b64encode(b"file").decode()
    return [
        build(datatype="BYTES", shape=[1], data=[text]),
        build(datatype="BYTES", shape=[2], data=[text, "AA=="]).replace(b"AA", b"\\u002b/"),
        build(datatype="UINT8", shape=[1, 2, 3], data=[0, 1, 2, 3, 4, 255]),
        build(datatype="UINT8", shape=[2, 1, 3], data=[[[0, 1, 2]], [[3, 4, 5]]]),
        build(b"\x02\0\0\0ab", datatype="BYTES", shape=[1], parameters={"binary_data_size": 6}),
    ]


def _build_configs() -> list[bytes]:
    config = {
        "schema_version": 1,
        "name": "blobs",
        "input": {
            "resize": {"rule": "tile", "scale": 1.0, "tile_hw": [64, 64], "overlap_px": 16},
            "contrast": {"rule": "percentile", "low": 1, "high": 99},
        },
        "classes": [{"category_id": 1, "name": "blob"}],
        "candidates": 100,
        "mask_stride": 4,
        "postprocess": {"nms": {"kind": "matrix"}, "max_instances": 10},
        "serve": {"policy": "specific", "versions": [2]},
        "versions": {"2": {"files": {"model.onnx": {"sha256": "0" * 64, "bytes": 5}}}},
    }
    mask = {"nms": {"kind": "mask", "iou_threshold": 0.5}}
    keep = {"resize": {"rule": "keep_ratio", "short_side": 64, "long_side": 128}}
    other = {**config, "serve": {"policy": "all"}, "postprocess": mask, "input": keep}
    return [json.dumps(config).encode(), json.dumps(other).encode()]


def _build_annotations() -> list[bytes]:
    images = [{"id": 1, "file_name": "a.png", "height": 4, "width": 5}]
    categories = [{"id": 3, "name": "cell"}]
    segmentations = [
        [[0, 0, 3, 0, 3, 3, 0, 3]],
        {"size": [4, 5], "counts": [2, 3, 15]},
        {"size": [4, 5], "counts": "23?"},
    ]
    rows = [
        {"id": number, "image_id": 1, "category_id": 3, "iscrowd": 0, "segmentation": segmentation}
        for number, segmentation in enumerate(segmentations)
    ]
    files = [
        {"images": images, "categories": categories, "annotations": rows[:count]}
        for count in range(len(rows) + 1)
    ]
    return [json.dumps(file).encode() for file in files]


def _build_masks() -> list[bytes]:
    from pycocotools import mask as coco_mask

    pixels = np.zeros((12, 10), np.uint8, order="F")
    pixels[3:7, 2:9] = 1
    counts: bytes = coco_mask.encode(pixels)["counts"]
    return [bytes((12, 10)) + counts, bytes((8, 8)) + b"\x00\x3c\x7e\xff\xff\x7e\x3c\x00"]


def load_corpus(name: str) -> list[bytes]:
    """The inputs of a target in the repository."""
    return [path.read_bytes() for path in sorted((FOLDER / name).glob("*"))]


def save_corpus(name: str, inputs: Iterable[bytes]) -> None:
    """Replaces the inputs of a target in the repository."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*"):
        old.unlink()
    for data in inputs:
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def trace_lines(target: FuzzTarget, data: bytes) -> set[tuple[str, int, int]]:
    """The steps from line to line, in the target's packages, that an input causes."""
    found: set[tuple[str, int, int]] = set()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in target.modules:
            return None
        file, before = frame.f_code.co_filename, frame.f_lineno

        def step(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal before
            found.add((file, before, frame.f_lineno))
            before = frame.f_lineno
            return step

        return step

    sys.settrace(trace)
    try:
        target.run(data)
    finally:
        sys.settrace(None)
    return found


def minimise(target: FuzzTarget, inputs: Iterable[bytes]) -> list[bytes]:
    """The inputs, small ones first, that reach what those before them do not."""
    kept, seen = [], set[tuple[str, int, int]]()
    for data in sorted(set(inputs), key=lambda data: (len(data), data)):
        lines = trace_lines(target, data)
        if lines - seen:
            kept.append(data)
            seen |= lines
    return kept
