"""TIFF: right pixels whatever the storage, and a clear error for everything hostile."""

from __future__ import annotations

import contextlib
import io
import itertools
import struct
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.decode import decode_for, decode_image, open_image, peek_hw, read_header
from pipeline.errors import (
    CorruptImage,
    DecodeError,
    ImageTooLarge,
    PlaneError,
    UnsupportedFormat,
)
from pipeline.formats.planes import PlaneChoice
from pipeline.model_config import ContrastSpec, InputSpec, TileResize
from pipeline.preprocess import stretch_contrast
from pipeline.types import Window

tifffile = pytest.importorskip("tifffile", reason="needs the extra science")

RNG = np.random.default_rng(5)
GREY = RNG.integers(0, 256, (70, 50)).astype(np.uint8)
COLOUR = RNG.integers(0, 256, (70, 50, 3)).astype(np.uint8)
DEEP = RNG.integers(100, 4000, (70, 50)).astype(np.uint16)
TILED = {"tile": (32, 16)}
STRIPS = {"rowsperstrip": 17}


def write(pixels: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def as_rgb(grey: NDArray[Any]) -> NDArray[np.uint8]:
    return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)


def find_tag(data: bytes, code: int) -> int:
    """Position of the value of an entry in the first directory of a little-endian TIFF."""
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    for position in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, position)[0] == code:
            return position + 8
    raise AssertionError(f"no tag {code}")


def set_tag(data: bytes, code: int, value: int) -> bytes:
    position, changed = find_tag(data, code), bytearray(data)
    struct.pack_into("<HI", changed, position - 6, 4, 1)
    struct.pack_into("<I", changed, position, value)
    return bytes(changed)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "zstd", "packbits", "lzma"])
@pytest.mark.parametrize("parts", [TILED, STRIPS])
def test_every_storage_gives_the_same_pixels(
    compression: str | None, parts: dict[str, Any]
) -> None:
    kinds = [(GREY, as_rgb(GREY), {"photometric": "minisblack"})]
    kinds.append((COLOUR, COLOUR, {"photometric": "rgb"}))
    planar = np.ascontiguousarray(COLOUR.transpose(2, 0, 1))
    kinds.append((planar, COLOUR, {"photometric": "rgb", "planarconfig": "separate"}))
    predictors = (None, True) if compression else (None,)
    for predictor, (order, big) in itertools.product(predictors, (("<", False), (">", True))):
        for pixels, expected, options in kinds:
            data = write(
                pixels,
                **{**options, **parts, "byteorder": order, "bigtiff": big},
                compression=compression,
                predictor=predictor,
            )
            np.testing.assert_array_equal(decode_image(data), expected)
            header = read_header(data)
            assert (header.height, header.width) == (70, 50)
            assert peek_hw(data) is None


def test_jpeg_inside_is_read() -> None:
    smooth = np.dstack([np.tile(np.linspace(0, 255, 64), (64, 1))] * 3).astype(np.uint8)
    smooth[..., 1] //= 2
    data = write(smooth, photometric="rgb", compression="jpeg", tile=(32, 32))
    assert np.abs(decode_image(data).astype(int) - smooth).max() < 20


@pytest.mark.parametrize("kind", ["u2", "u4", "u8", "i2", "i4", "f4", "f8"])
def test_samples_of_all_depths_give_one_picture(kind: str) -> None:
    expected = decode_image(write(DEEP))
    assert expected.min() == 0 and expected.max() == 255
    found = decode_image(write(DEEP.astype(kind)))
    assert np.abs(found.astype(int) - expected).max() <= 1
    if kind[0] != "u":
        shifted = decode_image(write(DEEP.astype(kind) - 2000))
        assert np.abs(shifted.astype(int) - expected).max() <= 1


