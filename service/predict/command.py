"""The command line of solo-predict."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

import solo_client
from service.engines.base import BackendOptions
from service.errors import StartupError
from service.models.repository import find_models, load_version, read_config
from service.predict.errors import ImageFailed, RunFailed
from service.predict.files import ImageFile, as_text
from service.predict.inputs import assign_ids, find_files
from service.predict.job import Item, Job, Notes, Run, build_items, write_results
from service.predict.journal import Journal
from service.predict.predictors import (
    RETRY,
    TIMEOUT_S,
    Bounds,
    LocalPredictor,
    Predictor,
    RemotePredictor,
)

EPILOG = """\
examples:
  solo-predict images/ --out results.json                      in process, model_repo/ beside you
  solo-predict 'scans/*.png' --overlays drawn/ --score-threshold 0.3
  solo-predict images/ --url http://localhost:8000             through a running server
  solo-predict images/ --annotations val.json                  image ids from a COCO file
  solo-predict s3://bucket/images --ray --ray-address auto     on a Ray cluster

Without --annotations the image ids are 1, 2, 3 ... in the order of the files; each result also has
its file_name. An image that fails is named at the end, and the exit status is then 1.

Results are noted image by image in OUT.partial, and --out is written when all is done. After a stop
of any kind the same command goes on; after failures it tries the failed images again.
"""


def build_predictor(arguments: argparse.Namespace) -> Predictor:
    """The model or the server that the arguments name.

    Raises:
        StartupError: The model cannot be used.
    """
    bounds = _bounds_of(arguments)
    if arguments.url is not None:
        try:
            key = arguments.api_key_file and arguments.api_key_file.read_text().strip()
            client = solo_client.Client(
                arguments.url, api_key=key, timeout_s=TIMEOUT_S, retry=RETRY
            )
        except ValueError as error:
            raise StartupError(str(error)) from error
        return RemotePredictor(client, bounds, arguments.model, arguments.version)
    folder = find_model(arguments.model_repo, arguments.model)
    options = BackendOptions(device=arguments.device, threads=arguments.threads)
    return LocalPredictor(load_version(folder, arguments.version, options), bounds)


def _bounds_of(arguments: argparse.Namespace) -> Bounds:
    return Bounds(score_threshold=arguments.score_threshold, max_instances=arguments.max_instances)


def find_model(folder: Path, name: str | None) -> Path:
    """A model's folder: the one that is given, or that of a name in a repository.

    Raises:
        StartupError: There is none.
    """
    if (folder / "config.json").is_file():
        return folder
    folders = {path.name: path for path in find_models(folder)}
    name = name or min(folders)
    if name not in folders:
        raise StartupError(f"{folder} has no model {name!r}, only {sorted(folders)}")
    return folders[name]


def choose_run(arguments: argparse.Namespace) -> Callable[[Notes], Run]:
    """In this process, through a server or on Ray.

    Raises:
        StartupError: It cannot be done so.
    """
    if not arguments.ray:
        predictor = build_predictor(arguments)
        jobs = arguments.jobs if arguments.url is not None else 1
        return lambda notes: Job(predictor, notes, jobs)
    from service.predict.ray_job import Plan, Pool, RayJob

    folder = find_model(arguments.model_repo, arguments.model).resolve()
    cpus, gpus = arguments.threads or 1, arguments.gpus_per_actor
    device = arguments.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    plan = Plan(
        folder=folder,
        config=read_config(folder, arguments.version),
        options=BackendOptions(device=device, threads=cpus),
        bounds=_bounds_of(arguments),
        draw=arguments.overlays is not None,
    )
    pool = Pool(address=arguments.ray_address, actors=arguments.actors, cpus=cpus, gpus=gpus)
    return lambda notes: RayJob(plan, pool, notes)


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


def _share(text: str) -> float:
    value = float(text)
    if value < 0 or (value > 1 and not value.is_integer()):
        raise argparse.ArgumentTypeError(f"{text} is neither a part of one GPU nor whole GPUs")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="solo-predict",
        description="Finds the instances in images; writes COCO results and pictures.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="image, folder (with its folders) or glob; or a URI",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model-repo",
        type=Path,
        default=Path("model_repo"),
        help="repository, or one model's folder (default: model_repo)",
    )
    source.add_argument("--url", help="ask this server instead, e.g. http://localhost:8000")
    add("--model", help="default: the first by name, or the server's default")
    add("--version", type=_positive, help="default: the latest")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="not with --url")
    add("--threads", type=_positive, help="of the engine (default: real cores, with --ray 1)")
    add("--jobs", type=_positive, default=4, help="requests at once with --url (default: 4)")
    add("--api-key-file", type=Path, metavar="FILE", help="its text is sent as X-API-Key")
    add("--score-threshold", type=_fraction, metavar="0..1", help="default: the model's")
    add("--max-instances", type=_positive, metavar="N", help="default: the model's")
    add("--annotations", type=Path, metavar="COCO.json", help="take image ids from this file")
    add("--out", type=Path, default=Path("results.json"), help="default: results.json")
    add("--overlays", type=Path, metavar="DIR", help="also draw the masks into this folder")
    add("--restart", action="store_true", help="forget what an earlier run has done")
    add("--quiet", action="store_true", help="no progress bar")
    on_ray = parser.add_argument_group("on Ray")
    add = on_ray.add_argument
    add("--ray", action="store_true", help="models in actors of Ray, on one machine or many")
    add("--ray-address", help="of a cluster (default: $RAY_ADDRESS, or Ray is started here)")
    add("--actors", type=_positive, metavar="N", help="default: as many as there is room for")
    add("--gpus-per-actor", type=_share, default=0.0, metavar="GPUS", help="default: 0; or 0.5, 1")
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; what does not go together exits 2."""
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    if parsed.ray and parsed.url is not None:
        parser.error("--ray has the models in its actors: not with --url")
    if not parsed.ray and (parsed.ray_address or parsed.actors or parsed.gpus_per_actor):
        parser.error("--ray-address, --actors and --gpus-per-actor need --ray")
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exits 1 if an image failed or nothing could be done."""
    parsed = parse(arguments)
    try:
        failed = run(parsed)
    except (StartupError, OSError) as error:
        sys.exit(f"solo-predict: error: {error}")
    except RunFailed as error:
        sys.exit(f"solo-predict: error: {error}; the same command goes on from here")
    except KeyboardInterrupt:
        print("solo-predict: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    if failed:
        named = [f"{as_text(file)}: {reason}" for file, reason in failed.items()]
        sys.exit("\n".join([f"solo-predict: {len(failed)} images failed:", *named]))


def run(arguments: argparse.Namespace) -> dict[ImageFile, ImageFailed]:
    """Does what the command line says.

    Returns:
        The images that failed, in their order.

    Raises:
        StartupError, OSError: It cannot begin, or a file cannot be written.
        RunFailed: It cannot go on.
    """
    files = find_files(arguments.inputs)
    ids, failed = assign_ids(files, arguments.annotations)
    start = choose_run(arguments)
    out: Path = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.overlays is not None:
        arguments.overlays.mkdir(parents=True, exist_ok=True)
    items = build_items(files, ids, overlays=arguments.overlays is not None)
    partial = out.with_name(out.name + ".partial")
    with Journal(partial, read_options(arguments), restart=arguments.restart) as journal:
        notes = Notes(journal, arguments.overlays)
        failed.update(_do_open(start(notes), notes, items, quiet=arguments.quiet))
        done = [item for item in items if item.file not in failed]
        count = write_results(out, done, journal)
        if not failed:
            journal.remove()
    print(f"{count} instances in {len(done)} images -> {out}")
    return {file: failed[file] for file in files if file in failed}


def _do_open(
    run: Run, notes: Notes, items: Sequence[Item], *, quiet: bool
) -> dict[ImageFile, ImageFailed]:
    """Does what is not done yet; the images that failed."""
    waiting = notes.find_open(items)
    failed: dict[ImageFile, ImageFailed] = {}
    with (
        tqdm(
            total=len(items), initial=len(items) - len(waiting), unit="image", disable=quiet
        ) as bar,
        closing(run.run(waiting)) as outcomes,
    ):
        for item, failure in outcomes:
            bar.update()
            if failure is not None:
                failed[item.file] = failure
    return failed


def read_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the results depend on: a run goes on only with the same."""
    options = vars(arguments)
    same = ("url", "model", "version", "score_threshold", "max_instances")
    found = {name: options[name] for name in same}
    if arguments.url is None:
        found["model_repo"] = as_text(arguments.model_repo.absolute())
    if arguments.overlays is not None:
        found["overlays"] = as_text(arguments.overlays.absolute())
    return found
