"""Masks must follow the image: each mask is drawn into the image and compared after the change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline.model_config import KeepRatioResize, TileResize
from pipeline.preprocess import keep_ratio_size
from tests.support.tiny import UInt8, disc
from training.configs import get_config, list_configs
from training.configs.schema import AugmentConfig
from training.data.augment import (
    Sample,
    build_sample,
    check_sizes,
    crop_masks,
    photometric,
    random_keep_ratio,
    random_tile,
)
from training.data.records import Annotation

HEIGHT, WIDTH = 80, 100
PLAIN = AugmentConfig(flip=0.0)
TURNING = AugmentConfig(flip=0.5, dihedral=True, scale_jitter=(0.7, 1.4))


def annotation_of(mask: UInt8, label: int = 0) -> Annotation:
    rle = coco_mask.encode(np.asfortranarray(mask))
    x, y, w, h = (float(v) for v in coco_mask.toBbox(rle))
    return Annotation(rle, label, (x, y, w, h))


def scene(height: int = HEIGHT, width: int = WIDTH) -> tuple[UInt8, list[Annotation]]:
    """Three masks without symmetry, each drawn in a channel of its own."""
    masks = [disc(height, width, 20, 24, 14), disc(height, width, 60, 70, 11)]
    bent = np.zeros((height, width), np.uint8)
    bent[36:60, 20:28] = 1
    bent[52:60, 20:48] = 1
    masks.append(bent)
    image = np.stack(masks, axis=2) * np.uint8(255)
    return image, [annotation_of(m, label) for label, m in enumerate(masks)]


def assert_masks_follow(sample: Sample) -> None:
    """The mask with label c is where channel c is bright, but for pixels at its border."""
    objects = sample.objects
    assert objects.masks.shape[1:] == sample.image.shape[:2]
    assert len(objects.masks) == len(objects.labels) == len(objects.boxes_xyxy)
    for mask, label, box in zip(objects.masks, objects.labels, objects.boxes_xyxy, strict=True):
        drawn = sample.image[..., label] > 127
        different = np.count_nonzero(drawn != mask)
        perimeter = np.count_nonzero(mask != np.roll(mask, 1, 0)) + np.count_nonzero(
            mask != np.roll(mask, 1, 1)
        )
        assert different <= 0.35 * perimeter + 4
        rows, columns = np.nonzero(mask)
        assert box.tolist() == [
            columns.min(),
            rows.min(),
            columns.max() + 1,
            rows.max() + 1,
        ]


@pytest.mark.parametrize("scale", [1.0, 2.0, 1.5])
@pytest.mark.parametrize("seed", range(10))
def test_masks_follow_a_tile(seed: int, scale: float) -> None:
    image, annotations = scene()
    resize = TileResize(scale=scale, tile_hw=(64, 64), overlap_px=8)
    rng = np.random.default_rng(seed)
    sample = random_tile(image, annotations, resize, TURNING, rng)
    assert sample.image.shape[0] <= 64 * scale and sample.image.shape[1] <= 64 * scale
    assert_masks_follow(sample)


@pytest.mark.parametrize("seed", range(8))
def test_masks_follow_a_tile_that_is_not_square(seed: int) -> None:
    image, annotations = scene()
    resize = TileResize(scale=2.0, tile_hw=(48, 64), overlap_px=8)
    sample = random_tile(image, annotations, resize, TURNING, np.random.default_rng(seed))
    assert sample.image.shape[0] <= 96 and sample.image.shape[1] <= 128
    assert_masks_follow(sample)


@pytest.mark.parametrize("seed", range(8))
def test_masks_follow_the_keep_ratio_rule(seed: int) -> None:
    image, annotations = scene()
    resize = KeepRatioResize(short_side=96, long_side=200)
    config = AugmentConfig(short_sides=(40, 120))
    sample = random_keep_ratio(image, annotations, resize, config, np.random.default_rng(seed))
    short = min(sample.image.shape[:2])
    assert 40 <= short <= 120
    assert sample.image.shape[:2] == keep_ratio_size((HEIGHT, WIDTH), short, 200)
    assert len(sample.objects.masks) == 3
    assert_masks_follow(sample)


def test_flips_and_turns_all_happen() -> None:
    image, annotations = scene(64, 64)
    resize = TileResize(scale=1.0, tile_hw=(64, 64), overlap_px=8)
    config = replace(TURNING, scale_jitter=(1.0, 1.0))
    seen = set()
    for seed in range(60):
        sample = random_tile(image, annotations, resize, config, np.random.default_rng(seed))
        seen.add(sample.image.tobytes())
    wanted = {
        np.ascontiguousarray(turned).tobytes()
        for k in range(4)
        for turned in (np.rot90(image, k), np.rot90(image, k)[:, ::-1])
    }
    assert seen == wanted


def test_without_augmentation_a_tile_is_what_serving_shows() -> None:
    image, annotations = scene(64, 64)
    resize = TileResize(scale=1.0, tile_hw=(64, 64), overlap_px=8)
    sample = random_tile(image, annotations, resize, PLAIN, np.random.default_rng(0))
    np.testing.assert_array_equal(sample.image, image)
    for annotation, mask in zip(annotations, sample.objects.masks, strict=True):
        np.testing.assert_array_equal(mask, coco_mask.decode(annotation.rle))


def test_an_image_smaller_than_the_window_is_shown_whole() -> None:
    image, annotations = scene(40, 30)[0], [annotation_of(disc(40, 30, 20, 15, 6))]
    resize = TileResize(scale=2.0, tile_hw=(64, 64), overlap_px=8)
    sample = random_tile(image, annotations, resize, PLAIN, np.random.default_rng(0))
    assert sample.image.shape == (80, 60, 3)
    assert len(sample.objects.masks) == 1


def test_no_objects() -> None:
    image, _ = scene()
    resize = TileResize(scale=1.0, tile_hw=(64, 64), overlap_px=8)
    for sample in (
        random_tile(image, [], resize, TURNING, np.random.default_rng(0)),
        random_keep_ratio(
            image, [], KeepRatioResize(short_side=50, long_side=90), PLAIN, np.random.default_rng(0)
        ),
    ):
        assert sample.objects.masks.shape == (0, *sample.image.shape[:2])
        assert sample.objects.boxes_xyxy.shape == (0, 4)
        assert sample.objects.labels.dtype == np.int64


def test_one_image_of_one_pixel() -> None:
    image = np.full((1, 1, 3), 9, np.uint8)
    annotation = annotation_of(np.ones((1, 1), np.uint8))
    resize = TileResize(scale=1.0, tile_hw=(64, 64), overlap_px=8)
    sample = random_tile(image, [annotation], resize, TURNING, np.random.default_rng(0))
    assert sample.image.size >= 3 and len(sample.objects.masks) == 1


def test_a_window_takes_only_the_objects_that_show_in_it() -> None:
    _, annotations = scene()
    masks, labels = zip(*crop_masks(annotations, 0, 0, 40, 50), strict=True)
    assert labels == (0, 2)
    np.testing.assert_array_equal(masks[1], coco_mask.decode(annotations[2].rle)[:40, :50])
    assert list(crop_masks(annotations, 0, 90, 10, 10)) == []


def test_a_box_that_reaches_in_without_pixels_does_not_count() -> None:
    ring = np.zeros((40, 40), np.uint8)
    ring[0], ring[:, 0] = 1, 1
    assert list(crop_masks([annotation_of(ring)], 10, 10, 20, 20)) == []


def test_masks_that_vanish_are_dropped() -> None:
    full, empty = np.ones((5, 6), np.uint8), np.zeros((5, 6), np.uint8)
    sample = build_sample(np.zeros((5, 6, 3), np.uint8), [(empty, 4), (full, 2)])
    assert sample.objects.labels.tolist() == [2]
    assert sample.objects.boxes_xyxy.tolist() == [[0, 0, 6, 5]]


def test_the_memory_of_a_sample_grows_with_the_area_of_its_objects() -> None:
    masks = np.zeros((300, 200, 240), np.uint8)
    for place, mask in enumerate(masks):
        y, x = divmod(place, 20)
        mask[12 * y + 1 : 12 * y + 9, 12 * x + 1 : 12 * x + 7] = 1
    annotations = [annotation_of(mask) for mask in masks]
    resize = KeepRatioResize(short_side=200, long_side=240)
    config = AugmentConfig(flip=0.0, short_sides=(200, 200))
    image = np.zeros((200, 240, 3), np.uint8)
    sample = random_keep_ratio(image, annotations, resize, config, np.random.default_rng(0))
    found = sample.objects.masks
    np.testing.assert_array_equal(np.stack(list(found)), masks)
    assert found.nbytes == masks.sum() < masks.nbytes / 100


def test_serving_at_a_size_without_training_is_refused() -> None:
    config = AugmentConfig(short_sides=(640, 800))
    for side in (640, 800):
        check_sizes(KeepRatioResize(short_side=side, long_side=1333), config)
    for side in (192, 639, 801):
        with pytest.raises(ValueError, match=rf"640-800 px.*{side} px"):
            check_sizes(KeepRatioResize(short_side=side, long_side=1333), config)


@pytest.mark.parametrize("name", list_configs())
def test_every_configuration_is_served_at_a_size_of_its_training(name: str) -> None:
    config = get_config(name)
    if isinstance(config.input.resize, KeepRatioResize):
        check_sizes(config.input.resize, config.augment)


def test_photometric_changes_go_through_one_table() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)
    same = photometric(ramp, AugmentConfig(), np.random.default_rng(0))
    np.testing.assert_array_equal(same, ramp)
    inverted = photometric(ramp, AugmentConfig(invert=1.0), np.random.default_rng(0))
    np.testing.assert_array_equal(inverted, 255 - ramp)
    config = AugmentConfig(brightness=0.1, contrast=0.2, gamma=0.3)
    changed = photometric(ramp, config, np.random.default_rng(1))
    assert changed.dtype == np.uint8 and (changed != ramp).any()
    assert (np.diff(changed[..., 0].reshape(-1).astype(int)) >= 0).all()  # order is kept


RAMP = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)


def test_the_seed_of_a_configuration_without_the_new_changes_gives_what_it_gave() -> None:
    rng, same = np.random.default_rng(7), np.random.default_rng(7)
    photometric(RAMP, AugmentConfig(brightness=0.1, invert=0.5), rng)
    for bounds in ((0, 0), (0, 0), (-0.1, 0.1)):
        same.uniform(*bounds)
    same.random()
    assert rng.bit_generator.state == same.bit_generator.state


def test_few_levels_remain_in_half_of_the_images() -> None:
    config = AugmentConfig(levels=12)
    counts = [
        len(np.unique(photometric(RAMP, config, np.random.default_rng(i)))) for i in range(200)
    ]
    assert min(counts) >= 12 and min(counts) < 40
    assert 70 <= counts.count(256) <= 130


def test_stain_changes_the_channels_of_colour_images_alone() -> None:
    config = AugmentConfig(stain=0.3)
    grey = photometric(RAMP, config, np.random.default_rng(0))
    np.testing.assert_array_equal(grey, RAMP)
    colour = RAMP.copy()
    colour[0, 0, 0] = 200
    changed = photometric(colour, config, np.random.default_rng(0)).astype(int)
    assert (changed[8, :, 0] != changed[8, :, 1]).any()
    np.testing.assert_array_equal(changed[-1, -1], [255] * 3)  # black and white stay


def test_noise_has_at_most_its_standard_deviation_and_keeps_grey_images_grey() -> None:
    image = np.full((64, 64, 3), 128, np.uint8)
    deviations = []
    for i in range(60):
        noisy = photometric(image, AugmentConfig(noise=0.1), np.random.default_rng(i))
        np.testing.assert_array_equal(noisy[..., 0], noisy[..., 2])
        deviations.append(float(noisy[..., 0].std()))
        assert abs(noisy.mean() - 128) < 2
    assert 20 <= deviations.count(0.0) <= 40
    assert 15 < max(deviations) < 27
    image[0, 0, 0] = 0
    coloured = photometric(image, AugmentConfig(noise=0.1), np.random.default_rng(0))
    assert (coloured[..., 0] != coloured[..., 2]).any()


def test_blur_spreads_a_point_and_keeps_its_sum() -> None:
    image = np.zeros((33, 33, 3), np.uint8)
    image[12:21, 12:21] = 200
    blurred = [
        photometric(image, AugmentConfig(blur=2.0), np.random.default_rng(i)) for i in range(40)
    ]
    changed = [b for b in blurred if (b != image).any()]
    assert 10 <= len(changed) <= 30
    assert all(abs(b.sum() / image.sum() - 1) < 0.02 for b in changed)
    assert max(int((b[..., 0] > 0).sum()) for b in changed) > 200


@pytest.mark.parametrize(
    "changes", [{"levels": 1}, {"levels": 257}, {"noise": -0.1}, {"blur": float("nan")}]
)
def test_impossible_changes_are_refused(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=rf"augment\.{name} is"):
        AugmentConfig(**changes)


def test_the_same_generator_gives_the_same_sample() -> None:
    image, annotations = scene()
    resize = TileResize(scale=2.0, tile_hw=(64, 64), overlap_px=8)
    config = replace(TURNING, brightness=0.1, gamma=0.2, levels=9, stain=0.1, blur=1, noise=0.1)
    a, b = (
        random_tile(image, annotations, resize, config, np.random.default_rng(5)) for _ in range(2)
    )
    np.testing.assert_array_equal(a.image, b.image)
    np.testing.assert_array_equal(a.objects.masks, b.objects.masks)
