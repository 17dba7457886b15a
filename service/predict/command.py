"""The command line of solo-predict."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from pipeline.model_config import ModelConfig
from service.errors import InvalidParameter, StartupError
from service.jobs.database import JournalDiffers, JournalInUse
from service.jobs.errors import ImageUnusable, RunFailed
from service.jobs.files import ImageFile, as_line
from service.jobs.inputs import find_files, read_list
from service.jobs.journal import Journal
from service.jobs.listing import Listing
from service.models.repository import load_version, read_config
from service.predict.image_ids import assign_ids, read_image_ids
from service.predict.job import Item, Notes, PredictJob, Run, build_items, write_results
from service.predict.options import build_backend_options, parse, read_asked, read_options
from service.predict.output_options import RUN_FORMATS, build_plan, choose_outputs
from service.predict.predictors import (
    LocalPredictor,
    Predictor,
    RemotePredictor,
)
from service.predict.progress import CanvasProgress
from service.predict.slides import SlideJob, SlideOptions
from service.predict.sources import build_client, find_classes, find_model
from service.work.request import RequestOptions

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
    asked = read_asked(arguments)
    if arguments.url is not None:
        client = build_client(arguments)
        return RemotePredictor(
            client, asked, arguments.model, arguments.version, on_progress=canvases.update
        )
    folder = find_model(arguments.model_repo, arguments.model)
    options = build_backend_options(arguments, arguments.device, arguments.threads, may_choose=True)
    _check_asked(asked, read_config(folder, arguments.version))
    return LocalPredictor(load_version(folder, arguments.version, options), asked)


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
        takes_long_runs = arguments.format not in RUN_FORMATS
        options = SlideOptions(arguments.region, not arguments.all_tiles, takes_long_runs)
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
    asked, config = read_asked(arguments), read_config(folder, arguments.version)
    _check_asked(asked, config)
    plan = Plan(
        folder=folder,
        config=config,
        options=build_backend_options(arguments, device, cpus, may_choose=False),
        asked=asked,
        draw=arguments.overlays is not None,
    )
    pool = Pool(address=arguments.ray_address, actors=arguments.actors, cpus=cpus, gpus=gpus)
    return Start(lambda notes: RayJob(plan, pool, notes))


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
