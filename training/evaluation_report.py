"""The numbers of solo-eval: of all images, of each group of them, and of each image."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.mask_iou import Entry
from training.coco_metrics import describe_metrics, score_masks
from training.data.coco import CocoDataset
from training.data.records import DatasetError, ImageId
from training.instance_metrics import SIZES_PX2, ImageScore, score_images, summarise

ALL = "all"
Row = dict[str, Any]


@dataclass(frozen=True)
class EvaluationReport:
    """What the results of a split are worth.

    Attributes:
        score_threshold: That of all metrics but the AP.
        rows: By group, `ALL` first: the metrics of `mask_ap` and `summarise`; `classes` has AP
            and AP50 of each class by name.
        images: Scores of each image.
        names: File names of the images, in the same order.
    """

    score_threshold: float
    rows: dict[str, Row]
    images: Sequence[ImageScore]
    names: Sequence[str]

    def describe(self) -> list[str]:
        """Lines for people."""
        lines = [f"AP of all ranked instances, the rest at scores from {self.score_threshold:g}:"]
        for name, row in self.rows.items():
            numbers = {key: value for key, value in row.items() if key != "classes"}
            lines.append(f"{name:>20} " + describe_metrics(numbers))
        classes = self.rows[ALL]["classes"]
        if len(classes) > 1:
            width = max(map(len, classes))
            lines.append("by class:")
            lines += [
                f"{name:>{max(width, 20)}} " + describe_metrics(metrics)
                for name, metrics in classes.items()
            ]
        return lines

    def describe_images(self) -> list[Row]:
        """One row an image."""
        return [
            {
                "file_name": name,
                "labelled": score.labelled,
                "found": score.found,
                **{key: round(summarise([score])[key], 4) for key in ("F1_50", "F1_70", "AJI")},
            }
            for name, score in zip(self.names, self.images, strict=True)
        ]

    def format_images(self) -> str:
        """`describe_images` as CSV."""
        rows = self.describe_images()
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else ["file_name"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def evaluate_results(
    data: CocoDataset,
    results: Sequence[Entry],
    *,
    max_dets: int,
    score_threshold: float,
    groups: Mapping[str, Collection[ImageId]] | None = None,
    sizes_px2: Sequence[int] = SIZES_PX2,
) -> EvaluationReport:
    """Scores COCO results of a split, at every score for the AP.

    Args:
        data: The split.
        results: Of all scores.
        max_dets: Instances an image for the AP.
        score_threshold: For the other metrics.
        groups: Ids of images by name; each gets a row.
        sizes_px2: See `summarise`.
    """
    truth = data.truth()
    images = score_images(truth, results, score_threshold)
    rows: dict[str, Row] = {}
    for name, ids in {ALL: None, **dict(sorted((groups or {}).items()))}.items():
        chosen = images if ids is None else [s for s in images if s.image_id in set(ids)]
        metrics, classes = score_masks(truth, results, max_dets=max_dets, image_ids=ids)
        rows[name] = {**metrics, **summarise(chosen, sizes_px2), "classes": classes}
    return EvaluationReport(score_threshold, rows, images, [r.file_name for r in data.records])


def group_images(data: CocoDataset, rule: str | None) -> dict[str, list[ImageId]]:
    """Ids of the images by a field of the annotation file.

    Args:
        data: The split.
        rule: `FIELD`, or `FIELD:PATTERN`, whose first match (its first group, if it has one) in
            the field's text names the group; None: there are no groups.

    Raises:
        DatasetError: An image has no such field, or the pattern is wrong or has no match there.
    """
    field, has_pattern, text = (rule or "").partition(":")
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise DatasetError(f"the pattern {text!r} to group by is wrong: {error}") from error
    groups: dict[str, list[ImageId]] = {}
    for record, fields in zip(data.records, data.image_fields if field else (), strict=False):
        if field not in fields:
            raise DatasetError(f"image {record.image_id} has no field {field!r} to group by")
        name = str(fields[field])
        if has_pattern:
            found = pattern.search(name)
            if found is None:
                raise DatasetError(f"image {record.image_id}: {text!r} matches nothing in {name!r}")
            name = found[1] if pattern.groups and found[1] is not None else found[0]
        groups.setdefault(name, []).append(record.image_id)
    if ALL in groups:
        raise DatasetError(f"a group to report is called {ALL!r}, as the row of all images")
    return groups
