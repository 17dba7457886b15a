from __future__ import annotations

import io

import numpy as np
import pytest
import tifffile
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.encode import decode_box
from pipeline.errors import WriteError
from pipeline.overlaps import resolve_overlaps
from pipeline.types import Detection
from pipeline.writers import FORMATS
from pipeline.writers import labels as module
from pipeline.writers.labels import LabelImage, list_classes
from tests.support.found import CLASSES, build_page, to_instance, to_mask


def read(name: str, data: bytes) -> np.ndarray:
    if name == "ome-tiff":
        return np.asarray(tifffile.imread(io.BytesIO(data)))
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "I;16"
        return np.asarray(image)


@pytest.mark.parametrize("name", ["labels", "ome-tiff"])
@pytest.mark.parametrize("count", [0, 1, 9])
def test_each_value_is_an_instance_of_resolved_overlaps(name: str, count: int) -> None:
    page = build_page(count)
    left = resolve_overlaps(page.instances)
    pixels = read(name, FORMATS[name].encode(page))
    assert pixels.shape == (40, 50) and pixels.dtype == np.uint16
    assert pixels.max() == len(left) <= count
    for number, instance in enumerate(left, 1):
        np.testing.assert_array_equal(pixels == number, to_mask(instance))


def pixel_instances(count: int, side: int = 300) -> list[Detection]:
    found = []
    for number in range(count):
        mask = np.zeros((side, side), bool)
        mask.flat[number] = True
        found.append(to_instance(mask))
    return found


def test_ten_thousand_instances_fit() -> None:
    page = build_page(0, (120, 120), instances=pixel_instances(10_000, 120))
    pixels = read("labels", FORMATS["labels"].encode(page))
    np.testing.assert_array_equal(pixels.ravel()[:10_000], np.arange(1, 10_001))


def test_more_than_16_bits_need_a_tiff(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pixel for each instance, without the time that the masks of so many take."""
    (one,) = pixel_instances(1)
    assert decode_box(one).sum() == 1
    many = [
        Detection(0, 0.5, one.rle, (number % 300, number // 300, 1, 1), 1)
        for number in range(65_536)
    ]
    monkeypatch.setattr(module, "resolve_overlaps", list)
    monkeypatch.setattr(module, "decode_window", lambda *given: np.ones((1, 1), np.uint8))
    page = build_page(0, (300, 300), instances=many)
    with pytest.raises(WriteError, match=r"65536 instances .* the format ome-tiff has 32 bits"):
        FORMATS["labels"].encode(page)
    pixels = read("ome-tiff", FORMATS["ome-tiff"].encode(page))
    assert pixels.dtype == np.uint32 and pixels.max() == 65_536


def test_the_tiff_says_how_large_a_pixel_is() -> None:
    data = FORMATS["ome-tiff"].encode(build_page(1, um_per_px=0.325))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        assert file.is_ome
        description = file.ome_metadata
    assert description is not None
    assert 'PhysicalSizeX="0.325"' in description and 'PhysicalSizeYUnit="µm"' in description


def test_one_class_is_named_several_are_not() -> None:
    assert list_classes(CLASSES[:1]) == {"classes.txt": b"cell\n"}
    assert list_classes(CLASSES) == {}


@pytest.mark.parametrize("side", [1, 7, 16, 64])
def test_tiles_of_any_size_make_the_same_picture(side: int) -> None:
    labels = LabelImage(build_page(9))
    whole, drawn = next(labels.iterate_tiles(50))[1], np.zeros((40, 50), np.uint16)
    assert whole.shape == (40, 50) and whole.any()
    for window, pixels in labels.iterate_tiles(side):
        assert max(pixels.shape) <= side
        part = drawn[window.y : window.y + window.height, window.x : window.x + window.width]
        assert not part.any() and part.shape == pixels.shape
        part[:] = pixels
    np.testing.assert_array_equal(drawn, whole)


def test_a_png_of_too_many_pixels_is_refused_before_it_is_drawn() -> None:
    page = build_page(0, (1 << 16, (1 << 12) + 1))
    with pytest.raises(WriteError, match=r"4097x65536 px; the format labels holds 268435456 px"):
        FORMATS["labels"].encode(page)


@pytest.mark.parametrize(("most_bytes", "is_big"), [(1 << 31, False), (40 * 50 * 2 - 1, True)])
def test_a_tiff_of_more_bytes_is_a_bigtiff(
    monkeypatch: pytest.MonkeyPatch, most_bytes: int, is_big: bool
) -> None:
    monkeypatch.setattr(module, "_MOST_CLASSIC_BYTES", most_bytes)
    page = build_page(9)
    data = FORMATS["ome-tiff"].encode(page)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        assert (file.is_bigtiff, file.is_ome) == (is_big, True)
    np.testing.assert_array_equal(
        read("ome-tiff", data), next(LabelImage(page).iterate_tiles(50))[1]
    )


def test_masks_far_beyond_memory_are_drawn_part_by_part() -> None:
    height, width = 1 << 16, (1 << 16) - 1
    rle = coco_mask.frPyObjects(
        {"size": [height, width], "counts": [5, height * width - 5]}, height, width
    )
    whole = Detection(0, 0.5, rle, (0, 0, width, height), height * width - 5)
    tiles = LabelImage(build_page(0, (height, width), instances=[whole])).iterate_tiles(64)
    window, pixels = next(tiles)
    assert (window.height, window.width) == (64, 64)
    np.testing.assert_array_equal(pixels[:, 0], [0] * 5 + [1] * 59)
    assert pixels[:, 1:].all() and next(tiles)[1].all()
