"""The bare loop: decode, engine, post-process and encode, without HTTP.

python -m benchmarks.bare --model model_repo/nuclei --threads 2 --seconds 10

What a server could reach at most if its own layer cost nothing: the server's functions
(service/work/steps.py), each image from its bytes to its answer in one thread, with an engine
call of one thread. No event loop, queue, deadlines, metrics or fault isolation. Prints one
JSON object. Threads share Python's lock; for a ceiling of a server with several processes run
several of these at once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import describe_machine, this_command, write_report
from service.cores import count_cores
from service.engines.base import BackendOptions
from service.models.repository import LoadedModel, load_version
from service.work.steps import Options, TiledImage, decode

MAX_PIXELS = 50_000_000
OPTIONS = Options()


@dataclass(frozen=True)
class BareRun:
    """What a run of the loop came to.

    Attributes:
        images: That were finished.
        instances: Found in them.
        seconds: From the first image's start to the last one's end.
        cpu_s: CPU time of the process meanwhile.
    """

    images: int
    instances: int
    seconds: float
    cpu_s: float

    @property
    def images_per_s(self) -> float:
        """Throughput."""
        return self.images / self.seconds

    @property
    def cpu_ms_per_image(self) -> float:
        """Cost."""
        return 1e3 * self.cpu_s / self.images

    def describe(self) -> dict[str, float]:
        """The numbers of a report."""
        return {
            "images": self.images,
            "instances": self.instances,
            "images_per_s": self.images_per_s,
            "cpu_ms_per_image": self.cpu_ms_per_image,
        }


def carry(model: LoadedModel, body: bytes) -> int:
    """One image from its bytes to its answer; how many instances it has."""
    decoded = decode(body, model.config, MAX_PIXELS, OPTIONS)
    picture = TiledImage(None, decoded, model.config, OPTIONS)
    for index, tile in enumerate(picture.tiles):
        (candidates,) = model.backend.infer([tile])
        picture.search(index, candidates)
    assert picture.answer is not None
    return picture.answer.instances


def run_bare_loop(
    model: LoadedModel, bodies: Sequence[bytes], *, threads: int, seconds: float
) -> BareRun:
    """Runs the loop for a while; what was begun is finished.

    Args:
        model: With its engine.
        bodies: Encoded images, used in turn.
        threads: Images in work at once.
        seconds: When no image is begun any more; at least one is.

    Raises:
        ValueError: There are no images, or no threads.
        Exception: What a step raised; the run ends with the first.
    """
    if not bodies or threads < 1:
        raise ValueError(f"{len(bodies)} images and {threads} threads: at least one of each")
    lock, todo, failed = threading.Lock(), itertools.cycle(bodies), threading.Event()
    began_s, cpu_began_s = time.perf_counter(), time.process_time()

    def take() -> Iterator[bytes]:
        while not failed.is_set():
            with lock:
                body = next(todo)
            yield body
            if time.perf_counter() - began_s >= seconds:
                return

    def work() -> list[int]:
        try:
            return [carry(model, body) for body in take()]
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        working = [pool.submit(work) for _ in range(threads)]
        found = [instances for done in working for instances in done.result()]
    return BareRun(
        images=len(found),
        instances=sum(found),
        seconds=time.perf_counter() - began_s,
        cpu_s=time.process_time() - cpu_began_s,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=Path("model_repo/nuclei"))
    parser.add_argument("--images", type=Path, default=Path("tests/data/nuclei/images"))
    parser.add_argument("--threads", type=int, default=count_cores(), help="images at once")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--warm-up-s", type=float, default=1, help="before that, not counted")
    parser.add_argument("--json", type=Path, help="write the numbers, with the command")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    model = load_version(arguments.model, options=BackendOptions(device="cpu", threads=1))
    bodies = [path.read_bytes() for path in sorted(arguments.images.iterdir())]
    for seconds in (arguments.warm_up_s, arguments.seconds):
        run = run_bare_loop(model, bodies, threads=arguments.threads, seconds=seconds)
    numbers: dict[str, Any] = {
        "model": f"{model.config.name} {model.version}",
        "threads": arguments.threads,
        **run.describe(),
    }
    print(json.dumps(numbers))
    if arguments.json is not None:
        payload = {"machine": describe_machine(), **numbers}
        write_report(arguments.json, this_command("benchmarks.bare"), payload)
    model.backend.close()


if __name__ == "__main__":
    main()
