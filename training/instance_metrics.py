"""What biologists report beside the AP: F1, AJI, errors of counts, recall by object size.

They are of the instances that an answer has at one score threshold, the AP of all ranked ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipeline.mask_iou import Entry, measure_iou
from training.data.records import ImageId
from training.federated import ignore_unlabelled
from training.matching import match, rank

SIZES_PX2 = (64, 256, 1024)
"""Areas that separate the groups of `recall`."""
UNDEFINED = -1.0
"""Where a number has no meaning, as in COCO."""


@dataclass(frozen=True)
class ImageScore:
    """One image at one score threshold.

    Attributes:
        labelled: Number of objects.
        found: Number of instances, without those that lie in crowds.
        right_50, right_70: Instances matched with an object at this IoU, percent.
        aji: Aggregated Jaccard index (Kumar et al. 2017); 1 if there is neither an object nor an
            instance.
        areas: Mask area of each object, px.
        recalled: Whether each object is matched at IoU 0.5.
    """

    image_id: ImageId
    labelled: int
    found: int
    right_50: int
    right_70: int
    aji: float
    areas: tuple[int, ...]
    recalled: tuple[bool, ...]


def score_images(
    truth: Mapping[str, Any], results: Sequence[Entry], score_threshold: float
) -> list[ImageScore]:
    """Scores every image of a split, in the order of `truth`.

    Args:
        truth: As for `mask_ap`.
        results: COCO results with RLE.
        score_threshold: Results of a lower score are left out.
    """
    truth, results = ignore_unlabelled(truth, results)
    found: dict[ImageId, list[Entry]] = {image["id"]: [] for image in truth["images"]}
    objects: dict[ImageId, list[Entry]] = {image_id: [] for image_id in found}
    crowds: dict[ImageId, list[Entry]] = {image_id: [] for image_id in found}
    for result in results:
        if result["score"] >= score_threshold:
            found[result["image_id"]].append(result)
    for annotation in truth["annotations"]:
        kind = crowds if annotation.get("iscrowd") else objects
        kind[annotation["image_id"]].append(annotation)
    return [score_image(i, found[i], objects[i], crowds[i]) for i in found]


def score_image(
    image_id: ImageId,
    results: Sequence[Entry],
    objects: Sequence[Entry],
    crowds: Sequence[Entry] = (),
) -> ImageScore:
    """Scores one image; an instance without an object that lies half in a crowd does not count."""
    ranked = rank(results)
    iou = measure_iou(ranked, objects)
    matched = match(iou, 0.5)
    in_crowd = measure_iou(ranked, crowds, crowd=True).max(axis=1, initial=0) >= 0.5
    kept = [j is not None or not ignored for j, ignored in zip(matched, in_crowd, strict=True)]
    recalled = set(matched)
    areas = _areas(objects)
    return ImageScore(
        image_id,
        labelled=len(objects),
        found=sum(kept),
        right_50=sum(j is not None for j in matched),
        right_70=sum(j is not None for j in match(iou, 0.7)),
        aji=_aji(iou[kept], _areas(ranked)[kept], areas),
        areas=tuple(areas.tolist()),
        recalled=tuple(j in recalled for j in range(len(objects))),
    )


def _areas(entries: Sequence[Entry]) -> NDArray[np.int64]:
    """Mask pixels of each entry, whatever its field `area` says."""
    return np.array([coco_mask.area(dict(e["segmentation"])) for e in entries], np.int64)


def _aji(iou: NDArray[np.float64], found: NDArray[np.int64], areas: NDArray[np.int64]) -> float:
    """Aggregated Jaccard index.

    Args:
        iou: [N, M].
        found: Areas of the N instances, px.
        areas: Areas of the M objects, px.
    """
    both = np.rint(iou * np.add.outer(found, areas) / (1 + iou))
    intersection, union, used = 0.0, 0.0, np.zeros(len(found), np.bool_)
    for j, area in enumerate(areas):
        best = int(iou[:, j].argmax()) if len(found) else -1
        if best < 0 or iou[best, j] == 0:
            union += area
            continue
        used[best] = True
        intersection += both[best, j]
        union += area + found[best] - both[best, j]
    union += found[~used].sum()
    return float(intersection / union) if union else 1.0


def summarise(
    scores: Sequence[ImageScore], sizes_px2: Sequence[int] = SIZES_PX2
) -> dict[str, float]:
    """The metrics of some images.

    Returns:
        F1 and `DSB_50` = TP / (TP + FP + FN), the precision of the 2018 Data Science Bowl, of all
        instances together; AJI and `count_MAE` = |found - labelled|, means of the images;
        `count_ratio` = found / labelled; the recall at IoU 0.5 of objects by mask area, px2.
        Undefined ones are `UNDEFINED`.
    """
    labelled = sum(s.labelled for s in scores)
    found = sum(s.found for s in scores)
    right_50, right_70 = sum(s.right_50 for s in scores), sum(s.right_70 for s in scores)
    row = {
        "F1_50": _share(2 * right_50, labelled + found),
        "F1_70": _share(2 * right_70, labelled + found),
        "DSB_50": _share(right_50, labelled + found - right_50),
        "AJI": _share(sum(s.aji for s in scores), len(scores)),
        "count_MAE": _share(sum(abs(s.found - s.labelled) for s in scores), len(scores)),
        "count_ratio": _share(found, labelled),
    }
    areas = np.array([area for s in scores for area in s.areas], np.int64)
    recalled = np.array([known for s in scores for known in s.recalled], np.bool_)
    for low, high in pairwise([0, *sizes_px2, None]):
        name = f"recall_{low}" + ("_up" if high is None else f"_{high}")
        inside = (areas >= (low or 0)) & (areas < (np.inf if high is None else high))
        row[name] = _share(int(recalled[inside].sum()), int(inside.sum()))
    return row


def _share(part: float, whole: float) -> float:
    return part / whole if whole else UNDEFINED
