"""What is said of the size of a validation split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny import annotation_of, disc, write_image, write_split
from training.data.coco import CocoDataset
from training.data.validation import (
    FEW_IMAGES,
    FEW_OBJECTS,
    describe_validation,
    doubt_validation,
)

SIDE = 24


def build(root: Path, images: int, objects: int, classes: tuple[int, ...] = (3, 7)) -> CocoDataset:
    """A split with the objects spread over the images and over the classes."""
    names = [f"{n}.png" for n in range(images)]
    for name in names:
        write_image(root / "images" / name, np.zeros((SIDE, SIDE, 3), np.uint8))
    mask = disc(SIDE, SIDE, 9, 9, 5)
    annotations = [
        annotation_of(mask, n % images + 1, classes[n % len(classes)]) for n in range(objects)
    ]
    write_split(root, "val", [(name, SIDE, SIDE) for name in names], annotations)
    return CocoDataset(root, "val")


@pytest.mark.parametrize(
    ("images", "objects", "small"),
    [
        (1, 2, True),
        (FEW_IMAGES, FEW_OBJECTS - 1, True),
        (FEW_IMAGES - 1, FEW_OBJECTS, True),
        (FEW_IMAGES, FEW_OBJECTS, False),
    ],
)
def test_few_images_or_objects_are_doubted(
    tmp_path: Path, images: int, objects: int, small: bool
) -> None:
    val = build(tmp_path, images, objects)
    text = describe_validation(val)
    assert text.startswith(f"validation: {images} images with {objects} objects")
    assert ("that is few" in text) is small
    assert doubt_validation(val) == (text if small else None)


def test_classes_without_an_object_are_named(tmp_path: Path) -> None:
    text = describe_validation(build(tmp_path / "one", 2, 3, classes=(7,)))
    assert "2 images with 3 objects, none of disc, which the AP leaves out; that is few" in text
    assert ", none of" not in describe_validation(build(tmp_path / "none", 2, 0))
