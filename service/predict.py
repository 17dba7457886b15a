"""solo-predict: segments files with a model of model_repo, or through a running server.

Writes COCO results (`pycocotools` loads them as they are) and, if asked, pictures with the masks.
"""

from __future__ import annotations

import argparse
import glob
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson
from PIL import Image
from tqdm import tqdm

from service.backends.base import BackendOptions
from service.errors import StartupError
from service.pipeline.decode import decode_image
from service.pipeline.draw import draw_instances
from service.pipeline.encode import instance_to_coco
from service.pipeline.errors import DecodeError
from service.pipeline.model_config import Task
from service.pipeline.types import Instance
from service.registry import LoadedModel, find_models, load_version

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
RETRIES = 8

EPILOG = """\
examples:
  solo-predict images/ --out results.json                      in process, model_repo/ beside you
  solo-predict 'scans/*.png' --overlays drawn/ --score-threshold 0.3
  solo-predict images/ --url http://localhost:8000             through a running server
  solo-predict images/ --annotations val.json                  image ids from a COCO file

Without --annotations the image ids are 1, 2, 3 ... in the order of the files; each result also has
its file_name. An image that fails is named at the end, and the exit status is then 1.
"""


class ImageFailed(Exception):
    """An image has no result; the text says why."""


@dataclass(frozen=True)
class Answer:
    """What was found in an image.

    Attributes:
        results: COCO results without their image_id, with RLE.
        task: What their masks are.
    """

    results: list[dict[str, Any]]
    task: Task


class Predictor(Protocol):
    """What finds the instances of an encoded image."""

    def predict(self, data: bytes) -> Answer:
        """Raises `ImageFailed`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Least score and most instances; None takes the model's."""

    score_threshold: float | None = None
    max_instances: int | None = None


@dataclass(frozen=True)
class LocalPredictor:
    """A model in this process: the server's own code without the server."""

    model: LoadedModel
    bounds: Bounds

    def predict(self, data: bytes) -> Answer:
        """See `Predictor`."""
        try:
            image = decode_image(data)
        except DecodeError as error:
            raise ImageFailed(f"{error.code}: {error}") from error
        instances = self.model.segment(
            image,
            score_threshold=self.bounds.score_threshold,
            max_instances=self.bounds.max_instances,
        )
        config = self.model.config
        return Answer([instance_to_coco(i, config) for i in instances], config.task)


@dataclass(frozen=True)
class RemotePredictor:
    """A running server.

    Attributes:
        url: Its address, e.g. http://localhost:8000.
        model: None takes the server's default.
        version: None takes the one that is served.
        timeout_s: For one answer.
    """

    url: str
    bounds: Bounds
    model: str | None = None
    version: int | None = None
    timeout_s: float = 120.0

    def predict(self, data: bytes) -> Answer:
        """See `Predictor`; waits and asks again as long as the server is too busy."""
        for attempt in range(RETRIES + 1):
            try:
                answer = self._ask(data)
            except urllib.error.HTTPError as error:
                body = error.read()
                if error.code != 503 or attempt == RETRIES:
                    raise ImageFailed(_read_error(error.code, body)) from error
                time.sleep(min(float(error.headers.get("retry-after", 1)) * 2**attempt, 30.0))
            except OSError as error:
                raise ImageFailed(f"{self.url}: {error}") from error
            else:
                task: Task = answer.get("task", "segmentation")  # not told by old servers
                return Answer(answer["results"][0]["instances"], task)
        raise AssertionError("unreachable")

    def _ask(self, data: bytes) -> Any:
        wanted = {"model": self.model, "version": self.version, **vars(self.bounds)}
        query = urllib.parse.urlencode({k: v for k, v in wanted.items() if v is not None})
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/segment?{query}",
            data=data,
            headers={"content-type": "application/octet-stream"},
        )
        with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
            return orjson.loads(response.read())


