"""The command solo-eval: AP, F1, AJI and counts of a checkpoint, a folder or a running server."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from training import distributed
from training.data.coco import open_split
from training.data.formats import add_format_options
from training.data.records import DatasetError
from training.data.validate import check_classes
from training.error_analysis import with_ground_truth_masks
from training.evaluation_report import EvaluationReport, evaluate_results, group_images
from training.instance_metrics import SIZES_PX2
from training.predictors import build_predictor, predict
from training.reproduce import (
    IMAGES_FILE,
    TOLERANCE,
    check_data,
    compare_measured,
    describe_measured,
    find_measured,
    record,
)
from training.run_folder import require_writable

MAX_DETS = 100
"""COCO's."""


def build_parser() -> argparse.ArgumentParser:
    """The command line of solo-eval."""
    parser = argparse.ArgumentParser(
        prog="solo-eval",
        description="COCO mask AP, F1, AJI and counts of a model on a labelled split. A split "
        "without annotations (COCO's test-dev as downloaded) is not scored; --results writes the "
        "file for COCO's evaluation server, detections_test-dev2017_NAME_results.json, which is "
        "uploaded zipped.",
        epilog="Examples: solo-eval runs/nuclei/best.pt --data datasets/nuclei --max-dets 500 | "
        "solo-eval model_repo/nuclei --data ... | solo-eval http://localhost:8000 --data ... | "
        "torchrun --nproc-per-node 8 -m training.evaluate best.pt --device cuda --data "
        "datasets/coco --split test-dev --results detections_test-dev2017_solo_results.json",
    )
    parser.add_argument("model", help="checkpoint file, model_repo/<model> folder or server URL")
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled images")
    add_format_options(parser)
    parser.add_argument("--split", default="val", help="name of the annotation file (default: val)")
    parser.add_argument(
        "--max-dets",
        type=int,
        help=f"detections per image ({MAX_DETS}; with --record the model's max_instances)",
    )
    parser.add_argument(
        "--device", default="cpu", help="device for a checkpoint: cpu, cuda, ... (cpu)"
    )
    parser.add_argument("--model-name", help="model of the server (default: the server's default)")
    parser.add_argument("--version", type=int, help="version of the folder (default: last)")
    parser.add_argument(
        "--group-by",
        metavar="FIELD[:PATTERN]",
        help="also score the images of each value of this field of the images, or of what a "
        "regular expression finds in it: 'file_name:^[a-z]+'",
    )
    parser.add_argument(
        "--score-threshold",
        type=float,
        help="least score of an instance for all metrics but the AP (default: the model's)",
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=SIZES_PX2,
        metavar="PX2",
        help="mask areas between which the recall is reported (default: 64 256 1024)",
    )
    parser.add_argument(
        "--ground-truth-masks",
        action="store_true",
        help="score the results with each mask replaced by the ground-truth mask of the largest "
        "IoU (error analysis of later versions of the paper)",
    )
    parser.add_argument("--results", type=Path, help="file to write the COCO results to")
    parser.add_argument("--json", type=Path, help="file to write the metrics to")
    parser.add_argument("--per-image", type=Path, help="CSV file to write each image's scores to")
    _add_published(parser.add_argument_group("published versions, model_repo/<model>[/<version>]"))
    return parser


def _add_published(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--record",
        action="store_true",
        help=f"store the numbers in config.json and those of each image in {IMAGES_FILE}",
    )
    group.add_argument(
        "--reproduce",
        action="store_true",
        help="measure as the version's recorded evaluation did, and fail if the data or a number "
        "differ",
    )
    group.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help=f"greatest difference that --reproduce accepts ({TOLERANCE:g})",
    )


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuses files that could not be written after the prediction."""
    for path in (options.results, options.json, options.per_image):
        if path is not None and (not path.parent.is_dir() or path.is_dir()):
            reason = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise ValueError(f"{path} cannot be written: {reason}")
        if path is not None:
            require_writable(path.parent)


def run(options: argparse.Namespace) -> None:
    """Predicts, scores if there are annotations, and writes the files of the options."""
    _check_numbers(options)
    stated = _prepare_published(options)
    data = open_split(options, options.split)
    if stated is not None:
        check_data(stated, data)
    if not data.labelled and not options.results:
        raise DatasetError(
            f"{data.annotation_file} has no annotations to score; --results FILE writes the results"
        )
    _check_outputs(options)
    groups = group_images(data, options.group_by)
    distributed.warn("solo-eval", data.report.warnings())
    predictor = build_predictor(
        options.model, options.model_name, options.version, options.max_dets, options.device
    )
    check_classes(data.checked, predictor.classes, f"the model {options.model}")
    results = predict(data, predictor, progress=True)
    if not distributed.is_main():
        return
    if options.results:
        options.results.write_text(json.dumps(results))
    if not data.labelled:
        print(f"{len(results)} results: {options.results} (not scored, there are no annotations)")
        return
    if options.ground_truth_masks:
        results = with_ground_truth_masks(results, data)
    threshold = options.score_threshold
    report = evaluate_results(
        data,
        results,
        max_dets=options.max_dets,
        score_threshold=predictor.score_threshold if threshold is None else threshold,
        groups=groups,
        sizes_px2=sorted(set(options.sizes)),
    )
    print("\n".join(report.describe()))
    _write(options, report)
    if options.record or stated is not None:
        measured = describe_measured(report, data, options.split, options.max_dets)
        if options.record:
            record(Path(options.model), options.version, measured, report.format_images())
        if stated is not None:
            print("\n".join(compare_measured(stated, measured, options.tolerance)))


def _write(options: argparse.Namespace, report: EvaluationReport) -> None:
    if options.json:
        options.json.write_text(json.dumps(report.rows, indent=2))
    if options.per_image:
        options.per_image.write_text(report.format_images(), encoding="utf-8")


def _prepare_published(options: argparse.Namespace) -> dict[str, Any] | None:
    """Sets the options for a published version.

    Returns:
        What the version states of its evaluation, with `--reproduce`.

    Raises:
        ValueError: `--reproduce` or `--record` names no published version, or states nothing.
    """
    path = Path(options.model)
    if path.name.isdecimal() and (path.parent / "config.json").is_file():
        path, options.version = path.parent, int(path.name)
        options.model = str(path)
    flag = "--reproduce" if options.reproduce else "--record" if options.record else None
    stated = None
    if flag is not None:
        if not (path / "config.json").is_file():
            raise ValueError(f"{flag} needs a folder model_repo/<model>, {options.model!r} is none")
        if options.ground_truth_masks:
            raise ValueError(f"{flag} is not possible with --ground-truth-masks")
        from service.models.repository import read_config

        config = read_config(path, options.version)
        options.version = config.version
        options.max_dets = options.max_dets or config.postprocess.max_instances
        if options.reproduce:
            stated = find_measured(config)
            for name in ("split", "max_dets", "score_threshold"):
                setattr(options, name, stated[name])
    options.max_dets = options.max_dets or MAX_DETS
    return stated


def _check_numbers(options: argparse.Namespace) -> None:
    threshold, sizes = options.score_threshold, options.sizes
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"--score-threshold {threshold} is not in 0..1")
    if min(sizes) < 1:
        raise ValueError(f"--sizes {' '.join(map(str, sizes))}: areas are at least 1 px2")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        with distributed.joined(options.device) as options.device:
            run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"solo-eval: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
