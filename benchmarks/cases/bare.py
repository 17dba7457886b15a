"""The bare loop: decode, engine, post-process and encode of images, without a server.

An upper bound for a server whose own layer cost nothing: the server's steps, each image from its
bytes to its answer in one thread, with an engine call of one thread. No event loop, queue,
deadlines or metrics. The threads share the interpreter's lock.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from benchmarks.harness.process import ChildProcess
from benchmarks.harness.report import Report
from benchmarks.harness.server import ONE_BLAS_THREAD
from benchmarks.inputs import IMAGES, NUCLEI, Workload, read_images
from benchmarks.ours import LoadedModel, load_model, segment
from service.cores import count_cores


@dataclass(frozen=True)
class BareRun:
    """A run of the loop.

    Attributes:
        images: Finished.
        instances: Found in them.
        seconds: From the first image's start to the last one's end.
        cpu_s: CPU time of the process meanwhile.
        images_per_s: Throughput.
        cpu_ms_per_image: Cost.
    """

    images: int
    instances: int
    seconds: float
    cpu_s: float

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    @property
    def cpu_ms_per_image(self) -> float:
        return 1e3 * self.cpu_s / self.images


def bare(
    *,
    model: Annotated[Path, "folder of the model"] = NUCLEI,
    images: Annotated[Path, "folder of the images"] = IMAGES,
    threads: Annotated[int, "images in progress at once"] = count_cores(),
    seconds: Annotated[float, "length"] = 10,
    warm_up_s: Annotated[float, "before that, not counted"] = 1,
) -> Report:
    loaded = load_model(model)
    bodies = read_images(images)
    for length in (warm_up_s, seconds):
        run = run_bare_loop(loaded, bodies, threads=threads, seconds=length)
    loaded.backend.close()
    rates = {"images_per_s": run.images_per_s, "cpu_ms_per_image": run.cpu_ms_per_image}
    name = f"{loaded.config.name} {loaded.version}"
    row = {"model": name, "threads": threads, **asdict(run), **rates}
    return Report(data=row, tables={"": [row]})


def run_bare_loop(
    model: LoadedModel, bodies: Sequence[bytes], *, threads: int, seconds: float
) -> BareRun:
    """Runs the loop for a time; images that were begun are finished.

    Args:
        model: With its engine.
        bodies: Encoded images, used in turn.
        threads: Images in progress at once.
        seconds: No image is begun later than this; each thread begins at least one.

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
            return [segment(model, body) for body in take()]
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


def run_bare_processes(workload: Workload, count: int, seconds: float) -> dict[str, float]:
    """The loop in a process for each core, all at once, each of one thread."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        for file, data in workload.images.items():
            (folder / file).write_bytes(data)
        command = [sys.executable, "-m", "benchmarks.sides.bare", f"{workload.model}", f"{folder}"]
        processes = [
            stack.enter_context(ChildProcess(command, environment=ONE_BLAS_THREAD))
            for _ in range(count)
        ]
        for process in processes:
            process.ask("0")  # warms up
        with ThreadPoolExecutor(count) as pool:
            found = list(pool.map(lambda process: process.ask(f"{seconds}"), processes))
    images = sum(one["images"] for one in found)
    return {
        "images_per_s": sum(one["images"] / one["seconds"] for one in found),
        "cpu_ms_per_image": 1e3 * sum(one["cpu_s"] for one in found) / images,
    }
