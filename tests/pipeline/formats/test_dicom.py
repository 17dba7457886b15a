"""DICOM files that pydicom writes, and damaged ones."""

from __future__ import annotations

import io
import re
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    JPEG2000,
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
)

from pipeline.decode import decode_image, open_image, peek_hw, read_header
from pipeline.errors import (
    CorruptImage,
    DecodeError,
    ImageTooLarge,
    PlaneError,
    UnsupportedFormat,
)
from pipeline.formats.dicom import MAX_HEADER_BYTES, MAX_ITEMS, MAX_TILES
from pipeline.formats.planes import PlaneChoice
from pipeline.types import Window
from tests.support.dicom_files import build, build_slide, save, save_encoded

imagecodecs = pytest.importorskip("imagecodecs", reason="needs the extra science")

RNG = np.random.default_rng(5)
GREY = RNG.integers(0, 256, (31, 44)).astype(np.uint8)
COLOUR = RNG.integers(0, 256, (31, 44, 3)).astype(np.uint8)
DEEP = (RNG.integers(0, 4096, (31, 44))).astype(np.uint16)
STACK = RNG.integers(0, 256, (5, 31, 44)).astype(np.uint8)
SLIDE = RNG.integers(0, 256, (70, 50)).astype(np.uint8)
Y, X = np.indices((70, 50))
COLOURS = np.stack([2 * Y + X, 250 - 2 * X - Y, Y + 3 * X], axis=-1).astype(np.uint8)


def encode_jpeg(frame: NDArray[Any], outside: str = "YCBCR") -> bytes:
    colours = {} if frame.ndim == 2 else {"colorspace": "RGB", "outcolorspace": outside}
    data: bytes = imagecodecs.jpeg8_encode(np.ascontiguousarray(frame), level=95, **colours)
    return data


def encode_bare_rgb(frame: NDArray[Any]) -> bytes:
    """A JPEG that does not say that its colours are red, green and blue."""
    data = encode_jpeg(frame, "RGB")
    place = data.index(b"\xff\xee\0\x0eAdobe")
    return data[:place] + data[place + 16 :]


def encode_jpeg2000(frame: NDArray[Any]) -> bytes:
    data: bytes = imagecodecs.jpeg2k_encode(frame, level=0, codecformat="j2k")
    return data


def as_rgb(grey: NDArray[Any]) -> NDArray[np.uint8]:
    return np.repeat(grey[..., None], 3, axis=2)