def test_the_contrast_rule_sees_the_samples_at_full_depth() -> None:
    """A dim picture would have nine levels if it came down to 8 bits before the rule."""
    dim = (np.arange(3500).reshape(70, 50) // 7 + 20_000).astype(np.uint16)
    spec = InputSpec(
        resize=TileResize(scale=1, tile_hw=(64, 64), overlap_px=8),
        contrast=ContrastSpec(low=0, high=100, min_range=1),
    )
    image = open_image(write(dim))
    pixels, rest, levels = decode_for(image, spec)
    assert levels is not None
    assert image.is_deep and rest.contrast is None and rest.resize == spec.resize
    assert len(np.unique(pixels)) > 200
    assert (np.diff(pixels[..., 0].ravel().astype(int)) >= 0).all()


@pytest.mark.parametrize("is_inverted", [False, True])
@pytest.mark.parametrize(
    ("kind", "gain", "ranges"),
    [
        *(("u2", 257, 1), ("u2", 16, 3), ("i4", 257, 3)),
        *(("u8", (2**64 - 1) // 255, 1), ("f4", 1 / 255, 1)),
    ],
)
def test_how_an_image_was_recorded_is_known_after_the_stretch(
    kind: str, gain: float, ranges: int, is_inverted: bool
) -> None:
    """The exposure of a dim image: what the same image has in 8 bits."""
    rng = np.random.default_rng(0)
    recorded = rng.integers(8, 120, (70, 50)).astype(np.uint8)
    recorded[:4] = 255
    shown = 255 - recorded if is_inverted else recorded
    photometric = "miniswhite" if is_inverted else "minisblack"
    with np.errstate(invalid="ignore"):
        samples = (recorded * np.asarray(gain, "u8" if kind[0] == "u" else None)).astype(kind)
    image = open_image(write(samples, photometric=photometric))
    pixels, levels = image.decode_stretched(contrast=ContrastSpec(low=0.5, high=99.8))
    assert levels is not None and pixels.max() == 255 and pixels.min() == 0
    assert np.abs(levels[0][pixels].astype(int) - as_rgb(shown)).max() <= 2
    assert len(levels) == ranges


@pytest.mark.parametrize("value", [-5.0, 0.0, 1e300, 3e38, np.nan])
def test_values_without_a_range_have_levels_all_the_same(value: float) -> None:
    pixels, levels = open_image(write(np.full((30, 40), value))).decode_stretched()
    assert levels is not None and levels.shape == (1, 256) and pixels.shape == (30, 40, 3)


def test_eight_bits_are_left_to_the_models_rule() -> None:
    spec = InputSpec(
        resize=TileResize(scale=1, tile_hw=(64, 64), overlap_px=8),
        contrast=ContrastSpec(low=1, high=99),
    )
    pixels, rest, levels = decode_for(open_image(write(GREY)), spec)
    assert rest is spec and spec.contrast is not None and levels is None
    np.testing.assert_array_equal(pixels, as_rgb(GREY))
    assert not np.array_equal(stretch_contrast(pixels, spec.contrast), pixels)


def test_values_that_are_not_finite_do_not_count() -> None:
    pixels = DEEP.astype(np.float32)
    pixels[:3], pixels[3], pixels[4] = np.nan, np.inf, -np.inf
    found, expected = decode_image(write(pixels)), decode_image(write(DEEP))
    assert (found[:3] == 0).all() and (found[3] == 255).all() and (found[4] == 0).all()
    assert np.abs(found[5:].astype(int) - expected[5:]).max() <= 3
    assert (decode_image(write(np.full((4, 4), np.nan, np.float32))) == 0).all()


def test_kinds_of_grey_and_colour() -> None:
    np.testing.assert_array_equal(
        decode_image(write(GREY, photometric="miniswhite")), 255 - as_rgb(GREY)
    )
    bits = GREY > 128
    np.testing.assert_array_equal(
        decode_image(write(bits, photometric="minisblack")), as_rgb(bits * np.uint8(255))
    )
    table = RNG.integers(0, 1 << 16, (3, 256)).astype(np.uint16)
    found = decode_image(write(GREY, photometric="palette", colormap=table))
    np.testing.assert_array_equal(found, (table.T // 257).astype(np.uint8)[GREY])
    alpha = np.dstack([COLOUR, np.where(GREY > 128, 255, 0).astype(np.uint8)])
    found = decode_image(write(alpha, photometric="rgb", extrasamples=["unassalpha"]))
    np.testing.assert_array_equal(found, np.where(GREY[..., None] > 128, COLOUR, 0))
    found = decode_image(write(alpha, photometric="rgb", extrasamples=["unspecified"]))
    np.testing.assert_array_equal(found, COLOUR)


def test_the_orientation_is_applied() -> None:
    data = write(GREY, extratags=[(274, 3, 1, 6, True)])
    np.testing.assert_array_equal(decode_image(data), np.rot90(as_rgb(GREY), -1))


STACK = RNG.integers(0, 255, (5, 4, 70, 50)).astype(np.uint8)
NAMES = ["DAPI", "GFP", "mCherry", "BF"]
STACKS = {
    "ome": write(STACK, ome=True, metadata={"axes": "ZCYX", "Channel": {"Name": NAMES}}),
    "imagej": write(STACK, imagej=True, metadata={"axes": "ZCYX"}),
    "compressed": write(
        STACK, ome=True, compression="zlib", metadata={"axes": "ZCYX", "Channel": {"Name": NAMES}}
    ),
}


@pytest.mark.parametrize("kind", STACKS)
def test_planes_are_chosen(kind: str) -> None:
    data = STACKS[kind]
    for choice, expected in (
        (PlaneChoice("2", 3), STACK[3, 2]),
        (PlaneChoice("0", 0), STACK[0, 0]),
        (PlaneChoice("1", "max"), STACK[:, 1].max(axis=0)),
    ):
        found = open_image(data, choice=choice).decode()
        np.testing.assert_array_equal(found, as_rgb(expected))
    if kind != "imagej":
        found = open_image(data, choice=PlaneChoice(" dapi", 4)).decode()
        np.testing.assert_array_equal(found, as_rgb(STACK[4, 0]))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (PlaneChoice(), r"5 planes \(choose one with z=0..4 or z=max\) and 4 channels .*2: 'mCher"),
        (PlaneChoice(z=1), r"has 4 channels \(choose one with channel=: 0: 'DAPI', 1: 'GFP'"),
        (PlaneChoice(channel="BF"), r"has 5 planes"),
        (PlaneChoice("Cy5", 0), r"channel='Cy5': the image has 4 channels \(0: 'DAPI'"),
        (PlaneChoice("4", 0), "channel='4'"),
        (PlaneChoice("-1", 0), "channel='-1'"),
        (PlaneChoice("0", 5), "z=5: the image has 5 planes, counted from 0"),
        (PlaneChoice("0", 0, 1), "t=1: the image has 1 points in time"),
    ],
)
def test_what_a_choice_lacks_is_listed(choice: PlaneChoice, message: str) -> None:
    with pytest.raises(PlaneError, match=message):
        open_image(STACKS["ome"], choice=choice)


def test_other_formats_have_no_planes() -> None:
    from tests.support.image_files import encode

    with pytest.raises(PlaneError, match="channel, z: the image has one picture"):
        open_image(encode(COLOUR, "PNG"), choice=PlaneChoice("0", 0))


def test_three_channels_are_colours_and_pages_are_planes() -> None:
    planes = np.ascontiguousarray(COLOUR.transpose(2, 0, 1))
    data = write(planes, ome=True, photometric="minisblack", metadata={"axes": "CYX"})
    np.testing.assert_array_equal(decode_image(data), COLOUR)
    green = open_image(data, choice=PlaneChoice("1")).decode()
    np.testing.assert_array_equal(green, as_rgb(COLOUR[..., 1]))
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        for page in STACK[:, 0]:
            file.write(page, metadata=None)
    with pytest.raises(PlaneError, match="5 planes"):
        decode_image(buffer.getvalue())
    found = open_image(buffer.getvalue(), choice=PlaneChoice(z=2)).decode()
    np.testing.assert_array_equal(found, as_rgb(STACK[2, 0]))
    spectrum = RNG.integers(0, 255, (70, 50, 7)).astype(np.uint8)
    data = write(spectrum, photometric="minisblack", planarconfig="contig")
    found = open_image(data, choice=PlaneChoice("6")).decode()
    np.testing.assert_array_equal(found, as_rgb(spectrum[..., 6]))


def test_a_projection_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.formats.picture.MAX_PROJECTED_PIXELS", 4 * 70 * 50)
    with pytest.raises(
        ImageTooLarge, match="z=max reads 5 planes of 50x70 px, more than the 14000"
    ):
        open_image(STACKS["ome"], choice=PlaneChoice("0", "max"))
    assert open_image(STACKS["ome"], choice=PlaneChoice("0", 4)).height == 70


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ome": True, "metadata": {"PhysicalSizeX": 0.65, "PhysicalSizeY": 0.65}}, 0.65),
        (
            {
                "ome": True,
                "metadata": {
                    **{f"PhysicalSize{a}": 650.0 for a in "XY"},
                    **{f"PhysicalSize{a}Unit": "nm" for a in "XY"},
                },
            },
            0.65,
        ),
        ({"ome": True, "metadata": {"PhysicalSizeX": 0.65, "PhysicalSizeY": 0.7}}, None),
        ({"ome": True}, None),
        ({"imagej": True, "metadata": {"unit": "um"}, "resolution": (4, 4)}, 0.25),
        ({"imagej": True, "metadata": {"unit": "pixel"}, "resolution": (4, 4)}, None),
        ({"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}, 0.25),
        ({"resolution": (300, 300), "resolutionunit": "INCH"}, None),
        ({"description": "Aperio Image Library v1\n|AppMag = 40|MPP = 0.2520"} | TILED, 0.252),
    ],
)
def test_the_size_of_a_pixel_is_read_where_it_can_be_trusted(
    options: dict[str, Any], expected: float | None
) -> None:
    data = write(GREY, **options)
    assert read_header(data).um_per_px == pytest.approx(expected)
    assert open_image(data).um_per_px == pytest.approx(expected)


HUGE = set_tag(set_tag(write(GREY, metadata=None), 256, 1 << 30), 257, 1 << 30)
PLAIN = write(GREY, metadata=None, **STRIPS)
ZIPPED = write(GREY, metadata=None, compression="zlib", **STRIPS)


def _loop() -> bytes:
    data = bytearray(PLAIN)
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    struct.pack_into("<I", data, start + 2 + 12 * count, start)
    return bytes(data)


def _many_pages(count: int) -> bytes:
    """Directories of one entry, each of which leads to the next."""
    directory = struct.pack("<HHHII", 1, 256, 3, 1, 8)
    places = 8 + len(directory + b"1234") * np.arange(1, count + 1)
    return b"II*\0\x08\0\0\0" + b"".join(directory + struct.pack("<I", p) for p in places[:-1])


HOSTILE = {
    "huge": (HUGE, ImageTooLarge, "1073741824x1073741824 px"),
    "loop": (_loop(), CorruptImage, "pages form a loop"),
    "pages": (_many_pages(1_000_000), CorruptImage, "more than 20000 pages"),
    "truncated": (PLAIN[:-300], CorruptImage, "outside the file"),
    "header": (b"II*\0\x08\0", CorruptImage, "ends within its header"),
    "nothing": (b"II*\0\0\0\0\0", CorruptImage, "has no pages"),
    "far": (b"II*\0\xff\xff\xff\x7f" + bytes(90), CorruptImage, "outside the file"),
    "no width": (set_tag(PLAIN, 256, 0), CorruptImage, "0x70 px by its header"),
    "flat strips": (set_tag(PLAIN, 278, 0), DecodeError, "."),
    "depth": (set_tag(PLAIN, 258, 13), DecodeError, "."),
    "compression": (set_tag(PLAIN, 259, 50001), UnsupportedFormat, "compression .*; none, LZW"),
    "colours": (set_tag(PLAIN, 262, 8), UnsupportedFormat, "colours of kind CIELAB"),
    "samples": (set_tag(PLAIN, 277, 60_000), DecodeError, "."),
    "complex": (write(GREY.astype(np.complex64)), UnsupportedFormat, "complex64"),
    "damaged": (
        ZIPPED[: ZIPPED.find(b"\x78")] + bytes(8) + ZIPPED[ZIPPED.find(b"\x78") + 8 :],
        DecodeError,
        ".",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_with_the_reason(name: str) -> None:
    data, error, message = HOSTILE[name]
    with pytest.raises(error, match=message) as caught:
        decode_image(data)
    assert len(str(caught.value)) > 10


def test_what_is_decompressed_is_bounded_by_the_size_of_the_strip() -> None:
    """The strip holds 64 MiB of zeros; 70x50 px are taken or refused."""
    import zlib

    data = write(GREY, metadata=None, compression="zlib", rowsperstrip=70)
    bomb = zlib.compress(bytes(1 << 26), 9)
    data = set_tag(set_tag(data, 273, len(data)), 279, len(bomb)) + bomb
    with contextlib.suppress(CorruptImage):
        assert decode_image(data).shape == (70, 50, 3)


def test_a_jpeg_inside_may_not_be_larger_than_its_tile() -> None:
    from tests.support.image_files import encode

    data = write(COLOUR, photometric="rgb", metadata=None, compression="jpeg", rowsperstrip=70)
    inside = encode(np.zeros((4000, 4000, 3), np.uint8), "JPEG")
    data = set_tag(set_tag(data, 273, len(data)), 279, len(inside)) + inside
    with pytest.raises(CorruptImage, match="a JPEG of 4000x4000 px is in a strip or tile of 50x70"):
        decode_image(data)


def test_a_tile_far_larger_than_the_image_is_refused() -> None:
    data = write(GREY, metadata=None, compression="zlib", **TILED)
    data = set_tag(set_tag(data, 322, 1 << 16), 323, 1 << 16)
    with pytest.raises(ImageTooLarge, match="a strip or tile of the TIFF takes 4294967296 bytes"):
        decode_image(data)


def test_numbers_in_the_directories_are_bounded() -> None:
    data = bytearray(set_tag(PLAIN, 273, 8))
    struct.pack_into("<I", data, find_tag(bytes(data), 273) - 4, 1 << 31)
    with pytest.raises(CorruptImage, match="more than 4194304 numbers"):
        decode_image(bytes(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('SizeZ="5"=>SizeZ="999999999"', "SizeZ 1e\\+09"),
        ("<OME=><!DOCTYPE a [<!ENTITY b 'c'>]><OME", "document type"),
        ("</OME>=></OMX>", "OME-XML is damaged"),
    ],
)
def test_hostile_descriptions_are_refused(change: str, message: str) -> None:
    before, after = change.split("=>", 1) if "=>" in change else (change, "")
    text = tifffile.TiffFile(io.BytesIO(STACKS["ome"])).pages[0].description
    changed = text.replace(before, after, 1)
    assert changed != text
    from pipeline.formats.ome import read_ome

    with pytest.raises(CorruptImage, match=message):
        read_ome(changed)


def test_damage_anywhere_is_refused_or_read() -> None:
    """Every kind of storage, a byte or a length changed: only decode errors come out."""
    files = [*STACKS.values(), PLAIN, ZIPPED, write(COLOUR, photometric="rgb", compression="lzw")]
    for data in files:
        short = bytearray(data)
        for _ in range(25):
            changed = bytearray(
                short[: RNG.integers(1, len(short))] if RNG.random() < 0.3 else short
            )
            for _ in range(RNG.integers(1, 4)):
                changed[RNG.integers(4, len(changed)) if len(changed) > 4 else 0] = RNG.integers(
                    256
                )
            try:
                found = open_image(bytes(changed), max_pixels=10**6, choice=PlaneChoice("0", 0, 0))
                assert found.decode().ndim == 3
            except DecodeError as error:
                assert str(error)


@pytest.mark.parametrize("storage", [TILED, STRIPS])
@pytest.mark.parametrize("compression", [33005, 34712])
def test_jpeg_2000_gives_the_pixels(compression: int, storage: dict[str, Any]) -> None:
    options: dict[str, Any] = {"compression": compression, "compressionargs": {"level": 0}}
    data = write(COLOUR, photometric="rgb", **options, **storage)
    np.testing.assert_array_equal(decode_image(data), COLOUR)
    deep = {**options, "compressionargs": {"level": 0, "bitspersample": 12}}
    image = open_image(write(DEEP, **deep, **storage))
    found = image.read(Window(9, 7, 50, 40))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(found[..., 0], DEEP[9:59, 7:47])


def test_aperios_jpeg_2000_is_in_luma_and_chroma() -> None:
    smooth = np.cumsum(RNG.integers(-2, 3, COLOUR.shape), axis=0).clip(-60, 60).astype(np.int16)
    colour = (smooth + 128).astype(np.uint8)
    stored = cv2.cvtColor(colour, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    lossless = {"level": 0, "mct": False}
    data = write(stored, photometric="rgb", compression=33003, compressionargs=lossless, **TILED)
    np.testing.assert_allclose(decode_image(data).astype(int), colour, atol=2)


def test_a_jpeg_2000_is_as_large_as_its_tile() -> None:
    options = {"photometric": "rgb", "compression": 34712, "compressionargs": {"level": 0}}
    data = write(COLOUR, **options, **TILED)
    place = data.index(b"\xff\x4f\xff\x51") + 8
    changed = bytearray(data)
    struct.pack_into(">2I", changed, place, 400, 400)
    with pytest.raises(CorruptImage, match=r"JPEG 2000 of 400x400 px .* a strip or tile of 16x32"):
        decode_image(bytes(changed))
    changed = bytearray(data)
    struct.pack_into(">H", changed, place + 32, 1)
    with pytest.raises(CorruptImage, match="with 1 samples"):
        decode_image(bytes(changed))
