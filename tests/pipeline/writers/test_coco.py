from __future__ import annotations

import contextlib
import io
import json
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from pipeline.model_config import ClassSpec
from pipeline.writers import FORMATS, Page
from tests.support.found import CLASSES, NAMES, build_page, to_mask


def write(name: str, *pages: Page) -> dict[str, Any]:
    chosen = FORMATS[name]
    assert chosen.join is not None
    parts = ((10 * n, chosen.encode(page)) for n, page in enumerate(pages, 1))
    content: dict[str, Any] = json.loads(b"".join(chosen.join(CLASSES, parts)))
    return content


def load(content: dict[str, Any]) -> COCO:
    loaded = COCO()
    loaded.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        loaded.createIndex()
    return loaded


@pytest.mark.parametrize("name", ["coco", "coco-polygons"])
def test_pycocotools_reads_the_same_masks(name: str) -> None:
    pages = [build_page(12), build_page(0, name="empty.png"), build_page(2, (20, 30))]
    loaded = load(write(name, *pages))
    assert sorted(loaded.imgs) == [10, 20, 30]
    for image_id, page in zip((10, 20, 30), pages, strict=True):
        annotations = loaded.loadAnns(loaded.getAnnIds(imgIds=[image_id]))
        assert len(annotations) == len(page.instances)
        for annotation, instance in zip(annotations, page.instances, strict=True):
            np.testing.assert_array_equal(loaded.annToMask(annotation), to_mask(instance))
            assert annotation["category_id"] == CLASSES[instance.label].category_id
            assert annotation["score"] == round(instance.score, 6)
            assert annotation["area"] == instance.area
    ids = [annotation["id"] for annotation in loaded.dataset["annotations"]]
    assert ids == list(range(1, 15))


def test_only_masks_with_holes_stay_run_lengths() -> None:
    single, ring = write("coco-polygons", build_page(2))["annotations"]
    assert isinstance(single["segmentation"], list) and isinstance(ring["segmentation"], dict)


def test_polygons_are_simplified_on_request() -> None:
    exact, rough = (
        write("coco-polygons", build_page(9, simplify_px=px))["annotations"] for px in (0, 2)
    )
    assert len(json.dumps(rough)) < 0.8 * len(json.dumps(exact))


def test_nothing_at_all_is_a_data_set_too() -> None:
    content = write("coco")
    assert content["images"] == content["annotations"] == []
    assert [c["name"] for c in content["categories"]] == ["cell", "other, one"]


def test_any_name_comes_back() -> None:
    chosen = FORMATS["coco"]
    assert chosen.join is not None
    classes = tuple(ClassSpec(category_id=n, name=name) for n, name in enumerate(NAMES))
    page = chosen.encode(build_page(name=NAMES[2]))
    content = json.loads(b"".join(chosen.join(classes, [(1, page)])))
    assert [c["name"] for c in content["categories"]] == list(NAMES)
    assert content["images"][0]["file_name"] == NAMES[2]