@pytest.mark.parametrize("storage", ["explicit", "implicit", "rle"])
def test_every_storage_gives_the_pixels(storage: str) -> None:
    syntax = ImplicitVRLittleEndian if storage == "implicit" else ExplicitVRLittleEndian
    options: dict[str, Any] = {"rle": storage == "rle"}
    np.testing.assert_array_equal(decode_image(save(build(GREY), syntax, **options)), as_rgb(GREY))
    np.testing.assert_array_equal(decode_image(save(build(COLOUR), syntax, **options)), COLOUR)
    inverted = build(GREY, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(
        decode_image(save(inverted, syntax, **options)), as_rgb(255 - GREY)
    )
    found = open_image(save(build(STACK, frames=5), syntax, **options), choice=PlaneChoice(z=3))
    np.testing.assert_array_equal(found.decode(), as_rgb(STACK[3]))
    found = open_image(save(build(STACK, frames=5), syntax, **options), choice=PlaneChoice(z="max"))
    np.testing.assert_array_equal(found.decode(), as_rgb(STACK.max(axis=0)))


@pytest.mark.parametrize(
    ("encode", "syntax", "photometric", "atol"),
    [
        (encode_jpeg, JPEGBaseline8Bit, "YBR_FULL_422", 6),
        (lambda frame: encode_jpeg(frame, "RGB"), JPEGBaseline8Bit, "RGB", 6),
        (encode_bare_rgb, JPEGBaseline8Bit, "RGB", 6),
        (encode_jpeg2000, JPEG2000Lossless, "YBR_RCT", 0),
        (encode_jpeg2000, JPEG2000, "RGB", 0),
    ],
)
def test_compressed_frames_are_read(
    encode: Callable[[NDArray[Any]], bytes], syntax: UID, photometric: str, atol: int
) -> None:
    found = decode_image(save_encoded(build(COLOURS), encode, syntax, photometric))
    np.testing.assert_allclose(found.astype(int), COLOURS, atol=atol)
    grey = COLOURS[..., 0]
    if encode is not encode_bare_rgb:
        found = decode_image(save_encoded(build(grey), encode, syntax, "MONOCHROME2"))
        np.testing.assert_allclose(found.astype(int), as_rgb(grey), atol=atol)


def test_deep_jpeg_2000_is_read() -> None:
    data = save_encoded(build(DEEP), encode_jpeg2000, JPEG2000Lossless, "MONOCHROME2")
    samples = open_image(data).read(Window(0, 0, 31, 44))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(samples[..., 0], DEEP)


@pytest.mark.parametrize("storage", ["plain", "rle", "jpeg2000"])
@pytest.mark.parametrize("pixels", [SLIDE, COLOURS])
def test_the_frames_of_a_slide_are_its_tiles(pixels: NDArray[Any], storage: str) -> None:
    slide = build_slide(pixels, (16, 24), um_per_px=0.25)
    if storage == "jpeg2000":
        data = save_encoded(
            slide, encode_jpeg2000, JPEG2000Lossless, str(slide.PhotometricInterpretation)
        )
    else:
        data = save(slide, rle=storage == "rle")
    image = open_image(data)
    expected = pixels if pixels.ndim == 3 else as_rgb(pixels)
    np.testing.assert_array_equal(image.decode(), expected)
    region = image.read(Window(11, 20, 33, 17))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(region, expected[11:44, 20:37, : region.shape[2]])
    assert read_header(data).hw == (70, 50) and image.um_per_px == pytest.approx(0.25)


def test_a_slide_of_one_tile_is_its_frame() -> None:
    for organization in ("TILED_FULL", "TILED_SPARSE"):
        slide = build_slide(SLIDE, (70, 50), DimensionOrganizationType=organization)
        np.testing.assert_array_equal(decode_image(save(slide)), as_rgb(SLIDE))


def test_a_frame_has_one_fragment() -> None:
    data = save_encoded(build(GREY), encode_jpeg, JPEGBaseline8Bit, "MONOCHROME2")
    end = data.rindex(b"\xfe\xff\xdd\xe0")
    with pytest.raises(UnsupportedFormat, match="frames in several fragments"):
        read_header(data[:end] + b"\xfe\xff\0\xe0" + bytes(4) + data[end:])


def test_colours_may_lie_plane_by_plane() -> None:
    planar = build(COLOUR, PlanarConfiguration=1)
    planar.PixelData = np.ascontiguousarray(COLOUR.transpose(2, 0, 1)).tobytes()
    np.testing.assert_array_equal(decode_image(save(planar)), COLOUR)


@pytest.mark.parametrize(
    ("dtype", "rle"),
    [(np.uint32, False), (np.int32, False)]  # pydicom compresses none of 32 bits
    + [(dtype, rle) for dtype in (np.uint16, np.int16, np.int8) for rle in (False, True)],
)
def test_deep_samples_are_stretched_by_their_values(dtype: Any, rle: bool) -> None:
    values = np.linspace(-90, 120, 31 * 44).reshape(31, 44)
    if np.dtype(dtype).kind == "u":
        values += 90
    pixels = values.astype(dtype)
    image = open_image(save(build(pixels), rle=rle))
    found = image.decode()[..., 0].astype(int)
    assert image.is_deep and found.min() == 0 and found.max() == 255
    order = np.argsort(pixels.ravel(), kind="stable")
    assert (np.diff(found.ravel()[order]) >= 0).all()
    low, high = float(pixels.min()), float(pixels.max())
    np.testing.assert_allclose(found, (pixels - low) / (high - low) * 255, atol=3)


@pytest.mark.parametrize(("dtype", "stored"), [(np.uint16, 12), (np.int16, 12), (np.uint8, 6)])
def test_bits_that_are_not_stored_do_not_count(dtype: Any, stored: int) -> None:
    clean = (DEEP & (2**stored - 1)).astype(dtype)
    if np.dtype(dtype).kind == "i":
        clean = np.where(clean >= 2048, clean - 4096, clean).astype(dtype)
    unsigned = clean.view(f"u{clean.itemsize}")
    kept = unsigned & (2**stored - 1)
    dirty = (kept | (RNG.integers(0, 4, kept.shape) << stored)).astype(unsigned.dtype).view(dtype)
    assert (dirty != clean).any()
    bits = {"BitsStored": stored, "HighBit": stored - 1}
    np.testing.assert_array_equal(
        decode_image(save(build(dirty, **bits))), decode_image(save(build(clean, **bits)))
    )
    if stored == 6:
        assert decode_image(save(build(dirty, **bits))).max() == 63 * 4


def test_frames_are_chosen_by_z() -> None:
    data = save(build(STACK, frames=5))
    with pytest.raises(PlaneError, match=r"5 planes \(choose one with z=0..4 or z=max\)"):
        decode_image(data)
    with pytest.raises(PlaneError, match="z=5: the image has 5 planes"):
        open_image(data, choice=PlaneChoice(z=5))
    green = open_image(save(build(COLOUR)), choice=PlaneChoice("green")).decode()
    np.testing.assert_array_equal(green, as_rgb(COLOUR[..., 1]))


def nest(**elements: Any) -> Sequence:
    item = Dataset()
    for name, value in elements.items():
        setattr(item, name, value)
    return Sequence([item])


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"PixelSpacing": [0.00065, 0.00065]}, 0.65),
        ({"PixelSpacing": [0.00065, 0.0009]}, None),
        ({"PixelSpacing": [0.0, 0.0]}, None),
        ({}, None),
        (
            {
                "SharedFunctionalGroupsSequence": nest(
                    PixelMeasuresSequence=nest(PixelSpacing=[0.5, 0.5])
                )
            },
            500.0,
        ),
        ({"SharedFunctionalGroupsSequence": nest(PatientID="x")}, None),
    ],
)
def test_the_size_of_a_pixel_is_pixel_spacing(
    elements: dict[str, Any], expected: float | None
) -> None:
    data = save(build(GREY, **elements))
    header = read_header(data)
    assert header.hw == (31, 44) and peek_hw(data) is None
    assert header.um_per_px == pytest.approx(expected)
    assert open_image(data).um_per_px == pytest.approx(expected)


