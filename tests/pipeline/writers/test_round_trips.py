"""What is written, training reads as the same masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.model_config import ClassSpec
from pipeline.overlaps import resolve_overlaps
from pipeline.writers import FORMATS, Page, name_files
from tests.support.found import NAMES, Mask, build_page, to_mask
from training.data.formats import open_dataset

CLASSES = tuple(ClassSpec(category_id=n, name=name.strip()) for n, name in enumerate(NAMES, 3))
EXACT = ("coco", "coco-polygons", "yolo", "labelme", "cvat")
FILES = ("ä & 'b', c.png", "a.png", "deep/er/a.png", "empty.png")


def build_pages() -> list[Page]:
    sizes = [(40, 50), (31, 64), (64, 31), (16, 16)]
    return [
        build_page(count, hw, name=name, classes=CLASSES)
        for count, hw, name in zip((20, 1, 6, 0), sizes, FILES, strict=True)
    ]


def write(name: str, root: Path, pages: list[Page]) -> None:
    chosen = FORMATS[name]
    parts = [chosen.encode(page) for page in pages]
    stems = name_files(page.name for page in pages)
    for page, stem in zip(pages, stems, strict=True):
        path = root / "images" / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", page.image_hw[::-1]).save(path)
    if chosen.join is not None:
        document = b"".join(chosen.join(CLASSES, enumerate(parts, 1)))
        (root / f"found{chosen.suffix}").write_bytes(document)
        return
    for stem, part in zip(stems, parts, strict=True):
        path = root / chosen.folder / f"{stem}{chosen.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(part)
    for file, data in chosen.add_files(CLASSES).items():
        (root / file).write_bytes(data)


def read(root: Path) -> dict[str, list[tuple[str, Mask]]]:
    """Class name and mask of every object, by file name."""
    content = open_dataset(root, "")
    names = {category["id"]: category["name"] for category in content.categories}
    images = {image["id"]: image for image in content.images}
    found: dict[str, list[tuple[str, Mask]]] = {}
    for image in images.values():
        file = str(image["file_name"]).removeprefix("images/")
        found[file] = []
    for annotation in content.annotations or ():
        image, segmentation = images[annotation["image_id"]], annotation["segmentation"]
        if isinstance(segmentation, list):
            drawn = coco_mask.frPyObjects(segmentation, image["height"], image["width"])
            segmentation = coco_mask.merge(drawn)
        mask = np.asarray(coco_mask.decode(segmentation)).astype(bool)
        file = str(image["file_name"]).removeprefix("images/")
        found[file].append((names[annotation["category_id"]], mask))
    return found


@pytest.mark.parametrize("name", EXACT)
def test_training_reads_what_was_written(tmp_path: Path, name: str) -> None:
    pages = build_pages()
    write(name, tmp_path, pages)
    found = read(tmp_path)
    assert set(found) == set(FILES)
    for page in pages:
        objects = found[page.name]
        assert len(objects) == len(page.instances)
        for (category, mask), instance in zip(objects, page.instances, strict=True):
            assert category == CLASSES[instance.label].name
            np.testing.assert_array_equal(mask, to_mask(instance))


@pytest.mark.parametrize("name", ["labels", "ome-tiff"])
def test_training_reads_label_images(tmp_path: Path, name: str) -> None:
    pages = build_pages()
    write(name, tmp_path, pages)
    found = read(tmp_path)
    assert set(found) == set(FILES)
    for page in pages:
        left = resolve_overlaps(page.instances)
        assert len(found[page.name]) == len(left)
        for (_, mask), instance in zip(found[page.name], left, strict=True):
            np.testing.assert_array_equal(mask, to_mask(instance))
