"""The options of solo-predict, and what they mean for the model, the engine and the journal."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.formats.planes import MAXIMUM
from pipeline.model_config import Precision
from pipeline.postprocess import Overlaps
from pipeline.scale import Scale
from pipeline.types import Window
from service.engines.base import BackendOptions
from service.jobs.files import as_text
from service.predict.output_options import add_format_options
from service.work.request import RequestOptions

EPILOG = """\
examples:
  solo-predict images/ --out results.json                      with a model of ./model_repo
  solo-predict 'scans/*.png' --overlays drawn/ --score-threshold 0.3
  solo-predict images/ --url http://localhost:8000             through a running server
  solo-predict images/ --format geojson --out qupath/          a GeoJSON file for each image
  solo-predict images/ --annotations val.json                  image ids from a COCO file
  solo-predict s3://bucket/images --ray --ray-address auto     on a Ray cluster

Without --annotations the image ids are 1, 2, 3 ... in the order of the files. Each result also has
its file_name: the path below the deepest folder that holds all inputs. Images that fail are listed
at the end, and the exit status is then 1. Entries of folders that are left out are listed at the
start: hidden ones, those without an image's suffix, and further names of the same file.

Each image's results are stored in OUT.partial at once, and --out is written at the end. If the run
is interrupted in any way, the same command continues it; after failures it retries only the images
that failed.
"""
_ASKED = (
    *("score_threshold", "max_instances", "overlaps"),
    *("object_size_px", "um_per_px", "scale"),
    *("channel", "z", "t"),
)
"""Options that are parameters of a request, too."""


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..1")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _number(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _plane(text: str) -> int | str:
    return text if text == MAXIMUM else _number(text)


def _region(text: str) -> Window:
    try:
        x, y, width, height = map(int, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not X,Y,WIDTH,HEIGHT in px") from error
    if min(x, y) < 0 or min(width, height) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a region: X,Y,WIDTH,HEIGHT in px")
    return Window(y, x, height, width)


def _size(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a size")
    return value


def _share(text: str) -> float:
    value = float(text)
    if value < 0 or (value > 1 and not value.is_integer()):
        raise argparse.ArgumentTypeError(
            f"{text} is neither a fraction of one GPU nor a whole number"
        )
    return value


def build_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="solo-predict",
        description="Segments the instances in images; writes COCO results and pictures.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="image, folder (recursive), glob or URI",
    )
    add(
        "--files-from",
        metavar="FILE",
        help="file with more inputs (no globs), in lines or separated by zero bytes; -: stdin",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model-repo",
        type=Path,
        default=Path("model_repo"),
        help="repository of models, or folder of one model (default: model_repo)",
    )
    source.add_argument("--url", help="use this server instead, e.g. http://localhost:8000")
    add("--model", help="name (default: the default of the repository or server, or the only one)")
    add("--version", type=_positive, help="default: the latest")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="not with --url")
    add("--threads", type=_positive, help="of the engine (default: physical cores; with --ray 1)")
    add(
        "--precision",
        choices=("auto", *get_args(Precision)),
        default="auto",
        help="auto: on the CPU the fastest, as the server; with --ray fp32. Not with --url",
    )
    add("--jobs", type=_positive, default=4, help="concurrent requests with --url (default: 4)")
    add("--api-key-file", type=Path, metavar="FILE", help="file with the API key for --url")
    add(
        "--score-threshold",
        type=_fraction,
        metavar="0..1",
        help="lowest score (default: the model's)",
    )
    add("--max-instances", type=_positive, metavar="N", help="per image (default: the model's)")
    add(
        "--overlaps",
        choices=get_args(Overlaps),
        default="keep",
        help="resolve: each pixel belongs to one instance (default: keep)",
    )
    add(
        "--object-size-px",
        type=_size,
        metavar="PX",
        help="typical diameter of the objects, if it is not the model's (default: no rescaling)",
    )
    add(
        "--um-per-px",
        type=_size,
        metavar="UM",
        help="size of a pixel, for models that state it (default: as a TIFF states it)",
    )
    add("--channel", metavar="NAME", help="name or number, from 0, of a channel of a TIFF")
    add("--z", type=_plane, metavar="N", help="plane or page of a TIFF, from 0, or max")
    add("--t", type=_number, metavar="N", help="point in time of a TIFF, from 0")
    add(
        "--region",
        type=_region,
        metavar="X,Y,W,H",
        help="of TIFFs: only instances whose centres are in this region, px",
    )
    add("--all-tiles", action="store_true", help="of slides: also tiles that look empty")
    add(
        "--scale",
        choices=get_args(Scale),
        default="own",
        help="auto: find the scale from the objects in each image (default: own)",
    )
    add("--annotations", type=Path, metavar="COCO.json", help="file with the image ids")
    add("--out", type=Path, help="file or folder to write (default: results.json, ...)")
    add_format_options(parser)
    add("--overlays", type=Path, metavar="DIR", help="folder for pictures with the masks")
    add("--restart", action="store_true", help="discard the results of an interrupted run")
    add("--quiet", action="store_true", help="no progress bar")
    on_ray = parser.add_argument_group("Ray")
    add = on_ray.add_argument
    add("--ray", action="store_true", help="run on Ray, on one or more machines")
    add("--ray-address", help="cluster (default: $RAY_ADDRESS, else Ray is started here)")
    add("--actors", type=_positive, metavar="N", help="loaded models (default: as many as fit)")
    add("--gpus-per-actor", type=_share, default=0.0, metavar="GPUS", help="e.g. 0.5 (default: 0)")
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; exits 2 if it is invalid."""
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    if not parsed.inputs and parsed.files_from is None:
        parser.error("an INPUT or --files-from is required")
    if parsed.ray and parsed.url is not None:
        parser.error("--ray loads the model itself and cannot be combined with --url")
    if parsed.url is not None and parsed.precision != "auto":
        parser.error("--precision is for a model in this process, not with --url")
    if parsed.region is not None and (parsed.ray or parsed.url is not None):
        parser.error("--region is for a model in this process, not with --url or --ray")
    if not parsed.ray and (parsed.ray_address or parsed.actors or parsed.gpus_per_actor):
        parser.error("--ray-address, --actors and --gpus-per-actor need --ray")
    return parsed


def build_backend_options(
    arguments: argparse.Namespace,
    device: Literal["auto", "cpu", "cuda"],
    threads: int | None,
    *,
    may_choose: bool,
) -> BackendOptions:
    """How engines are built; --precision auto means fp32 unless the engine may choose."""
    is_automatic = arguments.precision == "auto"
    return BackendOptions(
        device=device,
        threads=threads,
        precision="fp32" if is_automatic else arguments.precision,
        precision_fallback=True,
        free_precision=is_automatic and may_choose,
    )


def read_asked(arguments: argparse.Namespace) -> RequestOptions:
    """The parameters of each image."""
    return RequestOptions(**{name: getattr(arguments, name) for name in _ASKED})


def read_options(arguments: argparse.Namespace, engine: str | None) -> dict[str, Any]:
    """The options that the results depend on: only a run with the same ones can be continued."""
    options = vars(arguments)
    found = {name: options[name] for name in ("url", "model", "version", *_ASKED)}
    found["engine"] = engine
    if arguments.url is None:
        found["model_repo"] = as_text(arguments.model_repo.absolute())
    if arguments.region is not None:
        found["region"] = vars(arguments.region)
    if arguments.all_tiles:
        found["all_tiles"] = True
    if arguments.overlays is not None:
        found["overlays"] = as_text(arguments.overlays.absolute())
    return found
