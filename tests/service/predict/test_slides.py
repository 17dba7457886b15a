"""Slides give the results of the whole image, in any order of regions and after interruptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from PIL import Image
from zarr.storage import ZipStore

from pipeline.encode import decode_box, decode_window, instance_from_coco
from pipeline.runs import LONG_PIXELS
from pipeline.types import Window
from pipeline.writers import FORMATS
from service.jobs.journal import Journal
from service.models.repository import LoadedModel, load_version
from service.predict import main
from tests.support import dicom_files, zarr_files
from tests.support.blob_model import KEEP_RATIO_INPUT, draw_picture, encode_picture, publish

tifffile = pytest.importorskip("tifffile", reason="needs the extra science")

HEIGHT, WIDTH = 330, 250
Predict = Callable[..., list[dict[str, Any]]]


def _draw(*, empty_from: int = HEIGHT) -> NDArray[np.uint8]:
    rng = np.random.default_rng(4)
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for _ in range(40):
        y, x = rng.integers(0, empty_from - 20), rng.integers(0, WIDTH - 20)
        size = rng.integers(6, 20, 2)
        pixels[y : y + size[0], x : x + size[1], rng.integers(3)] = 255
    return pixels


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the tiles of each engine call; all TIFFs are slides."""
    monkeypatch.setattr("service.predict.slides.MAX_PIXELS", 0)
    counted: list[int] = []

    def count(self: LoadedModel) -> None:
        infer = self.backend.infer

        def counting(tiles: Any) -> Any:
            counted.append(len(tiles))
            return infer(tiles)

        monkeypatch.setattr(self.backend, "infer", counting)

    def load_counting(*arguments: Any) -> LoadedModel:
        model = load_version(*arguments)
        count(model)
        return model

    monkeypatch.setattr("service.predict.command.load_version", load_counting)
    return counted


@pytest.fixture
def predict(tmp_path: Path) -> Predict:
    publish(tmp_path / "repo", card={"object_size_px": 16, "um_per_px": 0.5})

    def run(file: Path, name: str, *arguments: str) -> list[dict[str, Any]]:
        out = tmp_path / f"{name}.json"
        repo = str(tmp_path / "repo")
        options = ["--out", str(out), "--model-repo", repo, "--device", "cpu", "--quiet"]
        main([str(file), *options, *arguments])
        if out.is_dir():  # of GeoJSON
            (document,) = out.glob("*.geojson")
            return list(json.loads(document.read_bytes())["features"])
        found: list[dict[str, Any]] = json.loads(out.read_bytes())
        return found

    return run


