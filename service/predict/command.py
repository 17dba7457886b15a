"""The command line of solo-predict."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from tqdm import tqdm

from pipeline.formats.planes import MAXIMUM
from pipeline.model_config import ModelConfig, Precision
from pipeline.postprocess import Overlaps
from pipeline.scale import Scale
from pipeline.types import Window
from service.engines.base import BackendOptions
from service.errors import InvalidParameter, StartupError
from service.jobs.database import JournalDiffers, JournalInUse
from service.jobs.errors import ImageUnusable, RunFailed
from service.jobs.files import ImageFile, as_line, as_text
from service.jobs.inputs import find_files, read_list
from service.jobs.journal import Journal
from service.jobs.listing import Listing
from service.models.repository import load_version, read_config
from service.predict.image_ids import assign_ids, read_image_ids
from service.predict.job import Item, Notes, PredictJob, Run, build_items, write_results
from service.predict.output_options import add_format_options, build_plan, choose_outputs
from service.predict.predictors import (
    LocalPredictor,
    Predictor,
    RemotePredictor,
)
from service.predict.progress import CanvasProgress
from service.predict.slides import SlideJob, SlideOptions
from service.predict.sources import build_client, find_classes, find_model
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
_LISTED = 5
"""Images of a kind of warning that are named."""
JOURNAL_ADVICE = (
    "To continue, give the same options (and --version); otherwise give another --out, or "
    "--restart to start again"
)


def build_predictor(arguments: argparse.Namespace, canvases: CanvasProgress) -> Predictor:
    """Loads the model, or configures the client of the server, that the arguments name.

    Raises:
        StartupError: The model cannot be used, or the server's address is invalid.
        OSError: The file with the API key cannot be read.
    """
    asked = _read_asked(arguments)
    if arguments.url is not None:
        client = build_client(arguments)
        return RemotePredictor(
            client, asked, arguments.model, arguments.version, on_progress=canvases.update
        )
    folder = find_model(arguments.model_repo, arguments.model)
    options = _build_options(arguments, arguments.device, arguments.threads, automatic="free")
    _check_asked(asked, read_config(folder, arguments.version))
    return LocalPredictor(load_version(folder, arguments.version, options), asked)


def _build_options(
    arguments: argparse.Namespace,
    device: Literal["auto", "cpu", "cuda"],
    threads: int | None,
    *,
    automatic: Literal["free", "fp32"],
) -> BackendOptions:
    """How engines are built; `automatic` is what --precision auto means."""
    is_automatic = arguments.precision == "auto"
    return BackendOptions(
        device=device,
        threads=threads,
        precision="fp32" if is_automatic else arguments.precision,
        precision_fallback=True,
        free_precision=is_automatic and automatic == "free",
    )


def _read_asked(arguments: argparse.Namespace) -> RequestOptions:
    return RequestOptions(**{name: getattr(arguments, name) for name in _ASKED})


def _check_asked(asked: RequestOptions, config: ModelConfig) -> None:
    try:
        asked.adapt(config)
    except InvalidParameter as error:
        raise StartupError(str(error)) from error


class Start(NamedTuple):
    """How a run is started, and the engine and precision of a model in this process."""

    build: Callable[[Notes], Run]
    engine: str | None = None


def choose_run(arguments: argparse.Namespace, canvases: CanvasProgress) -> Start:
    """Builds the run: in this process, through a server or on Ray.

    Raises:
        StartupError: The model, the server's address or Ray cannot be used.
        OSError: The file with the API key cannot be read.
    """
    if not arguments.ray:
        predictor = build_predictor(arguments, canvases)
        if not isinstance(predictor, LocalPredictor):
            jobs = arguments.jobs if arguments.url is not None else 1
            return Start(lambda notes: PredictJob(predictor, notes, jobs))
        options = SlideOptions(arguments.region, not arguments.all_tiles)
        slides = SlideJob(predictor.model, predictor.asked, options, canvases.update)
        backend = predictor.model.backend
        return Start(
            lambda notes: PredictJob(predictor, notes, 1, slides),
            f"{backend.name} {backend.precision}",
        )
    from service.predict.ray_job import Plan, Pool, RayJob

    folder = find_model(arguments.model_repo, arguments.model).resolve()
    cpus, gpus = arguments.threads or 1, arguments.gpus_per_actor
    device = arguments.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    asked, config = _read_asked(arguments), read_config(folder, arguments.version)
    _check_asked(asked, config)
    plan = Plan(
        folder=folder,
        config=config,
        options=_build_options(arguments, device, cpus, automatic="fp32"),
        asked=asked,
        draw=arguments.overlays is not None,
    )
    pool = Pool(address=arguments.ray_address, actors=arguments.actors, cpus=cpus, gpus=gpus)
    return Start(lambda notes: RayJob(plan, pool, notes))


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exits 1 if an image, a folder or the whole run failed."""
    parsed = parse(arguments)
    try:
        problems = run(parsed)
    except (StartupError, JournalInUse, OSError) as error:
        sys.exit(f"solo-predict: error: {as_line(error)}")
    except JournalDiffers as error:
        sys.exit(f"solo-predict: error: {as_line(error)}. {JOURNAL_ADVICE}")
    except RunFailed as error:
        sys.exit(f"solo-predict: error: {as_line(error)}; the same command continues from here")
    except KeyboardInterrupt:
        print("solo-predict: stopped; the same command continues from here", file=sys.stderr)
        sys.exit(130)
    if problems:
        sys.exit("solo-predict: " + "\n".join(problems))


