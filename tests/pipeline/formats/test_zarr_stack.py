"""OME-Zarr images that the zarr library writes: the right pixels, whatever their storage."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.decode import open_image, peek_hw, read_header
from pipeline.errors import CorruptImage, ImageTooLarge, PlaneError, UnsupportedFormat
from pipeline.formats.planes import PlaneChoice
from pipeline.formats.zarr_zip import MAX_DIRECTORY_BYTES
from pipeline.types import Window
from tests.support.zarr_files import describe_axes, pack, read_files, write

numcodecs = pytest.importorskip("numcodecs", reason="needs the extra science")
codecs = pytest.importorskip("zarr.codecs", reason="needs the extra science")

RNG = np.random.default_rng(5)
GREY = RNG.integers(1, 256, (70, 50)).astype(np.uint8)
DEEP = RNG.integers(100, 4000, (2, 3, 4, 70, 50)).astype(np.uint16)
SMALL: dict[str, Any] = {"chunks": (32, 16)}
NEW: dict[str, Any] = {"version": "0.5"}


def build(folder: Path, *arguments: Any, **options: Any) -> bytes:
    return pack(read_files(write(folder / "a.zarr", *arguments, **options)))


def as_rgb(grey: NDArray[Any]) -> NDArray[np.uint8]:
    return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)


def change(data: dict[str, bytes], name: str, **fields: Any) -> bytes:
    """A Zarr with other values in a file of JSON; None removes one."""
    content = {**json.loads(data[name]), **fields}
    kept = {key: value for key, value in content.items() if value is not None}
    return pack({**data, name: json.dumps(kept).encode()})


@pytest.mark.parametrize(
    "options",
    [
        SMALL,
        {**SMALL, "order": "F"},
        {**SMALL, "chunk_key_encoding": {"name": "v2", "separator": "/"}},
        *({**SMALL, "compressors": [numcodecs.get_codec({"id": name})]} for name in (
            "blosc", "zlib", "gzip", "zstd", "lz4"
        )),
        {**SMALL, "compressors": None},
        {**SMALL, **NEW},
        *({**SMALL, **NEW, "compressors": [codec]} for codec in (
            codecs.BloscCodec(), codecs.GzipCodec(), codecs.ZstdCodec(checksum=True)
        )),
        {**SMALL, **NEW, "compressors": [codecs.ZstdCodec(), codecs.Crc32cCodec()]},
        {**SMALL, **NEW, "compressors": None},
        {**SMALL, **NEW, "filters": [codecs.TransposeCodec(order=(1, 0))]},
        {**NEW, "chunks": (16, 16), "shards": (64, 32)},
        {**NEW, "chunks": (70, 50), "shards": (70, 50)},
    ],
)  # fmt: skip
def test_every_storage_gives_the_pixels(tmp_path: Path, options: dict[str, Any]) -> None:
    data = build(tmp_path, GREY, **options)
    image = open_image(data)
    np.testing.assert_array_equal(image.decode(), as_rgb(GREY))
    assert read_header(data).hw == (70, 50) and peek_hw(data) is None
    assert image.um_per_px == 0.5


@pytest.mark.parametrize("dtype", ["|b1", "|i1", "<u2", ">u2", ">i4", "<f2", ">f4", "<f8", "<u8"])
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_every_type_and_byte_order(tmp_path: Path, dtype: str, version: str) -> None:
    pixels = (GREY % 2).astype(dtype) if dtype == "|b1" else (GREY // 2).astype(dtype)
    options: dict[str, Any] = {}
    if version == "0.5" and dtype[0] == ">":
        options["serializer"] = codecs.BytesCodec(endian="big")
        pixels = pixels.astype(pixels.dtype.newbyteorder("="))
    image = open_image(build(tmp_path, pixels, version=version, **SMALL, **options))
    window = Window(3, 5, 40, 30)
    np.testing.assert_array_equal(image.read(window)[..., 0], pixels[3:43, 5:35])  # type: ignore[attr-defined]
    assert image.is_deep == (dtype != "|b1")
    if dtype == "|b1":
        np.testing.assert_array_equal(image.decode(), as_rgb(pixels.astype(np.uint8) * 255))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_planes_are_chosen_by_time_channel_and_depth(tmp_path: Path, version: str) -> None:
    channels = {"omero": {"channels": [{"label": name} for name in ("DAPI", "GFP", "RFP")]}}
    data = build(
        tmp_path, DEEP, "tczyx", version=version, attributes=channels, chunks=(1, 1, 2, 32, 32)
    )

    def read(choice: PlaneChoice) -> NDArray[Any]:
        found: NDArray[Any] = open_image(data, choice=choice).read(Window(0, 0, 70, 50))  # type: ignore[attr-defined]
        return found

    np.testing.assert_array_equal(read(PlaneChoice("GFP", 2, 1))[..., 0], DEEP[1, 1, 2])
    np.testing.assert_array_equal(read(PlaneChoice("2", "max", 0))[..., 0], DEEP[0, 2].max(axis=0))
    np.testing.assert_array_equal(read(PlaneChoice(None, 3, 0)), np.moveaxis(DEEP[0, :, 3], 0, -1))
    with pytest.raises(PlaneError, match=r"2 points in time .* 4 planes"):
        read(PlaneChoice())
    with pytest.raises(PlaneError, match="0: 'DAPI', 1: 'GFP', 2: 'RFP'"):
        read(PlaneChoice("Cy5", 0, 0))


def test_chunks_that_are_left_out_have_the_fill_value(tmp_path: Path) -> None:
    for version, name in (("0.4", "0/1.2"), ("0.5", "0/c/1/2")):
        files = read_files(write(tmp_path / version, GREY, version=version, fill_value=7, **SMALL))
        del files[name]
        expected = GREY.copy()
        expected[32:64, 32:48] = 7
        np.testing.assert_array_equal(open_image(pack(files)).decode(), as_rgb(expected))


def test_a_zip_may_be_deflated_and_have_the_zarr_in_a_folder(tmp_path: Path) -> None:
    files = read_files(write(tmp_path / "a.zarr", GREY, **NEW, chunks=(16, 16), shards=(64, 64)))
    labels = {f"labels/0/{name}": data for name, data in files.items()}
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        data = pack({**labels, **files}, kind, top="b/a.zarr/")
        np.testing.assert_array_equal(open_image(data).decode(), as_rgb(GREY))
    with pytest.raises(UnsupportedFormat, match="compressed by method 14 in its ZIP"):
        open_image(pack(files, zipfile.ZIP_LZMA))
    with pytest.raises(UnsupportedFormat, match="only if an OME-Zarr image is in them"):
        open_image(pack({"a.txt": b"text"}))


def test_the_size_of_a_pixel_is_by_units_and_all_scales(tmp_path: Path) -> None:
    files = read_files(write(tmp_path / "a.zarr", GREY, um_per_px=0.25))
    (image,) = json.loads(files[".zattrs"])["multiscales"]
    whole = [{"type": "scale", "scale": [2.0, 2.0]}]
    data = change(files, ".zattrs", multiscales=[{**image, "coordinateTransformations": whole}])
    assert open_image(data).um_per_px == 0.5
    for unit, expected in (("nanometer", 0.25e-3), ("millimeter", 250.0), ("parsec", None)):
        axes = [{**axis, "unit": unit} for axis in image["axes"]]
        data = change(files, ".zattrs", multiscales=[{**image, "axes": axes}])
        assert open_image(data).um_per_px == (expected and pytest.approx(expected))
    del image["datasets"][0]["coordinateTransformations"]
    axes = [{"name": axis["name"], "type": "space"} for axis in image["axes"]]
    data = change(files, ".zattrs", multiscales=[{**image, "axes": axes}])
    assert open_image(data).um_per_px is None


def test_of_several_images_the_first_is_read(tmp_path: Path) -> None:
    inner = read_files(write(tmp_path / "a.zarr", GREY, **SMALL))
    files = {f"0/{name}": data for name, data in inner.items()}
    files |= {".zgroup": b'{"zarr_format": 2}', ".zattrs": b'{"bioformats2raw.layout": 3}'}
    np.testing.assert_array_equal(open_image(pack(files)).decode(), as_rgb(GREY))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"multiscales": None}, r"without an OME-Zarr image \(multiscales\)"),
        ({"multiscales": None, "plate": {}}, "an OME-Zarr plate is not read"),
        ({"multiscales": [{"version": "0.2", "datasets": []}]}, "version '0.2' is not read"),
        ({"multiscales": [{"axes": ["y", "x"], "version": "0.3"}]}, "version '0.3' is not read"),
    ],
)
def test_groups_without_such_an_image_are_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], why: str
) -> None:
    files = read_files(write(tmp_path / "a.zarr", GREY))
    with pytest.raises(UnsupportedFormat, match=why):
        open_image(change(files, ".zattrs", **fields))


@pytest.mark.parametrize(
    ("fields", "error", "why"),
    [
        ({"dtype": "|O", "filters": [{"id": "pickle"}]}, UnsupportedFormat, r"type '\|O'"),
        ({"dtype": [["a", "<u2"]]}, UnsupportedFormat, "numbers of type"),
        ({"dtype": "<c8"}, UnsupportedFormat, "'<c8'"),
        ({"filters": [{"id": "pickle"}]}, UnsupportedFormat, "the filters pickle"),
        ({"compressor": {"id": "pickle"}}, UnsupportedFormat, "compressed by 'pickle'"),
        ({"compressor": {"id": ["zlib"]}}, UnsupportedFormat, "compressed by"),
        ({"zarr_format": 1}, UnsupportedFormat, "version 1"),
        ({"shape": [70, 50, 1, 1, 1, 1]}, UnsupportedFormat, "2 to 5 axes"),
        ({"shape": [70, 50, 1]}, CorruptImage, "shape|axes"),
        ({"shape": [70, 0]}, CorruptImage, "the shape"),
        ({"shape": [70, True]}, CorruptImage, "the shape"),
        ({"chunks": [1 << 20, 1 << 20]}, ImageTooLarge, "a chunk of the Zarr takes"),
        ({"shape": [9000, 50], "chunks": [1, 1]}, UnsupportedFormat, "too small"),
        ({"shape": [1 << 30, 1 << 30], "chunks": [9, 99]}, UnsupportedFormat, "too small"),
        ({"shape": [2000, 2000]}, ImageTooLarge, "2000x2000 px"),
        ({"shape": "70"}, UnsupportedFormat, "shape"),
        ({"fill_value": "AAAA"}, UnsupportedFormat, "fill value 'AAAA'"),
        ({"fill_value": 300}, CorruptImage, "damaged"),
        ({"dimension_separator": "x"}, CorruptImage, "damaged"),
        ({"chunks": None}, CorruptImage, "damaged: KeyError"),
    ],
)
def test_arrays_of_other_kinds_are_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], error: type[Exception], why: str
) -> None:
    files = read_files(write(tmp_path / "a.zarr", GREY))
    with pytest.raises(error, match=why):
        open_image(change(files, "0/.zarray", **fields), max_pixels=1 << 20).decode()


@pytest.mark.parametrize(
    ("fields", "error", "why"),
    [
        ({"data_type": "string"}, UnsupportedFormat, "'string'"),
        ({"data_type": {"name": "struct"}}, UnsupportedFormat, "struct"),
        ({"node_type": "group"}, CorruptImage, "names a group"),
        ({"codecs": [{"name": "vlen-bytes"}]}, UnsupportedFormat, "compressed by 'vlen-bytes'"),
        ({"codecs": [{"name": "numcodecs.pickle"}]}, UnsupportedFormat, "compressed by 'pickle'"),
        ({"codecs": [{"name": "gzip"}, {"name": "zstd"}]}, UnsupportedFormat, "one compressor is"),
        ({"codecs": []}, UnsupportedFormat, "one compressor is"),
        ({"storage_transformers": [{"name": "x"}]}, UnsupportedFormat, "storage transformers"),
        ({"chunk_grid": {"name": "rectilinear"}}, UnsupportedFormat, "an irregular grid"),
        ({"chunk_key_encoding": {"name": "x"}}, UnsupportedFormat, "chunks named by 'x'"),
        ({"codecs": 7}, CorruptImage, "damaged"),
    ],
)
def test_arrays_of_version_3_too(
    tmp_path: Path, fields: dict[str, Any], error: type[Exception], why: str
) -> None:
    files = read_files(write(tmp_path / "a.zarr", GREY, **NEW))
    with pytest.raises(error, match=why):
        open_image(change(files, "0/zarr.json", **fields))


def test_a_shard_has_a_bounded_index(tmp_path: Path) -> None:
    files = read_files(write(tmp_path / "a.zarr", GREY, **NEW, chunks=(70, 50), shards=(70, 50)))
    (shard,) = json.loads(files["0/zarr.json"])["codecs"]
    shard["configuration"]["chunk_shape"] = [1, 1]
    grid = {"name": "regular", "configuration": {"chunk_shape": [7000, 5000]}}
    with pytest.raises(CorruptImage, match="35000000 chunks in a shard"):
        open_image(change(files, "0/zarr.json", codecs=[shard], chunk_grid=grid))
    shard["configuration"]["index_codecs"].append({"name": "gzip"})
    with pytest.raises(UnsupportedFormat, match="indexed by bytes, crc32c, gzip"):
        open_image(change(files, "0/zarr.json", codecs=[shard]))


@pytest.mark.parametrize("path", ["../a", "/etc", "a/../../b", ".", "", "a//b", "a\\b", "\0"])
def test_the_array_lies_below_the_folder(tmp_path: Path, path: str) -> None:
    files = read_files(write(tmp_path / "a.zarr", GREY))
    (image,) = json.loads(files[".zattrs"])["multiscales"]
    image["datasets"][0]["path"] = path
    with pytest.raises(CorruptImage, match="not below its folder"):
        open_image(change(files, ".zattrs", multiscales=[image]))


@pytest.mark.parametrize(
    ("axes", "why"),
    [
        ("yt", "axes y, t"),
        ("tx", "axes t, x"),
        ("zyxc", "axes z, y, x, c"),
        ("cyxyx", "axes c, y, x, y, x"),
        ("ccyx", "axes c, c, y, x"),
        ("qyx", None),
    ],
)
def test_axes_have_the_order_of_the_standard(tmp_path: Path, axes: str, why: str | None) -> None:
    files = read_files(write(tmp_path / "a.zarr", GREY[None], "zyx"))
    (image,) = json.loads(files[".zattrs"])["multiscales"]
    image["axes"] = describe_axes(axes)
    image["datasets"][0] = {"path": "0"}
    data = change(files, ".zattrs", multiscales=[image])
    if why is None:
        np.testing.assert_array_equal(open_image(data).decode(), as_rgb(GREY))
    else:
        with pytest.raises(UnsupportedFormat, match=why):
            open_image(data)


@pytest.mark.parametrize("compressor", ["blosc", "zlib", "gzip", "zstd", "lz4", None])
def test_a_chunk_that_grows_beyond_its_size_is_damaged(
    tmp_path: Path, compressor: str | None
) -> None:
    codec = compressor and numcodecs.get_codec({"id": compressor})
    files = read_files(write(tmp_path / "a.zarr", GREY, compressors=codec, chunks=(70, 50)))
    for size in (0, 3499, 3501, 4_000_000):
        content = bytes(size)
        data = pack({**files, "0/0.0": codec.encode(content) if codec and size else content})
        with pytest.raises(CorruptImage, match="the Zarr"):
            open_image(data).decode()
    # What the header of Blosc says is there, or is not.
    damaged = bytearray(files["0/0.0"])
    damaged[12:16] = b"\xff\xff\xff\x7f"
    with pytest.raises(CorruptImage, match=r"chunk of the Zarr|0\.0 of the Zarr"):
        open_image(pack({**files, "0/0.0": bytes(damaged[:-1])})).decode()


def test_what_a_zip_says_of_its_files_is_bounded(tmp_path: Path) -> None:
    files = read_files(write(tmp_path / "a.zarr", GREY))
    bomb = pack({**files, "0/.zarray": b" " * (1 << 25)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 1 << 17
    with pytest.raises(CorruptImage, match=r"0/.zarray of the Zarr has 33554432 bytes"):
        open_image(bomb)
    many = pack({**files, **{f"0/{n:0200}": b"" for n in range(MAX_DIRECTORY_BYTES // 240)}})
    with pytest.raises(CorruptImage, match="list of files has more than"):
        open_image(many)
    whole = pack(files)
    for cut in range(1, len(whole), 97):
        with pytest.raises((CorruptImage, UnsupportedFormat)):
            open_image(whole[:cut]).decode()
    place = whole.index(b"PK\x01\x02")
    for encrypted in range(place + 8, place + 9):
        damaged = bytearray(whole)
        damaged[encrypted] |= 1
        with pytest.raises((CorruptImage, UnsupportedFormat), match="Zarr"):
            open_image(bytes(damaged)).decode()


def test_metadata_that_are_no_json_are_damage(tmp_path: Path) -> None:
    files = read_files(write(tmp_path / "a.zarr", GREY))
    for content in (b"", b"[]", b"{", b'{"a":' * 5000, b"\xff", b'{"a": NaN}'):
        for name in (".zattrs", "0/.zarray"):
            with pytest.raises(CorruptImage, match="Zarr is damaged"):
                open_image(pack({**files, name: content}))
    del files["0/.zarray"]
    with pytest.raises(CorruptImage, match="no array at '0'"):
        open_image(pack(files))


def test_too_many_planes_are_refused(tmp_path: Path) -> None:
    files = read_files(write(tmp_path / "a.zarr", GREY[None], "zyx"))
    with pytest.raises(CorruptImage, match="more than 100000 planes"):
        open_image(change(files, "0/.zarray", shape=[100_001, 70, 50]))


def test_without_zarr_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = build(tmp_path, GREY)
    monkeypatch.setitem(sys.modules, "pipeline.formats.zarr_library", None)
    with pytest.raises(UnsupportedFormat, match="only with the extra 'science' of solo-serve"):
        open_image(data)
