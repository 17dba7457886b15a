"""The numbers that a published version states of itself: recorded, and checked again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.model_config import ModelConfig
from service.files import replace_text
from training.data.coco import CocoDataset
from training.data.records import DatasetError
from training.evaluation_report import ALL, EvaluationReport
from training.provenance import describe_data

TOLERANCE = 0.002
"""Of a metric; engines and processors round otherwise, which moves scores across thresholds."""
IMAGES_FILE = "evaluation.csv"
"""Scores of each image, in the folder of a version."""


class NotReproduced(ValueError):
    """A version's numbers are not those that it states; the message lists the differences."""


def describe_measured(
    report: EvaluationReport, data: CocoDataset, split: str, max_dets: int
) -> Any:
    """The section `measured` of a version's provenance."""
    row = report.rows[ALL]
    metrics = dict(row)
    classes = {name: _rounded(of_class) for name, of_class in metrics.pop("classes").items()}
    return {
        **describe_data(data, split),
        "max_dets": max_dets,
        "score_threshold": report.score_threshold,
        **_rounded(metrics),
        **({"classes": classes} if len(classes) > 1 else {}),
    }


def _rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in metrics.items()}


def find_measured(config: ModelConfig) -> dict[str, Any]:
    """The section `measured` of a version, with the fields that a repetition needs.

    Raises:
        DatasetError: There is none, or it is of an older format.
    """
    measured = config.provenance.get("measured")
    needed = ("split", "sha256", "max_dets", "score_threshold")
    missing = [name for name in needed if not isinstance(measured, dict) or name not in measured]
    if not isinstance(measured, dict) or missing:
        raise DatasetError(
            f"version {config.version} of {config.name} states no {', '.join(missing)} of its "
            "evaluation; --record stores them"
        )
    return measured


def check_data(measured: Mapping[str, Any], data: CocoDataset) -> None:
    """Compares the hash of a split with that of the evaluation.

    Raises:
        NotReproduced: They differ.
    """
    found = describe_data(data, str(measured["split"]))
    if found["sha256"] != measured["sha256"]:
        known = {name: measured.get(name) for name in ("images", "objects", "sha256")}
        raise NotReproduced(
            f"the data differ from those of the evaluation: it had {known}, here are "
            f"{ {name: found[name] for name in known} }"
        )


def compare_measured(
    measured: Mapping[str, Any], found: Mapping[str, Any], tolerance: float = TOLERANCE
) -> list[str]:
    """Lines that compare each metric.

    Args:
        measured: Stated.
        found: Of `describe_measured`, measured now.
        tolerance: Greatest difference; of counts, relative to the stated one.

    Raises:
        NotReproduced: A metric is missing or differs by more.
    """
    skipped = {"split", "sha256", "max_dets", "score_threshold", "images", "objects", "classes"}
    stated = _metrics(measured, skipped)
    again = _metrics(found, skipped)
    lines, wrong = [], []
    for name in sorted({*stated, *again}, key=list({**again, **stated}).index):
        if name not in stated:
            continue  # added since by a newer version of the command
        value = again.get(name)
        bound = tolerance * max(1.0, abs(stated[name]))
        lines.append(f"{name:>20} stated {stated[name]:.4f}, found {_show(value)}")
        if value is None or not abs(value - stated[name]) <= bound:
            wrong.append(f"{name} {stated[name]:.4f} is {_show(value)}")
    if wrong or not stated:
        raise NotReproduced(
            f"not reproduced within {tolerance:g}: " + ("; ".join(wrong) or "no metric is stated")
        )
    return lines


def _metrics(section: Mapping[str, Any], skipped: set[str]) -> dict[str, float]:
    own = {name: value for name, value in section.items() if name not in skipped}
    classes = {
        f"{metric} of {name}": value
        for name, of_class in section.get("classes", {}).items()
        for metric, value in of_class.items()
    }
    return {name: float(value) for name, value in {**own, **classes}.items()}


def _show(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4f}"


def record(folder: Path, version: int, measured: Mapping[str, Any], images: str) -> None:
    """Stores an evaluation with a published version.

    Args:
        folder: The model's folder.
        version: The version.
        measured: Of `describe_measured`.
        images: Scores of each image, CSV.

    Raises:
        OSError, ValueError: It cannot be changed.
    """
    from service.models.repository import edit_config

    def change(content: dict[str, Any], _: object) -> None:
        entry = content["versions"][str(version)]
        entry.setdefault("provenance", {})["measured"] = dict(measured)

    replace_text(folder / str(version) / IMAGES_FILE, images)
    edit_config(folder, change)