def run(arguments: argparse.Namespace) -> list[str]:
    """Processes the images, writes the results and prints a summary.

    Returns:
        What failed, in lines: images and folders with the reasons.

    Raises:
        StartupError: The run cannot start.
        JournalInUse, JournalDiffers: An earlier run's journal prevents it.
        OSError: A file cannot be read or written.
        RunFailed: The run cannot continue.
    """
    plan = build_plan(arguments)
    outputs = choose_outputs(arguments, plan)
    known = read_image_ids(arguments.annotations) if arguments.annotations is not None else None
    listed = read_list(arguments.files_from) if arguments.files_from is not None else []
    listing = find_files(arguments.inputs, listed, outputs.name_own())
    ids = assign_ids(listing, known)
    failed = {
        file: why for file, why in zip(listing.files, ids, strict=True) if not isinstance(why, int)
    }
    _print_before(listing, failed)
    canvases = CanvasProgress()
    start = choose_run(arguments, canvases)
    outputs.create()
    items = build_items(listing, ids, overlays=arguments.overlays is not None)
    with Journal(
        outputs.journal, read_options(arguments, start.engine), restart=arguments.restart
    ) as journal:
        notes = Notes(journal, arguments.overlays)
        open_items = notes.find_open(items)
        with tqdm(
            total=len(items),
            initial=len(items) - len(open_items),
            unit="image",
            disable=arguments.quiet,
        ) as canvases.bar:
            failed.update(_process(start.build(notes), open_items, canvases.bar))
            canvases.bar.set_postfix_str("")
        done = [item for item in items if item.file not in failed]
        if plan is None:
            count = write_results(outputs.out, done, notes.journal)
        else:
            count = plan.write(
                outputs.out, done, notes.journal, find_classes(arguments, journal.served)
            )
        _print_after(arguments.out, count, done, notes)
        problems = _describe_problems(listing, failed)
        if not problems:
            journal.remove()
    return problems


def _print_before(listing: Listing, failed: Mapping[ImageFile, ImageUnusable]) -> None:
    """Names the entries that are left out, and says how many images fail without any work."""
    if left_out := listing.describe_left_out():
        print(f"solo-predict: {listing.left_out} entries are left out:", file=sys.stderr)
        print(*left_out, sep="\n", file=sys.stderr)
    if failed:
        print(f"solo-predict: {len(failed)} images have no image id and fail", file=sys.stderr)


def _print_after(given: Path, count: int, done: Sequence[Item], notes: Notes) -> None:
    truncated = notes.count_truncated(done)
    print(f"{count} instances in {len(done)} images -> {as_line(given)}")
    if truncated:
        print(
            f"solo-predict: warning: {truncated} images reached the limit of --max-instances; "
            "instances may be missing from their results",
            file=sys.stderr,
        )
    for code, named in notes.collect_warnings(done).items():
        print(
            f"solo-predict: warning: {code} in {len(named)} of {len(done)} images:", file=sys.stderr
        )
        for item, message in named[:_LISTED]:
            print(f"  {as_line(item.name)}: {as_line(message)}", file=sys.stderr)
        if len(named) > _LISTED:
            print(f"  and {len(named) - _LISTED} more", file=sys.stderr)


def _describe_problems(listing: Listing, failed: Mapping[ImageFile, ImageUnusable]) -> list[str]:
    problems = []
    if failed:
        named = [f"{as_line(f)}: {as_line(failed[f])}" for f in listing.files if f in failed]
        problems += [f"{len(failed)} images failed:", *named]
    if listing.unreadable:
        named = [f"{as_line(name)}: {why}" for name, why in listing.unreadable.items()]
        problems += [f"{len(named)} inputs cannot be read:", *named]
    return problems


def _process(run: Run, items: Sequence[Item], bar: tqdm[Any]) -> dict[ImageFile, ImageUnusable]:
    """Processes the images; returns those that failed."""
    failed: dict[ImageFile, ImageUnusable] = {}
    with closing(run.run(items)) as outcomes:
        for item, failure in outcomes:
            bar.update()
            if failure is not None:
                failed[item.file] = failure
    return failed


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
