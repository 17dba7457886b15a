"""Which versions of which models are served, and how that changes while they are.

Every change is one operation, `ModelStore.replace`: build and warm up the new versions in a thread,
swap them in, drain the old ones and close them. Until the swap the old ones serve; if anything
fails they go on, which is the roll-back. `renewal` replaces the engine of one version.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from service.background import run_in_thread, spawn
from service.engines.watch import WatchedEngine
from service.errors import (
    DeviceError,
    EngineRestarting,
    ModelRefused,
    ModelUnavailable,
    StartupError,
    UnknownModel,
)
from service.models.folders import explain_refusal, find_folder, read_default
from service.models.renewal import EngineRenewal
from service.models.repository import LoadedModel, Repository, load_model
from service.models.served import ServedModel
from service.observe.metrics import PIXELS, Metrics
from service.protocol import choose_default, find_model
from service.settings import Settings
from service.work.pixels import PixelBudget
from service.work.policy import choose_policy
from service.work.scheduler import CallStats, Scheduler

logger = logging.getLogger(__name__)

UNLOADED = "unloaded"
LAST_CALL_S = 1.0
"""How long an engine that is no longer used may take for what is still in flight."""
LAST_STEP_S = 1.0
"""How long the threads of a model that has ended may take for the step that each is in."""
Build = Callable[[], Mapping[int, LoadedModel]]
"""Builds versions of a model, warm; runs in a thread."""


class ModelStore:
    """The served models; used from one event loop. `start` it there, `close` it at last.

    Args:
        settings: Batching, timeouts, the default model.
        repository: Loaded models; the store closes their engines.
        metrics: Where models and their engines are counted.
        budget: Bounds the decoded images of all models.

    Attributes:
        served: By name and version.
        unavailable: Why other models of the repository, or newer versions of those that are
            served, are not; by name.
        renewal: Replaces the engines of served versions.
        on_change: Called with the name of a model that was loaded or ended.

    Raises:
        StartupError: The default model is not in the repository.
    """

    def __init__(
        self,
        settings: Settings,
        repository: Repository,
        metrics: Metrics,
        budget: PixelBudget | None = None,
    ) -> None:
        self._settings = settings
        self._repository = repository
        self._metrics = metrics
        self._budget = budget or PixelBudget()
        self.renewal = EngineRenewal(settings, repository, metrics, self._show_engine)
        self.on_change: Callable[[str], None] = lambda name: None
        self._closed = False
        self._changing = asyncio.Lock()
        self._recorded_default = repository.default
        self._retiring: set[asyncio.Task[None]] = set()
        self.unavailable: dict[str, str] = {}
        self.served: dict[str, dict[int, ServedModel]] = {
            name: {version: self._serve(model) for version, model in versions.items()}
            for name, versions in repository.models.items()
        }
        for name, error in repository.refused.items():
            self._set_unavailable(name, explain_refusal(error, self.root))
        default = settings.default_model
        known = {*self.served, *repository.refused}
        if default is not None and default not in known and not settings.models_may_change:
            raise StartupError(f"there is no default model {default!r}, only {sorted(self.served)}")
        logger.info("requests that name no model: %s", self._describe_default())

    @property
    def root(self) -> Path:
        """The repository's folder."""
        return self._repository.root

    @property
    def all_models(self) -> list[ServedModel]:
        """Every version that is served, by name and version."""
        return [self.served[n][v] for n in sorted(self.served) for v in sorted(self.served[n])]

    @property
    def default_model(self) -> str | None:
        """Name of the model of requests that name none; None if such requests are refused."""
        return choose_default(self.served, self._settings.default_model or self._recorded_default)

    def start(self) -> None:
        """Starts building faster engines, and rebuilds those that die; needs an event loop."""
        self.renewal.start()
        for model in self.all_models:
            self.renewal.start_upgrade(model)

    async def close(self, *, finished: bool) -> None:
        """Ends schedulers and engines.

        Args:
            finished: Whether all accepted work is done; else it is given up.
        """
        self._closed = True
        ends = [self._end(model, finished=finished) for model in self.all_models]
        await asyncio.gather(*ends, *self._retiring)

    def find(self, name: str | None, version: int | None) -> ServedModel:
        """The model that a request means, if its engine answers; see `Segmenter.find`."""
        model = find_model(self.served, self.unavailable, self.default_model, name, version)
        if not model.engine.is_alive:
            raise EngineRestarting(
                f"the engine of model {model.name!r} has died; another is being built"
            )
        return model

    @contextmanager
    def use(self, name: str | None, version: int | None) -> Iterator[ServedModel]:
        """As `find`; the model is not ended before the context is."""
        model = self.find(name, version)
        model.users += 1
        try:
            yield model
        finally:
            model.users -= 1

    # --- changes of a model ---------------------------------------------------------------------

    async def replace(self, name: str, build: Build) -> None:
        """Builds and warms up versions of a model, swaps them in, drains and closes the old ones.

        Requests in flight finish with the versions that they began with.

        Args:
            name: The model's.
            build: Gives all versions that are to be served; one that is served already with the
                same engine stays as it is.

        Raises:
            Exception: What `build` raised; nothing has changed.
        """
        # Not `loaded` of after the build: an engine may have been replaced meanwhile.
        kept = self._find_loaded(name)
        versions = await run_in_thread(build)
        old = self.served.pop(name, {})
        new: dict[int, ServedModel] = {}
        for version, loaded in versions.items():
            if loaded is kept.get(version):
                new[version] = old.pop(version)
            else:
                new[version] = self._serve(loaded)
                self.renewal.start_upgrade(new[version])
        if new:
            self.served[name] = new
            self.unavailable.pop(name, None)
            self._metrics.model_refused.labels(name).set(0)
        for version, replaced in old.items():
            if version not in new:
                self._metrics.remove_model(name, version)
            spawn(self._retire(replaced), self._retiring)
        self.on_change(name)

    def _find_loaded(self, name: str) -> dict[int, LoadedModel]:
        """The versions of a model that are served now, with their present engines."""
        return {version: model.loaded for version, model in self.served.get(name, {}).items()}

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
            folder = await asyncio.to_thread(find_folder, self.root, name)
            kept = self._find_loaded(name)
            try:
                await self.read_default()
            except ModelRefused as error:
                logger.error("the default model is not changed: %s", error)
            try:
                await self.replace(
                    name, partial(load_model, folder, self._repository.options, kept)
                )
            except (ModelRefused, DeviceError) as error:
                reason = explain_refusal(error, self.root)
                logger.error("model %s is not loaded: %s", name, reason)
                self._set_unavailable(name, reason)
                raise ModelUnavailable(f"model {name!r} cannot be served: {reason}") from error
            versions = sorted(self.served[name])
            logger.info(
                "model %s is served in version %s; requests that name no model: %s",
                name,
                ", ".join(map(str, versions)),
                self._describe_default(),
            )
            return versions

    async def unload(self, name: str) -> None:
        """Stops serving a model; requests that use it are finished.

        Raises:
            UnknownModel: It is not served.
        """
        async with self._changing:
            if name not in self.served:
                raise UnknownModel(f"model {name!r} is not served, only {sorted(self.served)}")
            await self.replace(name, dict)
            self._set_unavailable(name, UNLOADED)

    async def _retire(self, model: ServedModel) -> None:
        """Ends a version that is no longer found, when no request uses it."""
        deadline_s = time.monotonic() + self._settings.drain_timeout_s
        while model.users and not self._closed and time.monotonic() < deadline_s:
            await asyncio.sleep(0.01)
        await self._end(model, finished=not model.users)
        logger.info("model %s version %d has ended", model.name, model.loaded.version)

    @staticmethod
    async def _end(model: ServedModel, *, finished: bool) -> None:
        if finished and model.engine.is_alive:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_CALL_S):
                    await model.scheduler.drain()
        for task in model.builds:
            task.cancel()
        await model.scheduler.abort()
        model.engine.close()
        await asyncio.to_thread(model.scheduler.join, LAST_STEP_S)

    # --- the repository on disk -----------------------------------------------------------------

    async def remove(self, name: str) -> None:
        """Ends a model that is no longer in the repository; requests that use it are finished."""
        async with self._changing:
            if name in self.served:
                await self.replace(name, dict)
            self.unavailable.pop(name, None)
            self._metrics.forget_model(name)
            logger.info("model %s is no longer in the repository", name)

    async def read_default(self) -> None:
        """Takes over the default model that repository.json names.

        Raises:
            ModelRefused: The file is wrong; the default stays as it is.
        """
        found = await asyncio.to_thread(read_default, self.root)
        if found != self._recorded_default:
            self._recorded_default = found
            logger.info("requests that name no model: %s", self._describe_default())

    def _describe_default(self) -> str:
        if self.default_model is None:
            return f"refused, because none of {sorted(self.served)} is the default"
        state = "" if self.default_model in self.served else ", which is not served"
        return f"model {self.default_model}{state}"

    def _set_unavailable(self, name: str, reason: str) -> None:
        self.unavailable[name] = reason
        self._metrics.model_refused.labels(name).set(reason != UNLOADED)

    def _serve(self, loaded: LoadedModel) -> ServedModel:
        name = loaded.config.name

        sizes = self._metrics.batch_size.labels(name, loaded.version)
        failures = self._metrics.engine_failures.labels(name)
        shown, padding = (self._metrics.pixels.labels(name, kind) for kind in PIXELS)

        def count_call(stats: CallStats) -> None:
            sizes.observe(stats.size)
            failures.inc(stats.failed)
            shown.inc(stats.shown_px)
            padding.inc(stats.padding_px)

        engine = WatchedEngine(
            loaded.backend,
            loaded.probe,
            timeout_s=self._settings.engine_timeout_s,
            on_death=lambda reason: self.renewal.report_death(model),
        )
        policy = choose_policy(self._settings, engine, loaded.config)
        scheduler = Scheduler(engine, policy, self._budget, count_call)
        model = ServedModel(loaded, engine, scheduler)
        self._announce(model)
        return model

    def _show_engine(self, model: ServedModel) -> None:
        """Shows the new engine of a version, if it is still served."""
        if self.served.get(model.name, {}).get(model.loaded.version) is model:
            self._announce(model)

    def _announce(self, model: ServedModel) -> None:
        """Shows a served version in the metrics."""
        state = model.state
        self._metrics.add_model(
            state.name,
            state.version,
            lambda: model.engine.state,
            state.max_batch,
            state.asked_precision,
        )
