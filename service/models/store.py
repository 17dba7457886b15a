"""Which versions of which models are served, and how that changes while they are.

    load: read config.json -> build and warm the new engines -> swap -> drain the old ones

Until the swap the old versions serve, and if anything fails they go on: that is the roll-back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from service.errors import (
    EngineRestarting,
    ModelRefused,
    ModelUnavailable,
    StartupError,
    UnknownModel,
    UnknownVersion,
)
from service.models.engine_state import describe_engine
from service.models.repository import CONFIG_FILE, LoadedModel, Repository, load_model
from service.models.watch import RestartingBackend
from service.observe.metrics import Metrics
from service.settings import Settings
from service.work.batcher import BatchStats, DynamicBatcher
from service.work.lanes import Lanes
from service.work.stages import ServedModel

logger = logging.getLogger(__name__)

UNLOADED = "unloaded"
GPU_DELAY_MS = 5.0
LAST_CALL_S = 1.0
"""How long an engine that is no longer used may go on with what nobody waits for."""


class ModelStore:
    """The served models; `start` it in the event loop, `close` it at last.

    Args:
        settings: Batching, time-outs, the default model.
        repository: Loaded models; the store closes them.
        metrics: Where models and their engines are counted.

    Attributes:
        served: By name and version.
        unavailable: Why other models of the repository, or newer versions of those that are
            served, are not; by name.

    Raises:
        StartupError: The default model is not in the repository.
    """

    def __init__(self, settings: Settings, repository: Repository, metrics: Metrics) -> None:
        self._settings = settings
        self._repository = repository
        self._metrics = metrics
        self._running = False
        self._changing = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        self.unavailable: dict[str, str] = {}
        self.served: dict[str, dict[int, ServedModel]] = {
            name: {version: self._serve(model) for version, model in versions.items()}
            for name, versions in repository.models.items()
        }
        for name, error in repository.refused.items():
            self._set_unavailable(name, self._explain(error))
        default = settings.default_model
        if default is not None and default not in {*self.served, *repository.refused}:
            raise StartupError(f"there is no default model {default!r}, only {sorted(self.served)}")

    @property
    def root(self) -> Path:
        """The repository's folder."""
        return self._repository.root

    @property
    def all_models(self) -> list[ServedModel]:
        """Every version that is served, by name and version."""
        return [self.served[n][v] for n in sorted(self.served) for v in sorted(self.served[n])]

    def start(self) -> None:
        """Starts the batchers; needs a running event loop."""
        self._running = True
        for model in self.all_models:
            model.feeder.start()

    async def close(self, *, finished: bool) -> None:
        """Ends batchers and engines.

        Args:
            finished: Whether all accepted work is done; else it is given up.
        """
        self._running = False
        for model in self.all_models:
            await self._end(model, finished=finished)
        await asyncio.gather(*self._retiring)

    def find(self, name: str | None, version: int | None) -> ServedModel:
        """The model that a request means, if its engine can take work.

        Args:
            name: None takes the default model.
            version: None takes the highest that is served.

        Raises:
            UnknownModel: There is none of that name.
            ModelUnavailable: It is in the repository, but not served.
            UnknownVersion: It is not served in this version.
            EngineRestarting: Its engine has died and another is being built.
        """
        if name is None:
            name = self._settings.default_model or min(self.served, default="")
        if name not in self.served:
            if name in self.unavailable:
                raise ModelUnavailable(f"model {name!r} is not served; see GET /v2/models")
            raise UnknownModel(f"there is no model {name!r}, only {sorted(self.served)}")
        versions = self.served[name]
        model = versions.get(max(versions) if version is None else version)
        if model is None:
            raise UnknownVersion(
                f"model {name!r} is served in version {', '.join(map(str, sorted(versions)))}, "
                f"not {version}"
            )
        if not model.engine.is_alive:
            raise EngineRestarting(f"the engine of model {name!r} has died; another is being built")
        return model

    @contextmanager
    def use(self, name: str | None, version: int | None) -> Iterator[ServedModel]:
        """`find`; the model stays until the request is answered, whatever is loaded meanwhile."""
        model = self.find(name, version)
        model.users += 1
        try:
            yield model
        finally:
            model.users -= 1

    async def load(self, name: str) -> list[int]:
        """Serves what config.json says now; versions that have not changed stay as they are.

        Args:
            name: A folder of the repository.

        Returns:
            The versions that are served.

        Raises:
            UnknownModel: There is no such folder.
            ModelUnavailable: It cannot be served; what was served before still is.
        """
        async with self._changing:
            folder = self._find_folder(name)
            old = self.served.get(name, {})
            kept = {version: model.loaded for version, model in old.items()}
            build = partial(load_model, folder, self._repository.options, kept)
            try:
                loaded = await asyncio.to_thread(build)
            except ModelRefused as error:
                reason = self._explain(error)
                logger.error("model %s is not loaded: %s", name, reason)
                self._set_unavailable(name, reason)
                raise ModelUnavailable(f"model {name!r} cannot be served: {reason}") from error
            self._swap(name, loaded)
            return sorted(loaded)

    async def unload(self, name: str) -> None:
        """Stops serving a model; requests that have it in use are finished.

        Raises:
            UnknownModel: It is not served.
        """
        async with self._changing:
            if name not in self.served:
                raise UnknownModel(f"model {name!r} is not served, only {sorted(self.served)}")
            self._swap(name, {})
            self._set_unavailable(name, UNLOADED)

    async def poll(self, interval_s: float) -> None:
        """Loads what changes in the repository and unloads what vanishes; never returns."""
        seen: dict[str, tuple[int, int]] = {}  # so that a change during the start is not missed
        while True:
            await asyncio.sleep(interval_s)
            now = await asyncio.to_thread(self._read_stamps)
            for name in sorted(name for name, stamp in now.items() if seen.get(name) != stamp):
                try:
                    versions = await self.load(name)
                except (ModelUnavailable, UnknownModel) as error:
                    logger.error("the repository has changed: %s", error)
                else:
                    logger.info("model %s has changed, served in version %s", name, versions)
            for name in sorted(set(seen) - set(now)):
                self.unavailable.pop(name, None)
                if name in self.served:
                    await self.unload(name)
            seen = now

    def _read_stamps(self) -> dict[str, tuple[int, int]]:
        stamps = {}
        for file in self.root.glob(f"[!.]*/{CONFIG_FILE}"):
            try:
                status = file.stat()
            except OSError:
                continue
            stamps[file.parent.name] = status.st_mtime_ns, status.st_size
        return stamps

    def _find_folder(self, name: str) -> Path:
        """A folder by a name from outside: looked up, never joined into a path."""
        for folder in self.root.iterdir():
            if folder.name == name and folder.is_dir() and not name.startswith("."):
                return folder
        raise UnknownModel(f"the repository has no folder {name!r}")

    def _swap(self, name: str, loaded: Mapping[int, LoadedModel]) -> None:
        old = self.served.pop(name, {})
        new: dict[int, ServedModel] = {}
        for version, model in loaded.items():
            same = old.get(version)
            if same is not None and same.loaded is model:
                new[version] = old.pop(version)
                continue
            new[version] = self._serve(model)
            if self._running:
                new[version].feeder.start()
        if new:
            self.served[name] = new
            self.unavailable.pop(name, None)
            self._metrics.model_refused.labels(name).set(0)
        for version, replaced in old.items():
            if version not in new:
                self._metrics.remove_model(name, version)
            task = asyncio.get_running_loop().create_task(self._retire(replaced))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def _retire(self, model: ServedModel) -> None:
        """Ends a model that is no longer found, once nobody uses it."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._settings.drain_timeout_s
        while model.users and loop.time() < deadline_s:
            await asyncio.sleep(0.01)
        await self._end(model, finished=not model.users)
        logger.info("model %s version %d has ended", model.name, model.loaded.version)

    @staticmethod
    async def _end(model: ServedModel, *, finished: bool) -> None:
        if finished and model.engine.is_alive:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_CALL_S):
                    await model.feeder.drain()
        await model.feeder.abort()
        model.engine.close()  # nobody waits for it, or for another, any more

    def _set_unavailable(self, name: str, reason: str) -> None:
        self.unavailable[name] = reason
        self._metrics.model_refused.labels(name).set(reason != UNLOADED)

    def _explain(self, error: ModelRefused) -> str:
        """Why a model is refused, without the folders above the repository."""
        return f"{error.file.relative_to(self.root)}: {error.reason}"

    def _serve(self, model: LoadedModel) -> ServedModel:
        name = model.config.name

        def count_restart(alive: bool) -> None:
            if alive:
                self._metrics.engine_restarts.labels(name).inc()

        def count_batch(stats: BatchStats) -> None:
            self._metrics.batch_size.labels(name).observe(stats.size)
            if stats.failed:
                self._metrics.engine_failures.labels(name).inc()

        engine = RestartingBackend(
            model.backend,
            lambda: self._repository.rebuild(model),
            model.probe,
            timeout_s=self._settings.engine_timeout_s,
            on_restart=count_restart,
        )
        feeder = self._build_feeder(engine, model, count_batch)
        self._metrics.add_model(
            name, model.version, partial(describe_engine, engine), feeder.max_batch
        )
        return ServedModel(model, engine, feeder)

    def _build_feeder(
        self,
        engine: RestartingBackend,
        model: LoadedModel,
        on_call: Callable[[BatchStats], None],
    ) -> DynamicBatcher | Lanes:
        """Batches, or lanes if engine calls take turns on a CPU's cores with nothing to gain."""
        settings, limits = self._settings, model.config.limits
        on_cpu = engine.device == "cpu"  # there a batch costs what its canvases cost one by one
        delay_ms = settings.max_delay_ms
        if on_cpu and not delay_ms:
            has_cores_of_its_own = (limits.threads or settings.threads) == 1
            if engine.concurrency > 1 or has_cores_of_its_own:
                return Lanes(engine, images=settings.pool_threads, on_call=on_call)
        if delay_ms is None:
            delay_ms = 0.0 if on_cpu else GPU_DELAY_MS
        return DynamicBatcher(
            engine,
            max_batch=min(settings.max_batch, limits.max_batch),
            max_delay_s=delay_ms / 1000,
            on_batch=on_call,
        )