def _write(tmp_path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    path = tmp_path / "slide.tif"
    photometric = "rgb" if pixels.ndim == 3 else "minisblack"
    tifffile.imwrite(path, pixels, photometric=photometric, **options)
    return path


def _keys(results: list[dict[str, Any]]) -> list[str]:
    return sorted(json.dumps(result, sort_keys=True) for result in results)


def _segment_whole(
    predict: Predict, file: Path, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    with monkeypatch.context() as patched:
        patched.setattr("service.predict.slides.MAX_PIXELS", 1 << 40)
        return predict(file, "whole")


@pytest.mark.parametrize("kind", ["folder", "zip", "dicom"])
def test_a_zarr_or_dicom_is_a_slide(
    tmp_path: Path,
    predict: Predict,
    tiles: list[int],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    pixels = np.moveaxis(_draw(), -1, 0)
    file = zarr_files.write(tmp_path / "s.zarr", pixels, "cyx", version="0.5", chunks=(3, 64, 50))
    if kind == "zip":
        files = zarr_files.read_files(file)
        file = tmp_path / "s.zarr.zip"
        file.write_bytes(zarr_files.pack(files))
    elif kind == "dicom":
        file = tmp_path / "s.dcm"
        file.write_bytes(dicom_files.save(dicom_files.build_slide(_draw(), (64, 50))))
    whole = _segment_whole(predict, file, monkeypatch)
    assert len(whole) > 10
    assert _keys(predict(file, "slide")) == _keys(whole)
    window = "60,100,120,150"
    part = predict(file, "part", "--region", window)
    assert 0 < len(part) < len(whole) and set(_keys(part)) < set(_keys(whole))


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (64, 32), "compression": "zlib"},
        {"rowsperstrip": 7},
        {"rowsperstrip": 50, "compression": "lzw"},
    ],
)
def test_a_slide_gives_what_the_whole_image_gives(
    tmp_path: Path,
    predict: Predict,
    tiles: list[int],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    file = _write(tmp_path, _draw(), **options)
    whole = _segment_whole(predict, file, monkeypatch)
    all_tiles, tiles[:] = sum(tiles), []
    assert len(whole) > 10
    assert _keys(predict(file, "slide", "--all-tiles")) == _keys(whole)
    assert sum(tiles) == all_tiles
    assert _keys(predict(file, "tissue")) == _keys(whole)


def test_overlaps_are_resolved_as_in_the_whole_image(
    tmp_path: Path, predict: Predict, tiles: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _write(tmp_path, _draw(), tile=(64, 64))
    options = ("--overlaps", "resolve", "--score-threshold", "0.05")
    kept = predict(file, "kept", "--all-tiles", *options[2:])
    with monkeypatch.context() as patched:
        patched.setattr("service.predict.slides.MAX_PIXELS", 1 << 40)
        whole = predict(file, "whole", *options)
    assert len(whole) > 10 and _keys(whole) != _keys(kept)
    assert _keys(predict(file, "slide", "--all-tiles", *options)) == _keys(whole)


def _picture(folder: Path) -> NDArray[np.uint8]:
    (path,) = folder.iterdir()
    assert path.name == "00001_slide.png"
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_picture_of_a_slide_has_the_masks_and_fits_on_a_screen(
    tmp_path: Path, predict: Predict, tiles: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = _draw()
    file = _write(tmp_path, pixels, tile=(64, 64))
    with monkeypatch.context() as patched:
        patched.setattr("service.predict.slides.MAX_PIXELS", 1 << 40)
        predict(file, "whole", "--overlays", str(tmp_path / "whole"))
    expected = _picture(tmp_path / "whole")
    predict(file, "slide", "--overlays", str(tmp_path / "slide"))
    drawn = _picture(tmp_path / "slide")
    is_drawn = (expected != pixels).any(axis=2)
    assert is_drawn.any()
    np.testing.assert_array_equal((drawn != pixels).any(axis=2), is_drawn)
    region = ("--region", "40,50,100,200")
    predict(file, "part", "--overlays", str(tmp_path / "part"), *region)
    assert _picture(tmp_path / "part").shape == (200, 100, 3)
    monkeypatch.setattr("pipeline.overview.MAX_SIDE_PX", 100)
    predict(file, "small", "--overlays", str(tmp_path / "small"))
    small = _picture(tmp_path / "small")
    assert small.shape == (83, 63, 3)
    plain = cv2.resize(pixels[:328, :248], (62, 82), interpolation=cv2.INTER_AREA)
    drawn_small = (small[:82, :62] != plain).any(axis=2)
    np.testing.assert_array_equal(
        drawn_small, is_drawn[:328, :248].reshape(82, 4, 62, 4).any(axis=(1, 3))
    )


def test_deep_samples_are_stretched_by_the_whole_slide(
    tmp_path: Path, predict: Predict, tiles: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = (_draw()[..., 0].astype(np.uint16) * 13 + np.arange(WIDTH, dtype=np.uint16)) + 300
    file = _write(tmp_path, deep, tile=(64, 64))
    assert _keys(predict(file, "slide", "--all-tiles")) == _keys(
        _segment_whole(predict, file, monkeypatch)
    )


def _draw_apart() -> NDArray[np.uint8]:
    """Objects so far from each other that a tile shows one of each colour."""
    rng = np.random.default_rng(6)
    pixels = np.zeros((520, 410, 3), np.uint8)
    for y in range(10, 480, 90):
        for x in range(10, 380, 90):
            top, left = y + rng.integers(0, 24), x + rng.integers(0, 24)
            height, width = rng.integers(5, 30, 2)
            pixels[top : top + height, left : left + width, rng.integers(3)] = 255
    return pixels


@pytest.mark.parametrize(
    "cuts",
    [((0, 100, 410), (0, 170, 520)), ((0, 410), (0, 33, 300, 520)), ((0, 205, 410), (0, 520))],
)
def test_regions_together_give_the_whole(
    tmp_path: Path,
    predict: Predict,
    tiles: list[int],
    monkeypatch: pytest.MonkeyPatch,
    cuts: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    file = _write(tmp_path, _draw_apart(), tile=(64, 64))
    whole = _segment_whole(predict, file, monkeypatch)
    all_tiles, tiles[:] = sum(tiles), []
    found = []
    for (left, right), (top, bottom) in product(pairwise(cuts[0]), pairwise(cuts[1])):
        region = f"{left},{top},{right - left},{bottom - top}"
        found += predict(file, f"part-{left}-{top}", "--region", region, "--all-tiles")
        assert sum(tiles) < all_tiles
        tiles[:] = []
    assert len(whole) > 20 and _keys(found) == _keys(whole)


def test_an_interrupted_slide_continues_at_its_row(
    tmp_path: Path, predict: Predict, tiles: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _write(tmp_path, _draw(), tile=(64, 64))
    expected = predict(file, "expected", "--all-tiles")
    all_tiles, tiles[:] = sum(tiles), []
    append, calls = Journal.append, []

    def stop(self: Journal, key: str, *arguments: Any, **named: Any) -> None:
        calls.append(key)
        if len(calls) == 8:
            raise KeyboardInterrupt
        append(self, key, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", stop)
        with pytest.raises(SystemExit):
            predict(file, "resumed", "--all-tiles")
    first, tiles[:] = sum(tiles), []
    assert 0 < first < all_tiles
    assert _keys(predict(file, "resumed", "--all-tiles")) == _keys(expected)
    assert 0 < sum(tiles) < all_tiles <= first + sum(tiles)
    tiles[:] = []
    changed = _draw()
    changed[:60] = 0
    _write(tmp_path, changed, tile=(64, 64), software="another size of file")
    assert _keys(predict(file, "resumed", "--all-tiles")) != _keys(expected)


def test_tiles_without_tissue_are_left_out(
    tmp_path: Path, predict: Predict, tiles: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _write(tmp_path, _draw(empty_from=130), tile=(64, 64))
    whole = _segment_whole(predict, file, monkeypatch)
    all_tiles, tiles[:] = sum(tiles), []
    assert _keys(predict(file, "slide")) == _keys(whole)
    assert sum(tiles) < 0.8 * all_tiles


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--region", "900,0,10,10"), "is outside the slide of 250x330 px"),
        (("--channel", "9"), "invalid_plane: channel='9'"),
        (("--z", "1"), "invalid_plane: z=1"),
    ],
)
def test_what_a_slide_cannot_do_is_said(
    tmp_path: Path,
    predict: Predict,
    tiles: list[int],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = _write(tmp_path, _draw(), tile=(64, 64))
    with pytest.raises(SystemExit, match=message):
        predict(file, "slide", *arguments)


def _write_sparse(path: Path, image_hw: tuple[int, int], place: tuple[int, int]) -> None:
    """A slide whose file has two of its tiles, one of them at `place` with a red square."""
    side = 1024
    square = np.zeros((side, side, 3), np.uint8)
    square[988:1004, 978:994, 0] = 255
    rows, columns = (-(-length // side) for length in image_hw)
    parts = {(0, 0): np.zeros_like(square), place: square}
    tifffile.imwrite(
        path,
        (parts.get((row, column)) for row in range(rows) for column in range(columns)),
        shape=(*image_hw, 3),
        dtype=np.uint8,
        tile=(side, side),
        photometric="rgb",
        bigtiff=True,
        compression="zlib",
    )


@pytest.mark.slow
def test_a_slide_may_have_all_pixels_that_pycocotools_can_count(
    tmp_path: Path, predict: Predict
) -> None:
    file, hw = tmp_path / "slide.tif", (65_535, 65_537)
    assert hw[0] * hw[1] == LONG_PIXELS - 1
    _write_sparse(file, hw, (63, 63))
    region = ("--region", "65450,65450,87,85", "--all-tiles")
    (found,) = predict(file, "slide", *region, "--overlays", str(tmp_path / "drawn"))
    assert found["bbox"] == [65_490, 65_500, 16, 16]
    assert 240 < found["area"] <= 256
    assert found["segmentation"]["size"] == [*hw]
    instance = instance_from_coco(found, 0)
    assert decode_window(instance, Window(65_490, 65_480, 40, 40)).sum() == found["area"]
    assert decode_box(instance).sum() == found["area"]
    drawn = _picture(tmp_path / "drawn")
    assert drawn.shape == (85, 87, 3) and drawn[50:66, 40:56].all(axis=(0, 1)).any()
    assert not drawn[:50].any() and not drawn[:, :40].any()


@pytest.mark.slow
def test_a_slide_of_more_pixels_is_written_without_run_lengths(
    tmp_path: Path, predict: Predict
) -> None:
    file = tmp_path / "slide.tif"
    _write_sparse(file, (70_000, 70_100), (67, 67))
    region = ("--region", "69550,69550,87,85", "--all-tiles", "--overlays", str(tmp_path / "drawn"))
    for name in ("results", "coco", "coco-polygons"):
        with pytest.raises(SystemExit, match="70100x70000 px: run lengths of 2"):
            predict(file, name, *region, "--format", name)
    (feature,) = predict(file, "large", *region, "--format", "geojson")
    corners = np.array(feature["geometry"]["coordinates"][0])
    np.testing.assert_array_equal(corners.min(axis=0), [69_586, 69_596])
    np.testing.assert_array_equal(corners.max(axis=0), [69_602, 69_612])
    drawn = _picture(tmp_path / "drawn")
    assert drawn.shape == (85, 87, 3) and drawn[46:62, 36:52].all(axis=(0, 1)).any()


@pytest.mark.parametrize("overlaps", ["keep", "resolve"])
def test_long_runs_give_the_same_instances(
    tmp_path: Path,
    predict: Predict,
    tiles: list[int],
    monkeypatch: pytest.MonkeyPatch,
    overlaps: str,
) -> None:
    file = _write(tmp_path, _draw(), tile=(64, 32), compression="zlib")
    options = ("--format", "geojson", "--overlaps", overlaps)
    expected = predict(file, "short", *options)
    monkeypatch.setattr("pipeline.runs.LONG_PIXELS", HEIGHT * WIDTH)
    assert len(expected) > 10 and predict(file, "long", *options) == expected
    monkeypatch.setattr("service.predict.slides.MAX_MASK_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(SystemExit, match=f"250x330 px, more than {HEIGHT * WIDTH - 1}"):
        predict(file, "larger", *options)


def _read_labels(path: Path) -> NDArray[Any]:
    if path.suffix == ".zip":
        return np.asarray(zarr.open_group(ZipStore(path, mode="r"), mode="r")["0"])
    return np.asarray(tifffile.imread(path) if path.suffix == ".tif" else Image.open(path))


@pytest.mark.parametrize("name", ["labels", "ome-tiff", "ome-zarr"])
def test_a_label_image_of_a_slide_is_that_of_the_whole_image(
    tmp_path: Path,
    predict: Predict,
    tiles: list[int],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    file, out = _write(tmp_path, _draw(), tile=(64, 64)), tmp_path / "labels"
    written = []
    for most in (1 << 40, 0):
        monkeypatch.setattr("service.predict.slides.MAX_PIXELS", most)
        options = ["--model-repo", str(tmp_path / "repo"), "--device", "cpu", "--quiet"]
        main([str(file), *options, "--out", str(out), "--format", name, "--overlaps", "resolve"])
        (path,) = (out / "masks").iterdir()
        assert path.name == f"slide{FORMATS[name].suffix}"
        written.append(_read_labels(path))
    whole, slide = written
    assert whole.shape == (HEIGHT, WIDTH) and whole.max() > 10
    pairs = np.unique(np.stack([whole.ravel(), slide.ravel()]), axis=1)
    # The same instances; those of one score may have each other's numbers.
    assert pairs.shape[1] == whole.max() + 1 == slide.max() + 1


def test_other_files_have_no_regions(tmp_path: Path, predict: Predict) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encode_picture(draw_picture(48, 64)))
    with pytest.raises(SystemExit, match="--region is for local TIFF, OME-Zarr and DICOM files"):
        predict(file, "slide", "--region", "0,0,9,9")
    for region in ("1,2,3", "a,b,c,d", "0,0,0,5", "-1,0,4,4"):
        with pytest.raises(SystemExit, match="2"):
            predict(file, "slide", f"--region={region}")
    with pytest.raises(SystemExit, match="2"):
        predict(file, "slide", "--region", "0,0,9,9", "--ray")


def test_a_slide_needs_tiles(tmp_path: Path, predict: Predict, tiles: list[int]) -> None:
    publish(tmp_path / "repo", "whole", input=KEEP_RATIO_INPUT)
    file = _write(tmp_path, _draw(), tile=(64, 64))
    with pytest.raises(SystemExit, match="a slide needs a model with tiles"):
        predict(file, "slide", "--model", "whole")