def damage(data: bytes, **numbers: int) -> bytes:
    """Replaces values of 16 bits of the explicit transfer syntax."""
    tags = {"Rows": 0x10, "Columns": 0x11, "BitsAllocated": 0x100, "HighBit": 0x102}
    for name, number in numbers.items():
        start = struct.pack("<HH2sH", 0x28, tags[name], b"US", 2)
        assert data.count(start) == 1
        place = data.index(start) + len(start)
        data = data[:place] + struct.pack("<H", number) + data[place + 2 :]
    return data


PLAIN = save(build(GREY))
PACKED = save(build(STACK, frames=5), rle=True)
PIXELS = PLAIN.index(struct.pack("<HH", 0x7FE0, 0x10))
HOSTILE = {
    "huge": (damage(PLAIN, Rows=65_535, Columns=65_535), CorruptImage, "4294836225 bytes by"),
    "huge rle": (damage(PACKED, Rows=65_535, Columns=65_535), ImageTooLarge, "65535x65535 px"),
    "flat": (damage(PLAIN, Rows=0), CorruptImage, "44x0 px by its header"),
    "larger": (damage(PLAIN, Rows=32), CorruptImage, "1408 bytes by its header, but 1364 bytes"),
    "frames": (save(build(GREY, frames=None, NumberOfFrames=10**9)), CorruptImage, "1000000000"),
    "many frames": (save(build(GREY, NumberOfFrames=20_000)), CorruptImage, "20000 frames of 1364"),
    "no frames": (save(build(GREY, NumberOfFrames=0)), CorruptImage, "has 0 frames"),
    "bits": (damage(PLAIN, BitsAllocated=12), UnsupportedFormat, "8 bits stored in 12"),
    "one bit": (damage(PLAIN, BitsAllocated=1), UnsupportedFormat, "8 bits stored in 1"),
    "high bit": (damage(PLAIN, HighBit=5), UnsupportedFormat, "the highest at 5"),
    "palette": (
        save(build(GREY, PhotometricInterpretation="PALETTE COLOR")),
        UnsupportedFormat,
        "1 samples of kind 'PALETTE COLOR' is not read; MONOCHROME1, MONOCHROME2, RGB are",
    ),
    "ybr": (
        save(build(COLOUR, PhotometricInterpretation="YBR_FULL_422")),
        UnsupportedFormat,
        "'YBR_FULL_422'",
    ),
    "tiles": (
        save(build(STACK, frames=5, TotalPixelMatrixColumns=220)),
        CorruptImage,
        "slide in DICOM is 220x0 px",
    ),
    "sparse": (
        save(build_slide(SLIDE, (16, 16), DimensionOrganizationType="TILED_SPARSE")),
        UnsupportedFormat,
        "tiles of the kind TILED_SPARSE, 1 optical paths and 1 focal planes",
    ),
    "paths": (
        save(build_slide(SLIDE, (16, 16), NumberOfOpticalPaths=2)),
        UnsupportedFormat,
        "2 optical paths",
    ),
    "focal planes": (
        save(build_slide(SLIDE, (16, 16), TotalPixelMatrixFocalPlanes=3)),
        UnsupportedFormat,
        "3 focal planes",
    ),
    "fewer tiles": (
        save(build_slide(SLIDE, (16, 16), TotalPixelMatrixRows=81)),
        UnsupportedFormat,
        "slide in DICOM of 50x81 px with 20 frames in place of 24",
    ),
    "negative": (
        save(build_slide(SLIDE, (16, 16), TotalPixelMatrixRows=0)),
        CorruptImage,
        "50x0 px",
    ),
    "tiny tiles": (
        save(build_slide(SLIDE, (1, 1), TotalPixelMatrixRows=60_000, NumberOfFrames=3_000_000)),
        CorruptImage,
        f"3000000 frames, not 1..{MAX_TILES}",
    ),
    "jpeg of 16 bits": (
        save_encoded(build(DEEP), lambda frame: bytes(8), JPEGBaseline8Bit, "MONOCHROME2"),
        UnsupportedFormat,
        "JPEG of type uint16",
    ),
    "another jpeg": (
        save_encoded(
            build(GREY), lambda frame: encode_jpeg(frame[:-1]), JPEGBaseline8Bit, "MONOCHROME2"
        ),
        CorruptImage,
        "frame 0 of the DICOM is a JPEG of 44x30 px",
    ),
    "another jpeg 2000": (
        save_encoded(
            build(DEEP), lambda frame: encode_jpeg2000(GREY), JPEG2000Lossless, "MONOCHROME2"
        ),
        CorruptImage,
        "frame 0 of the DICOM is a JPEG 2000 of 44x31 px with 1 samples of type uint8",
    ),
    "damaged jpeg": (
        save_encoded(
            build(GREY), lambda frame: encode_jpeg(frame)[:-200], JPEGBaseline8Bit, "MONOCHROME2"
        ),
        CorruptImage,
        "damaged|truncated",
    ),
    "no jpeg": (
        save_encoded(build(GREY), lambda frame: bytes(99), JPEGBaseline8Bit, "MONOCHROME2"),
        CorruptImage,
        "no frame header",
    ),
    "no syntax": (bytes(128) + b"DICM" + bytes(200), UnsupportedFormat, "transfer syntax 'none'"),
    "no image": (
        save(build(GREY, PhotometricInterpretation="")),
        UnsupportedFormat,
        "without an image",
    ),
    "no pixels": (PLAIN[:PIXELS], CorruptImage, "no pixels within"),
    "header": (PLAIN[: PIXELS - 20], CorruptImage, "."),
    "preamble": (PLAIN[:132], UnsupportedFormat, "transfer syntax 'none'"),
    "truncated": (PLAIN[:-9], CorruptImage, "1364 bytes by its header, but 1355 bytes"),
    "truncated rle": (PACKED[:-9], CorruptImage, "5 frames by its header, but 4 whole"),
    "cut table": (PACKED[: PACKED.index(b"\xfe\xff\x00\xe0") + 6], CorruptImage, "but 0 whole"),
    "far": (
        PLAIN[:PIXELS] + bytes(1 << 22) + PLAIN[PIXELS:],
        CorruptImage,
        f"no pixels within its first {MAX_HEADER_BYTES} bytes",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_with_the_reason(name: str) -> None:
    data, error, message = HOSTILE[name]
    with pytest.raises(error, match=message):
        open_image(data, choice=PlaneChoice(z=1) if name.endswith("rle") else None).decode()


@pytest.mark.parametrize("syntax", [JPEGLSLossless, ExplicitVRBigEndian])
def test_other_transfer_syntaxes_are_refused_by_name(syntax: UID) -> None:
    file = io.BytesIO()
    meta = Dataset()
    meta.file_meta = FileMetaDataset()
    meta.file_meta.TransferSyntaxUID = syntax
    meta.file_meta.MediaStorageSOPClassUID = "1.2"
    meta.file_meta.MediaStorageSOPInstanceUID = "1.3"
    meta.save_as(file, enforce_file_format=True)
    with pytest.raises(
        UnsupportedFormat, match=re.escape(f"transfer syntax '{syntax.name}' is not read")
    ):
        read_header(file.getvalue())


def begin(*elements: bytes) -> bytes:
    """A file of the implicit transfer syntax that goes on with these elements."""
    start = save(build(GREY), ImplicitVRLittleEndian)
    meta_bytes = 132 + 12 + struct.unpack_from("<I", start, 140)[0]
    return start[:meta_bytes] + b"".join(elements)


UNENDING = 0xFFFFFFFF
SEQUENCE = struct.pack("<HHI", 0x8, 0x1140, UNENDING)
ITEM = struct.pack("<HHI", 0xFFFE, 0xE000, UNENDING)
NOTHING = struct.pack("<HHI", 0x10, 0x10, 0)


@pytest.mark.parametrize(
    "data",
    [
        begin((SEQUENCE + ITEM) * 20_000),
        begin((SEQUENCE + ITEM) * 500_000),
        begin(SEQUENCE, struct.pack("<HHI", 0xFFFE, 0xE000, 0) * (MAX_ITEMS + 1)),
        begin(SEQUENCE, struct.pack("<HHI", 0xFFFE, 0xE000, 0) * MAX_ITEMS),
        begin(SEQUENCE, ITEM, NOTHING * 500_000),
        begin(NOTHING * 500_000),
        begin(struct.pack("<HHI", 0x9, 0x1001, UNENDING) * 300_000),
        begin(struct.pack("<HHI", 0x28, 0x10, 0xFFFFFFFE) + b"1234"),
    ],
    ids=["deep", "deeper", "items", "most items", "nested", "elements", "private", "long"],
)
def test_what_precedes_the_pixels_is_bounded(data: bytes) -> None:
    began_s = time.process_time()
    with pytest.raises(DecodeError):
        read_header(data)
    assert time.process_time() - began_s < 30


@pytest.mark.parametrize(
    "data",
    [
        *(
            PLAIN,
            PACKED,
            save(build(DEEP), ImplicitVRLittleEndian),
            save(build_slide(SLIDE, (16, 16))),
        ),
        save_encoded(build(COLOUR), encode_jpeg, JPEGBaseline8Bit, "YBR_FULL_422"),
        save_encoded(build(COLOUR), encode_jpeg2000, JPEG2000Lossless, "YBR_RCT"),
    ],
)
def test_damage_anywhere_is_refused_or_read(data: bytes) -> None:
    rng = np.random.default_rng(7)
    outcomes = set()
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(132, len(data), rng.integers(1, 6)):
            damaged[place] = rng.integers(256)
        try:
            end = rng.integers(100, len(data)) if rng.random() < 0.3 else None
            pixels = open_image(bytes(damaged[:end]), choice=PlaneChoice(z=0)).decode()
            outcomes.add("read")
            assert pixels.ndim == 3 and pixels.dtype == np.uint8
        except DecodeError as error:
            outcomes.add("refused")
            assert str(error)
    assert outcomes == {"read", "refused"}


def test_the_preamble_may_be_that_of_a_tiff() -> None:
    data = b"II*\0" + struct.pack("<I", 1 << 20) + PLAIN[8:]
    np.testing.assert_array_equal(decode_image(data), as_rgb(GREY))
    assert peek_hw(data) is None


def test_without_pydicom_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom.filereader", None)
    with pytest.raises(UnsupportedFormat, match="only with the extra 'science' of solo-serve"):
        decode_image(PLAIN)
