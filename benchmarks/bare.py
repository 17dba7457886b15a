"""The bare loop: decode, engine, post-process and encode in threads, without HTTP.

python -m benchmarks.bare --model model_repo/nuclei --clients 16 --seconds 10

What a server could reach at most if its own layer cost nothing: the server's functions
(service/steps.py) on the server's threads, with as many images in work at once as a closed loop has
clients, and canvases of one shape that wait share an engine call as they do in the server. No
event loop, no deadlines, no metrics, no isolation of faults. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import describe_machine, this_command, write_report
from service.backends.base import BackendOptions
from service.cores import count_cores
from service.pipeline.postprocess import TileCandidates
from service.pipeline.types import Tile
from service.registry import LoadedModel, load_version
from service.steps import Options, TiledImage, decode

MAX_PIXELS = 50_000_000
OPTIONS = Options()


@dataclass(frozen=True)
class BareRun:
    """What a run of the loop came to.

    Attributes:
        images: That were finished.
        instances: Found in them.
        calls: Of the engine.
        canvases: In these calls together.
        seconds: From the first image's start to the last one's end.
        cpu_s: CPU time of the process meanwhile.
    """

    images: int
    instances: int
    calls: int
    canvases: int
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
            "mean_batch": self.canvases / self.calls,
            "images_per_s": self.images_per_s,
            "cpu_ms_per_image": self.cpu_ms_per_image,
        }


@dataclass(eq=False)
class _Canvas:
    picture: TiledImage
    index: int

    @property
    def tile(self) -> Tile:
        return self.picture.tiles[self.index]


class _Loop:
    """The threads, and what waits for the engine."""

    def __init__(self, model: LoadedModel, clients: int, pool_threads: int, max_batch: int) -> None:
        self.model = model
        self.clients = clients
        self.max_batch = max_batch
        self.waiting: list[_Canvas] = []
        self.begun = self.images = self.instances = self.calls = self.canvases = 0
        self.errors: list[BaseException] = []
        self.ended = False
        lock = threading.Lock()
        self.canvas_came = threading.Condition(lock)
        self.image_went = threading.Condition(lock)
        self.decoders = ThreadPoolExecutor(pool_threads)
        self.finishers = ThreadPoolExecutor(pool_threads)
        self.engines = ThreadPoolExecutor(model.backend.concurrency)

    def run(self, bodies: Sequence[bytes], seconds: float) -> None:
        """Begins images for a while and returns when all are finished."""
        for _ in range(self.model.backend.concurrency):
            self.watch(self.engines.submit(self.feed_engine))
        end_s = time.monotonic() + seconds
        for body in itertools.cycle(bodies):
            self.wait_until_in_work(self.clients - 1)
            if time.monotonic() >= end_s or self.errors:
                break
            self.begun += 1
            self.watch(self.decoders.submit(self.decode, body))
        self.wait_until_in_work(0)
        with self.canvas_came:
            self.ended = True
            self.canvas_came.notify_all()
        for pool in (self.decoders, self.finishers, self.engines):
            pool.shutdown()
        if self.errors:
            raise self.errors[0]

    def wait_until_in_work(self, most: int) -> None:
        """Waits until at most so many images are in work, or something has failed."""
        with self.image_went:
            self.image_went.wait_for(lambda: self.begun - self.images <= most or self.errors)

    def watch(self, work: Future[None]) -> None:
        """A failure ends the run instead of leaving it waiting."""

        def check(done: Future[None]) -> None:
            error = done.exception()
            if error is not None:
                with self.image_went:
                    self.errors.append(error)
                    self.image_went.notify_all()

        work.add_done_callback(check)

    def decode(self, body: bytes) -> None:
        """One image to canvases that wait."""
        decoded = decode(body, self.model.config, MAX_PIXELS, OPTIONS)
        picture = TiledImage(None, decoded, self.model.config, OPTIONS)
        with self.canvas_came:
            self.waiting += [_Canvas(picture, index) for index in range(len(picture.tiles))]
            self.canvas_came.notify()

    def take_batch(self) -> list[_Canvas]:
        """Waits for canvases: the oldest, and those of its shape. None when all is done."""
        with self.canvas_came:
            self.canvas_came.wait_for(lambda: self.waiting or self.ended)
            if not self.waiting:
                return []
            shape = self.waiting[0].tile.image.shape
            batch: list[_Canvas] = []
            rest: list[_Canvas] = []
            for canvas in self.waiting:
                fits = len(batch) < self.max_batch and canvas.tile.image.shape == shape
                (batch if fits else rest).append(canvas)
            self.waiting = rest
            self.calls += 1
            self.canvases += len(batch)
            return batch

    def feed_engine(self) -> None:
        """A thread of the engine."""
        while batch := self.take_batch():
            answers = self.model.backend.infer([canvas.tile for canvas in batch])
            answered = zip(batch, answers, strict=True)
            for _, group in itertools.groupby(answered, key=lambda pair: id(pair[0].picture)):
                self.watch(self.finishers.submit(self.finish, list(group)))

    def finish(self, answered: Sequence[tuple[_Canvas, TileCandidates]]) -> None:
        """Canvases of one image to instances; who does the last of them writes the answer."""
        picture = answered[0][0].picture
        written = [picture.search(canvas.index, candidates) for canvas, candidates in answered]
        if any(written) and picture.answer is not None:
            with self.image_went:
                self.images += 1
                self.instances += picture.answer.instances
                self.image_went.notify()


def run_bare_loop(
    model: LoadedModel,
    bodies: Sequence[bytes],
    *,
    clients: int,
    seconds: float,
    pool_threads: int | None = None,
    max_batch: int = 8,
) -> BareRun:
    """Runs the loop for a while; what was begun is finished.

    Args:
        model: With its engine, which is called by as many threads as it takes.
        bodies: Encoded images, used in turn.
        clients: Images in work at once.
        seconds: For which new images are begun.
        pool_threads: That decode, and as many that post-process and encode; default: real cores.
        max_batch: Canvases in one engine call; the model's limit also holds.

    Raises:
        ValueError: There are no images, or no clients.
        Exception: What a step raised; the run ends with the first.
    """
    if not bodies or clients < 1:
        raise ValueError(f"{len(bodies)} images and {clients} clients: at least one of each")
    most = min(max_batch, model.config.limits.max_batch)
    loop = _Loop(model, clients, pool_threads or count_cores(), most)
    began_s, cpu_began_s = time.perf_counter(), time.process_time()
    loop.run(bodies, seconds)
    return BareRun(
        images=loop.images,
        instances=loop.instances,
        calls=loop.calls,
        canvases=loop.canvases,
        seconds=time.perf_counter() - began_s,
        cpu_s=time.process_time() - cpu_began_s,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cores = count_cores()
    parser.add_argument("--model", type=Path, default=Path("model_repo/nuclei"))
    parser.add_argument("--images", type=Path, default=Path("tests/data/nuclei/images"))
    parser.add_argument("--clients", type=int, default=16, help="images in work at once")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--warm-up-s", type=float, default=1, help="before that, not counted")
    parser.add_argument("--threads", type=int, default=cores, help="of one engine call")
    parser.add_argument("--engine-slots", type=int, help="engine calls at once")
    parser.add_argument("--pool-threads", type=int, default=cores)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the numbers, with the command")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    engine = BackendOptions(device="cpu", threads=arguments.threads, slots=arguments.engine_slots)
    model = load_version(arguments.model, options=engine)
    bodies = [path.read_bytes() for path in sorted(arguments.images.iterdir())]
    for clients, seconds in ((1, arguments.warm_up_s), (arguments.clients, arguments.seconds)):
        run = run_bare_loop(
            model,
            bodies,
            clients=clients,
            seconds=seconds,
            pool_threads=arguments.pool_threads,
            max_batch=arguments.max_batch,
        )
    numbers: dict[str, Any] = {
        "model": f"{model.config.name} {model.version}",
        "clients": arguments.clients,
        **run.describe(),
    }
    print(json.dumps(numbers))
    if arguments.json is not None:
        payload = {"machine": describe_machine(), **numbers}
        write_report(arguments.json, this_command("benchmarks.bare"), payload)
    model.backend.close()


if __name__ == "__main__":
    main()
