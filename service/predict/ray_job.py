"""A run on Ray: Ray Data reads the images and hands them to actors that have the model loaded.

What an actor does with an image is what `Job` does, so the results are the same. The journal
stays with the command: only it writes, whatever becomes of the others.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import socket
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from pipeline.model_config import ModelConfig
from service.engines.base import BackendOptions
from service.errors import StartupError
from service.models.repository import load_version
from service.predict.errors import ImageFailed, RunFailed
from service.predict.files import ImageFile, as_text, read_file, stamp_of
from service.predict.job import Found, Item, Notes, find
from service.predict.predictors import Bounds, LocalPredictor

try:
    import pyarrow as pa
    import ray
    import ray.data
except ImportError as error:
    raise StartupError(f"--ray needs Ray Data: pip install 'solo-serve[ray]' ({error})") from error

MOST_IMAGES_A_TASK = 32
_TASKS_AN_ACTOR = 8
_TASK_RETRIES = 2
_CONNECT_S = 10
_list_nodes: Callable[[], list[dict[str, Any]]] = ray.nodes
_READ = pa.schema([("number", pa.int64()), ("data", pa.large_binary()), ("error", pa.string())])
_FOUND = pa.schema(
    [
        ("number", pa.int64()),
        ("served", pa.string()),
        ("results", pa.large_binary()),
        ("picture", pa.large_binary()),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every actor does.

    Attributes:
        folder: The model's folder, at this place on every node.
        config: Its config.json where the run was started, with the version.
        options: How the engine is built.
        bounds: Of the results.
        draw: Whether pictures are asked for.
    """

    folder: Path
    config: ModelConfig
    options: BackendOptions
    bounds: Bounds
    draw: bool


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Where it is done.

    Attributes:
        address: Of a cluster; None takes RAY_ADDRESS, or else starts Ray on this machine.
        actors: How many hold the model; None: as many as there is room for.
        cpus: Cores of each.
        gpus: GPUs of each; a half lets two share one.
    """

    address: str | None = None
    actors: int | None = None
    cpus: int = 1
    gpus: float = 0.0

    def count_actors(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """How many actors there will be.

        Args:
            nodes: Resources of each node.

        Raises:
            StartupError: There is no room for one.
        """
        if self.actors is not None:
            return self.actors
        count = sum(self._count_on(node) for node in nodes)
        if count == 0:
            raise StartupError(
                f"an actor needs {self.cpus} CPUs and {self.gpus:g} GPUs of one node, and Ray has "
                f"none such, only {[(n.get('CPU', 0), n.get('GPU', 0)) for n in nodes]} (CPUs, "
                "GPUs); see --threads and --gpus-per-actor"
            )
        return count

    def _count_on(self, node: Mapping[str, float]) -> int:
        by_cpu = int(node.get("CPU", 0) // self.cpus)
        return min(by_cpu, math.floor(node.get("GPU", 0) / self.gpus)) if self.gpus else by_cpu


def read_images(batch: pa.Table) -> pa.Table:
    """Reads the files of a task."""
    return pa.Table.from_pylist([_read(row) for row in batch.to_pylist()], _READ)


def _read(row: dict[str, Any]) -> dict[str, Any]:
    file: ImageFile = pickle.loads(row["file"])
    try:
        return {"number": row["number"], "data": read_file(file)}
    except OSError as error:
        return {"number": row["number"], "error": as_text(str(error))}


class Segmenter:
    """An actor: one loaded model.

    Raises:
        StartupError: The model cannot be used, or is another than where the run was started.
    """

    def __init__(self, plan: Plan) -> None:
        model = load_version(plan.folder, plan.config.version, plan.options)
        if model.config != plan.config:
            raise StartupError(
                f"{plan.folder}: config.json is another than where the run was started"
            )
        self._predictor = LocalPredictor(model, plan.bounds)
        self._draw = plan.draw
        # On a GPU the actor's cores decode and post-process beside the engine's calls.
        at_once = (plan.options.threads or 1) if model.backend.device == "cuda" else 1
        self._threads = ThreadPoolExecutor(at_once)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Segments the images of a task."""
        return pa.Table.from_pylist(list(self._threads.map(self._do, batch.to_pylist())), _FOUND)

    def _do(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["error"] is not None:
            return {"number": row["number"], "error": row["error"]}
        try:
            found = find(self._predictor, row["data"], draw=self._draw)
        except ImageFailed as error:
            return {"number": row["number"], "error": str(error)}
        return {
            "number": row["number"],
            "served": found.served,
            "results": orjson.dumps(found.results),
            "picture": found.picture,
        }


def _check_head(address: str) -> None:
    """Ray itself waits for minutes for a head that is not there."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise StartupError(f"Ray at {address}: {error}") from error


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Uses the Ray that this process is connected to, or connects it for a while.

    Raises:
        StartupError: There is no Ray at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_head(address)
    own: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray sends them unless told not to
        own = {"include_dashboard": False}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # they have no common base
        raise StartupError(f"Ray at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class RayJob:
    """A run on Ray.

    Attributes:
        plan: What is done.
        pool: Where.
        notes: Where results go.
    """

    plan: Plan
    pool: Pool
    notes: Notes

    def run(self, items: Sequence[Item]) -> Generator[tuple[Item, ImageFailed | None]]:
        """See `job.Run`; what has begun when this is closed is forgotten.

        An image on which a process ends without a word takes the others of its task with it. So
        all that have no outcome are tried once more, each in a task of its own.

        Raises:
            StartupError: There is no Ray, or no room in it.
        """
        if not items:
            return
        with connect(self.pool.address):
            nodes = [node["Resources"] for node in _list_nodes() if node["Alive"]]
            actors = self.pool.count_actors(nodes)
            size = max(1, min(MOST_IMAGES_A_TASK, len(items) // (_TASKS_AN_ACTOR * actors)))
            left = dict(enumerate(items))
            for images_a_task in (size, 1):
                for number, failure in self._do(dict(left), images_a_task, actors):
                    yield left.pop(number), failure
        for item in left.values():
            yield item, ImageFailed("its process ended or failed each time; Ray's logs say how")

    def _do(
        self, items: Mapping[int, Item], images_a_task: int, actors: int
    ) -> Generator[tuple[int, ImageFailed | None]]:
        stamps, rows = {}, []
        for number, item in items.items():
            try:
                stamps[number] = stamp_of(item.file)
            except OSError as error:
                yield number, ImageFailed(str(error))
                continue
            rows.append({"number": number, "file": pickle.dumps(item.file)})
        for row in self._segment(rows, images_a_task, actors):
            number = row["number"]
            if row["error"] is not None:
                yield number, ImageFailed(row["error"])
                continue
            found = Found(row["served"], orjson.loads(row["results"]), row["picture"])
            self.notes.note(items[number], stamps[number], found)
            yield number, None

    def _segment(
        self, rows: Sequence[Mapping[str, Any]], images_a_task: int, actors: int
    ) -> Iterator[dict[str, Any]]:
        """Rows of `_FOUND` as they come; those whose task failed are missing.

        Raises:
            RunFailed: No actor can start, or Ray has ended.
        """
        starts = range(0, len(rows), images_a_task)
        if not starts:
            return
        tasks = [pa.Table.from_pylist(rows[start : start + images_a_task]) for start in starts]
        actors = min(actors, len(tasks))
        data: ray.data.Dataset = ray.data.from_arrow(tasks)
        # A process that ends on an image takes what waits for it along; alone, nothing does.
        in_flight = 2 if images_a_task > 1 else 1
        # Reading waits for disks and networks, so it has no cores of its own, only a bound.
        data = data.map_batches(
            read_images,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,
            compute=ray.data.TaskPoolStrategy(size=2 * actors),
        )
        data = data.map_batches(
            Segmenter,
            batch_size=images_a_task,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=actors, max_tasks_in_flight_per_actor=in_flight
            ),
            num_cpus=self.pool.cpus,
            num_gpus=self.pool.gpus or None,
            fn_constructor_args=(self.plan,),
            max_task_retries=_TASK_RETRIES,
        )
        data.context.enable_progress_bars = False
        data.context.max_errored_blocks = -1
        tables: Iterable[Any] = data.iter_batches(batch_size=None, batch_format="pyarrow")
        try:
            for table in tables:
                yield from table.to_pylist()
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise RunFailed(f"Ray: {type(error).__name__}: {reason}") from error
