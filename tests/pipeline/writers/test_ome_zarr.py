from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from zarr.storage import ZipStore

from pipeline.types import Detection
from pipeline.writers import FORMATS, Page
from pipeline.writers.labels import LabelImage
from pipeline.writers.ome_zarr import CHUNK_PX
from tests.support.found import CLASSES, build_page, to_instance, to_mask

OME_ZARR = FORMATS["ome-zarr"]
SIZES = [(1, 1), (40, 50), (CHUNK_PX, CHUNK_PX), (513, 1025), (1300, 2), (1100, 2200)]


def read_levels(path: Path, page: Page) -> tuple[list[NDArray[Any]], dict[str, Any]]:
    """The pyramid as the zarr library reads it, and the attributes of the group."""
    with open(path, "wb") as file:
        OME_ZARR.write(page, file)
    store = ZipStore(path, mode="r")
    group = zarr.open_group(store, mode="r")
    attributes = dict(group.attrs)
    (image,) = attributes["multiscales"]
    levels = [np.asarray(group[d["path"]]) for d in image["datasets"]]
    store.close()
    return levels, attributes


def build_squares(image_hw: tuple[int, int]) -> Page:
    """A page whose masks lie at the borders of chunks and of the image."""
    height, width = image_hw
    found: list[Detection] = []
    for y in range(0, height, max(1, height // 5)):
        for x in range(0, width, max(1, width // 4)):
            mask = np.zeros(image_hw, bool)
            mask[max(0, y - 30) : y + 9, max(0, x - 20) : x + 13] = True
            found.append(to_instance(mask, score=0.9 - 0.01 * len(found)))
    return Page(name="a.png", image_hw=image_hw, instances=found, classes=CLASSES)


@pytest.mark.parametrize("image_hw", SIZES)
def test_zarr_reads_the_labels_of_every_level(tmp_path: Path, image_hw: tuple[int, int]) -> None:
    page = build_squares(image_hw)
    levels, _ = read_levels(tmp_path / "a.zip", page)
    expected = np.zeros(image_hw, np.uint16)
    for number, instance in enumerate(LabelImage(page).instances, 1):
        expected[to_mask(instance)] = number
    assert expected.any()
    for level in levels:
        assert level.dtype == np.uint16
        np.testing.assert_array_equal(level, expected)
        expected = expected[::2, ::2]
    assert max(levels[-1].shape) <= 1024 and (len(levels) == 1 or max(levels[-2].shape) > 1024)


def test_an_image_without_instances_has_no_chunks(tmp_path: Path) -> None:
    levels, _ = read_levels(tmp_path / "a.zip", build_page(0, (1500, 700)))
    assert [level.shape for level in levels] == [(1500, 700), (750, 350)]
    assert not any(level.any() for level in levels)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert sorted(archive.namelist()) == [".zattrs", ".zgroup", "0/.zarray", "1/.zarray"]


def test_the_size_of_a_pixel_is_the_scale_of_each_level(tmp_path: Path) -> None:
    page = build_page(1, (10, 1200), um_per_px=0.25, name="s.tif")
    _, attributes = read_levels(tmp_path / "a.zip", page)
    (image,) = attributes["multiscales"]
    assert image["version"] == "0.4" and image["name"] == "s.tif"
    assert image["axes"] == [
        {"name": axis, "type": "space", "unit": "micrometer"} for axis in ("y", "x")
    ]
    assert [d["coordinateTransformations"] for d in image["datasets"]] == [
        [{"type": "scale", "scale": [0.25, 0.25]}],
        [{"type": "scale", "scale": [0.5, 0.5]}],
    ]
    assert attributes["image-label"]
    _, attributes = read_levels(tmp_path / "b.zip", build_page(1))
    (image,) = attributes["multiscales"]
    assert image["axes"] == [{"name": axis, "type": "space"} for axis in ("y", "x")]
    assert image["datasets"][0]["coordinateTransformations"][0]["scale"] == [1.0, 1.0]


def test_the_bytes_are_the_same_whenever_they_are_written(tmp_path: Path) -> None:
    page = build_page(5)
    file = io.BytesIO()
    OME_ZARR.write(page, file)
    assert file.getvalue() == OME_ZARR.encode(page)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert len(archive.namelist()) == len(set(archive.namelist()))
        assert json.loads(archive.read("0/.zarray"))["dtype"] == "<u2"
