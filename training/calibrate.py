"""python -m training.calibrate: makes a model's scores say how often an instance is right.

Compares the instances that a model finds on a labelled split with its objects and prints the
reliability curve before and after: "after" is of images that the map was not fitted to. With
--write the map of all images is stored in config.json; answers then have calibrated scores, and
score thresholds mean them. The default threshold is mapped too, so answers keep their instances;
the order of the instances, and so the AP, stays.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.calibration import (
    Group,
    calibration_error,
    fit_calibration,
    group_scores,
    to_network,
    to_reported,
)
from pipeline.mask_iou import measure_iou
from pipeline.model_config import Calibration
from pipeline.repository_config import RepositoryConfig
from service.models.repository import edit_config
from training.data.coco import CocoDataset, open_split
from training.data.formats import add_format_options
from training.data.records import ImageId
from training.matching import match, rank
from training.predictors import RepositoryPredictor, Result, predict

MATCH_IOU = 0.5
Verdict = tuple[float, bool]
"""The score of an instance, and whether it is an object."""


def judge(results: Sequence[Result], annotations: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Matches the instances of an image with its objects, one to one and best first.

    Args:
        results: COCO results.
        annotations: COCO annotations; crowds are no objects.

    Returns:
        For each instance; right are those with IoU >= `MATCH_IOU` with an object of their class
        that no better instance has.
    """
    objects = [a for a in annotations if not a.get("iscrowd")]
    ranked = rank(results)
    matched = match(measure_iou(ranked, objects), MATCH_IOU)
    return [(float(r["score"]), j is not None) for r, j in zip(ranked, matched, strict=True)]


def judge_all(data: CocoDataset, results: Sequence[Result]) -> dict[ImageId, list[Verdict]]:
    """`judge` of every image of a split."""
    found: dict[ImageId, list[Result]] = {record.image_id: [] for record in data.records}
    wanted: dict[ImageId, list[Mapping[str, Any]]] = {image_id: [] for image_id in found}
    for result in results:
        found[result["image_id"]].append(result)
    for annotation in data.truth()["annotations"]:
        wanted[annotation["image_id"]].append(annotation)
    return {image_id: judge(found[image_id], wanted[image_id]) for image_id in found}


def cross_check(verdicts: Mapping[ImageId, Sequence[Verdict]]) -> list[Verdict]:
    """Calibrated scores of both halves of the images, each by the map of the other half."""
    images = list(verdicts.values())
    halves = [[v for image in images[start::2] for v in image] for start in (0, 1)]
    if not all(halves):
        raise ValueError("there are too few images with instances to check a calibration")
    checked = []
    for own, other in (halves, halves[::-1]):
        fitted = _fit(other)
        checked += [(to_reported(fitted, score), right) for score, right in own]
    return checked


def _fit(verdicts: Sequence[Verdict]) -> Calibration:
    return fit_calibration(*_columns(verdicts))


def _columns(verdicts: Sequence[Verdict]) -> tuple[list[float], list[bool]]:
    return [score for score, _ in verdicts], [right for _, right in verdicts]


def print_curve(title: str, groups: Sequence[Group]) -> None:
    """The reliability curve as a table."""
    print(f"{title}: mean difference {calibration_error(groups):.3f}")
    for score, share, count in groups:
        print(f"  score {score:.3f}  right {share:.3f}  of {count}")


def write_calibration(folder: Path, version: int, calibration: Calibration) -> None:
    """Stores the map in config.json of a model's folder; answers keep their instances.

    The default score threshold becomes the reported score of the network's score that it was.

    Raises:
        OSError, ValueError: It cannot be changed.
    """

    def change(content: dict[str, Any], repository: RepositoryConfig) -> None:
        config = repository.for_version(version)
        network = to_network(config.calibration, config.postprocess.score_threshold)
        postprocess = config.postprocess.model_dump(mode="json")
        entry = content["versions"][str(version)]
        entry["postprocess"] = {
            **postprocess,
            "score_threshold": to_reported(calibration, network),
        }
        entry["calibration"] = calibration.model_dump(mode="json")

    edit_config(folder, change)


def build_parser() -> argparse.ArgumentParser:
    """The command line of training.calibrate."""
    parser = argparse.ArgumentParser(prog="python -m training.calibrate", description=__doc__)
    parser.add_argument("model", type=Path, help="model_repo/<model> folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled images")
    add_format_options(parser)
    parser.add_argument("--split", default="val", help="name of the annotation file (default: val)")
    parser.add_argument("--version", type=int, help="version of the folder (default: last)")
    parser.add_argument("--max-dets", type=int, default=500, help="instances per image (500)")
    parser.add_argument("--write", action="store_true", help="store the map in config.json")
    return parser


def run(options: argparse.Namespace) -> None:
    """Measures and prints, and with `--write` stores.

    Raises:
        OSError, ValueError, RuntimeError: It is not possible; the message says why.
    """
    data = open_split(options, options.split)
    predictor = RepositoryPredictor(options.model, options.version, max_dets=options.max_dets)
    loaded = predictor.loaded
    predictor.loaded = replace(
        loaded, config=loaded.config.model_copy(update={"calibration": None})
    )
    verdicts = judge_all(data, predict(data, predictor, progress=True))
    flat = [verdict for image in verdicts.values() for verdict in image]
    fitted = _fit(flat)
    print_curve("network", group_scores(*_columns(flat)))
    print_curve(
        "calibrated, other half of the images", group_scores(*_columns(cross_check(verdicts)))
    )
    print(fitted.model_dump_json())
    if options.write:
        write_calibration(options.model, loaded.version, fitted)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
