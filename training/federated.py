"""Evaluation of federated labels as in LVIS (arXiv 1908.03195, section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pycocotools import mask as coco_mask

from training.data.federated import NEGATIVES, NOT_EXHAUSTIVE

Entry = Mapping[str, Any]


def ignore_unlabelled(
    truth: Mapping[str, Any], results: Sequence[Entry]
) -> tuple[Mapping[str, Any], Sequence[Entry]]:
    """Ground truth and results for COCO's metric, which knows no federated labels.

    In an image with `neg_category_ids`, results count only for the classes that are annotated
    there or in this list. Of the classes in `not_exhaustive_category_ids`, a result without a match
    is ignored: it lies in a crowd that covers the image.

    Args:
        truth: COCO ground truth; it is not changed. Images without these fields stay as they are.
        results: COCO results.
    """
    if not any(NEGATIVES in i or NOT_EXHAUSTIVE in i for i in truth["images"]):
        return truth, results
    judged: dict[int | str, set[int]] = {
        image["id"]: set(image[NEGATIVES]) for image in truth["images"] if NEGATIVES in image
    }
    for annotation in truth["annotations"]:
        if annotation["image_id"] in judged:
            judged[annotation["image_id"]].add(annotation["category_id"])
    kept = [
        result
        for result in results
        if result["image_id"] not in judged or result["category_id"] in judged[result["image_id"]]
    ]
    first = 1 + max((annotation["id"] for annotation in truth["annotations"]), default=0)
    crowds = [{"id": first + n, **crowd} for n, crowd in enumerate(_crowds(truth["images"]))]
    return {**truth, "annotations": [*truth["annotations"], *crowds]}, kept


def _crowds(images: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    """A crowd of the size of the image for each class that is not labelled exhaustively."""
    for image in images:
        height, width = image["height"], image["width"]
        whole = {"size": [height, width], "counts": [0, height * width]}
        for category_id in image.get(NOT_EXHAUSTIVE, ()):
            yield {
                "image_id": image["id"],
                "category_id": category_id,
                "segmentation": coco_mask.frPyObjects(whole, height, width),
                "bbox": [0, 0, width, height],
                "area": height * width,
                "iscrowd": 1,
            }
