"""The options of solo-predict that say how results are written."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from pipeline.errors import WriteError
from pipeline.writers import FORMATS, choose_writer
from service.errors import StartupError
from service.predict.documents import DocumentPlan
from service.predict.outputs import Outputs, check_outputs

RESULTS = "results"
"""The format that is not one of `FORMATS`: a list of COCO results."""
RUN_FORMATS = (RESULTS, "coco", "coco-polygons")
"""Formats with run lengths of the whole image: of 2^32 px and more they exceed 32 bits."""
_START_BYTES = 60


def _distance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a distance")
    return value


def add_format_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument
    add(
        "--format",
        choices=(RESULTS, *FORMATS),
        default=RESULTS,
        help=f"{RESULTS}: COCO results, a list; see docs/formats.md (default: {RESULTS})",
    )
    add(
        "--simplify-px",
        type=_distance,
        default=0.0,
        metavar="PX",
        help="outlines of the format may be off so far (default: 0, exact)",
    )
    add("--copy-images", action="store_true", help="the folder of a format gets the images too")


def build_plan(arguments: argparse.Namespace) -> DocumentPlan | None:
    """How the results are written; None for COCO results.

    Raises:
        StartupError: The format cannot be written, or not with the other options.
    """
    if arguments.format == RESULTS:
        if arguments.simplify_px or arguments.copy_images:
            raise StartupError("--simplify-px and --copy-images need a --format")
        return None
    try:
        chosen = choose_writer(arguments.format, arguments.simplify_px)
    except WriteError as error:
        raise StartupError(f"--format: {error}") from error
    plan = DocumentPlan(
        format=chosen,
        simplify_px=arguments.simplify_px,
        um_per_px=arguments.um_per_px,
        copy_images=arguments.copy_images,
    )
    if plan.copy_images and not plan.is_folder:
        raise StartupError(f"--copy-images: --format {chosen.name} writes one file, not a folder")
    return plan


def choose_outputs(arguments: argparse.Namespace, plan: DocumentPlan | None) -> Outputs:
    """The outputs; `--out` is named after the format if it is not given."""
    if plan is None:
        arguments.out = arguments.out or Path("results.json")
        return check_outputs(arguments.out, arguments.overlays)
    if plan.is_folder:
        arguments.out = arguments.out or Path("results")
        plan.check_folder(arguments.out)
        return check_outputs(arguments.out, arguments.overlays, None)
    arguments.out = arguments.out or Path(f"results{plan.format.suffix}")
    return check_outputs(arguments.out, arguments.overlays, (plan.start[:_START_BYTES],))
