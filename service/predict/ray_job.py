"""A run on Ray: Ray Data reads the images and passes them to actors that have the model loaded.

Actors process an image with the code that `Job` uses, so the results are the same. Only the
command writes: the journal and the pictures.
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
from service.jobs.errors import ImageUnusable, RunFailed
from service.jobs.files import ImageFile, as_text
from service.models.repository import load_version
from service.predict.job import Found, Item, Notes, find, read_data, read_stamp
from service.predict.predictors import LocalPredictor
from service.work.request import RequestOptions

try:
    import pyarrow as pa
    import ray
    import ray.data
except ImportError as error:
    raise StartupError(f"--ray requires the extra 'ray' of solo-serve: {error}") from error

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
        ("truncated", pa.bool_()),
        ("warnings", pa.large_binary()),
        ("picture", pa.large_binary()),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings of every actor.

    Attributes:
        folder: The model's folder, at the same path on every node.
        config: Its config.json where the run was started, with the version.
        options: Options of the engine.
        asked: Limits of the results, overlaps and scale.
        draw: Whether to draw pictures.
    """

    folder: Path
    config: ModelConfig
    options: BackendOptions
    asked: RequestOptions
    draw: bool


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The cluster and the actors to run in it.

    Attributes:
        address: Address of the cluster; None: RAY_ADDRESS, or else Ray is started here.
        actors: Number of actors; None: as many as fit into the cluster.
        cpus: Cores of an actor.
        gpus: GPUs of an actor; 0.5 lets two share one.
    """

    address: str | None = None
    actors: int | None = None
    cpus: int = 1
    gpus: float = 0.0

    def count_actors(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """The number of actors to start.

        Args:
            nodes: Resources of each node.

        Raises:
            StartupError: No node has room for an actor.
        """
        if self.actors is not None:
            return self.actors
        count = sum(self._count_on(node) for node in nodes)
        if count == 0:
            raise StartupError(
                f"an actor needs {self.cpus} CPUs and {self.gpus:g} GPUs of one node; the nodes "
                f"have (CPUs, GPUs): {[(n.get('CPU', 0), n.get('GPU', 0)) for n in nodes]}; change "
                "--threads or --gpus-per-actor"
            )
        return count

    def _count_on(self, node: Mapping[str, float]) -> int:
        by_cpu = int(node.get("CPU", 0) // self.cpus)
        return min(by_cpu, math.floor(node.get("GPU", 0) / self.gpus)) if self.gpus else by_cpu


def read_images(batch: pa.Table) -> pa.Table:
    """Reads the files of a task: a table of `_READ`."""
    return pa.Table.from_pylist([_read(row) for row in batch.to_pylist()], _READ)


def _read(row: dict[str, Any]) -> dict[str, Any]:
    file: ImageFile = pickle.loads(row["file"])
    try:
        return {"number": row["number"], "data": read_data(file)}
    except ImageUnusable as error:
        return {"number": row["number"], "error": as_text(error)}


class RaySegmenter:
    """An actor: one loaded model.

    Raises:
        StartupError: The model cannot be used, or differs from the one where the run was started.
    """

    def __init__(self, plan: Plan) -> None:
        model = load_version(plan.folder, plan.config.version, plan.options)
        if model.config != plan.config:
            raise StartupError(
                f"{plan.folder}: config.json differs from the one where the run was started"
            )
        self._predictor = LocalPredictor(model, plan.asked)
        self._draw = plan.draw
        # With a GPU the actor's cores decode and post-process while the engine runs.
        at_once = (plan.options.threads or 1) if model.backend.device == "cuda" else 1
        self._threads = ThreadPoolExecutor(at_once)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Segments the images of a task: a table of `_FOUND`."""
        return pa.Table.from_pylist(list(self._threads.map(self._do, batch.to_pylist())), _FOUND)

    def _do(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["error"] is not None:
            return {"number": row["number"], "error": row["error"]}
        try:
            found = find(self._predictor, row["data"], draw=self._draw)
        except ImageUnusable as error:
            return {"number": row["number"], "error": as_text(error)}
        return {
            "number": row["number"],
            "served": found.served,
            "results": orjson.dumps(found.results),
            "truncated": found.truncated,
            "warnings": orjson.dumps([*found.warnings]),
            "picture": found.picture,
        }


def _check_head(address: str) -> None:
    """Fails early if no Ray head listens; Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise StartupError(f"Ray at {address}: {error}") from error


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Uses the Ray that this process is connected to, or connects and disconnects.

    Raises:
        StartupError: Ray cannot be reached at the address, or not started.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_head(address)
    own: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # on by default
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
        plan: Settings of the actors.
        pool: The cluster and its actors.
        notes: Stores the results.
    """

    plan: Plan
    pool: Pool
    notes: Notes

    def run(self, items: Sequence[Item]) -> Generator[tuple[Item, ImageUnusable | None]]:
        """Processes the images in actors; images in progress are discarded on closing.

        When an image crashes its process, the other images of its task have no outcome either. So
        all images without an outcome are tried once more, each in a task of its own.

        Raises:
            StartupError: Ray cannot be used, or has no room for an actor.
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
            yield (
                item,
                ImageUnusable("its process ended or failed each time; Ray's logs have the reason"),
            )

    def _do(
        self, items: Mapping[int, Item], images_a_task: int, actors: int
    ) -> Generator[tuple[int, ImageUnusable | None]]:
        stamps, rows = {}, []
        for number, item in items.items():
            try:
                stamps[number] = read_stamp(item.file)
            except ImageUnusable as error:
                yield number, error
                continue
            rows.append({"number": number, "file": pickle.dumps(item.file)})
        for row in self._segment(rows, images_a_task, actors):
            number = row["number"]
            yield number, self._note(items[number], stamps[number], row)

    def _note(self, item: Item, stamp: list[int], row: Mapping[str, Any]) -> ImageUnusable | None:
        """Stores what an actor found; returns why the image has no result."""
        if row["error"] is not None:
            return ImageUnusable(row["error"])
        found = Found(
            row["served"],
            orjson.loads(row["results"]),
            row["truncated"],
            row["picture"],
            orjson.loads(row["warnings"]),
        )
        try:
            self.notes.note(item, stamp, found)
        except ImageUnusable as error:
            return error
        return None

    def _segment(
        self, rows: Sequence[Mapping[str, Any]], images_a_task: int, actors: int
    ) -> Iterator[dict[str, Any]]:
        """Rows of `_FOUND` in the order in which tasks finish, without those of failed tasks.

        Raises:
            RunFailed: No actor can start, or Ray has ended.
        """
        starts = range(0, len(rows), images_a_task)
        if not starts:
            return
        tasks = [pa.Table.from_pylist(rows[start : start + images_a_task]) for start in starts]
        actors = min(actors, len(tasks))
        data: ray.data.Dataset = ray.data.from_arrow(tasks)
        # A process that crashes loses all its tasks in flight; the second pass has one at a time.
        in_flight = 2 if images_a_task > 1 else 1
        # Reading waits for disks and networks: it reserves no cores, but has a limit of tasks.
        data = data.map_batches(
            read_images,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,
            compute=ray.data.TaskPoolStrategy(size=2 * actors),
        )
        data = data.map_batches(
            RaySegmenter,
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