def _read_error(status: int, body: bytes) -> str:
    try:
        error = orjson.loads(body)["error"]
        return f"{error['code']}: {error['message']}"
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {status}"


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Files, the images in folders (and their folders), and what globs match; each once.

    Raises:
        StartupError: An input gives no file.
    """
    files: dict[Path, None] = {}
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(given, recursive=True) if Path(p).is_file())
        if not found:
            raise StartupError(f"{given!r} is no image, no folder with images and matches none")
        files.update(dict.fromkeys(found))
    return list(files)


def read_image_ids(annotations: Path) -> dict[str, int]:
    """Image ids by file name, from a COCO file.

    Raises:
        StartupError: It cannot be read or has no images.
    """
    try:
        content = json.loads(annotations.read_bytes())
        return {str(image["file_name"]): int(image["id"]) for image in content["images"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartupError(f"{annotations}: no COCO file with images: {error!r}") from error


def find_image_id(file: Path, ids: Mapping[str, int]) -> int:
    """The id of a file: the longest end of its path that is a file name in `ids`.

    Raises:
        ImageFailed: There is none.
    """
    parts = file.as_posix().split("/")
    for start in range(len(parts)):
        name = "/".join(parts[start:])
        if name in ids:
            return ids[name]
    raise ImageFailed("it is not in the annotations")


def write_overlay(data: bytes, answer: Answer, file: Path) -> None:
    """Draws COCO results on their image."""
    instances = [
        Instance(
            label=0,
            score=result["score"],
            rle={**result["segmentation"], "counts": result["segmentation"]["counts"].encode()},
            bbox_xywh=tuple(result["bbox"]),
            area=result["area"],
        )
        for result in answer.results
    ]
    Image.fromarray(draw_instances(decode_image(data), instances, answer.task)).save(file)


@dataclass(frozen=True)
class Job:
    """All that one run needs.

    Attributes:
        predictor: Who finds the instances.
        files: The images.
        image_ids: By file name, or None for 1, 2, 3 ...
        overlays: Folder for pictures, or None.
        workers: Images at once.
    """

    predictor: Predictor
    files: Sequence[Path]
    image_ids: Mapping[str, int] | None
    overlays: Path | None
    workers: int

    def run(self) -> Iterator[list[dict[str, Any]] | ImageFailed]:
        """Results of each file, in their order, as they come."""
        with ThreadPoolExecutor(self.workers) as pool:
            yield from pool.map(self._predict, range(len(self.files)))

    def _predict(self, index: int) -> list[dict[str, Any]] | ImageFailed:
        file = self.files[index]
        try:
            ids = self.image_ids
            image_id = index + 1 if ids is None else find_image_id(file, ids)
            data = file.read_bytes()
            answer = self.predictor.predict(data)
            if self.overlays is not None:
                name = f"{index + 1:05d}_{file.stem}.png"
                write_overlay(data, answer, self.overlays / name)
        except ImageFailed as error:
            return error
        except OSError as error:
            return ImageFailed(str(error))
        return [{"image_id": image_id, "file_name": file.name, **r} for r in answer.results]


def build_predictor(arguments: argparse.Namespace) -> Predictor:
    """The model or the server that the arguments name.

    Raises:
        StartupError: The model cannot be used.
    """
    bounds = Bounds(
        score_threshold=arguments.score_threshold, max_instances=arguments.max_instances
    )
    if arguments.url is not None:
        return RemotePredictor(arguments.url, bounds, arguments.model, arguments.version)
    folder: Path = arguments.model_repo
    if not (folder / "config.json").is_file():
        folders = {path.name: path for path in find_models(folder)}
        name = arguments.model or min(folders)
        if name not in folders:
            raise StartupError(f"{folder} has no model {name!r}, only {sorted(folders)}")
        folder = folders[name]
    options = BackendOptions(device=arguments.device, threads=arguments.threads)
    return LocalPredictor(load_version(folder, arguments.version, options), bounds)


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


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="solo-predict",
        description="Finds the instances in images; writes COCO results and pictures.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="image, folder (with its folders) or glob")
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
    add("--threads", type=_positive, help="of the engine (default: real cores); not with --url")
    add("--workers", type=_positive, default=4, help="requests at once with --url (default: 4)")
    add("--score-threshold", type=_fraction, metavar="0..1", help="default: the model's")
    add("--max-instances", type=_positive, metavar="N", help="default: the model's")
    add("--annotations", type=Path, metavar="COCO.json", help="take image ids from this file")
    add("--out", type=Path, default=Path("results.json"), help="default: results.json")
    add("--overlays", type=Path, metavar="DIR", help="also draw the masks into this folder")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exits 1 if an image failed or nothing could be done."""
    parsed = build_parser().parse_args(arguments)
    try:
        files = find_files(parsed.inputs)
        ids = None if parsed.annotations is None else read_image_ids(parsed.annotations)
        predictor = build_predictor(parsed)
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        if parsed.overlays is not None:
            parsed.overlays.mkdir(parents=True, exist_ok=True)
    except (StartupError, OSError) as error:
        sys.exit(f"solo-predict: error: {error}")
    workers = parsed.workers if parsed.url is not None else 1
    job = Job(predictor, files, ids, parsed.overlays, workers)
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    outcomes = tqdm(job.run(), total=len(files), unit="image", disable=parsed.quiet)
    for file, outcome in zip(files, outcomes, strict=True):
        if isinstance(outcome, ImageFailed):
            failed.append(f"{file}: {outcome}")
        else:
            results += outcome
    parsed.out.write_bytes(orjson.dumps(results))
    print(f"{len(results)} instances in {len(files) - len(failed)} images -> {parsed.out}")
    if failed:
        sys.exit("\n".join([f"solo-predict: {len(failed)} images failed:", *failed]))


if __name__ == "__main__":
    main()
