"""New engines of served versions: in place of those that have died, and faster ones."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from pipeline.errors import ConfigError
from service.background import run_in_thread, spawn
from service.engines.base import BackendError
from service.engines.builder import Upgrade
from service.engines.state import EngineBuild
from service.errors import ModelRefused
from service.models.repository import LoadedModel, Repository
from service.models.served import ServedModel
from service.observe.metrics import Metrics
from service.settings import Settings
from service.work.policy import choose_policy

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
REBUILD_S = 600.0
"""Longest rebuild; one that takes longer hangs, and so would the next one."""


class EngineRenewal:
    """Replaces the engine of a served version, which keeps its scheduler and its requests.

    Args:
        settings: Batching, and how often a rebuild may fail.
        repository: Builds engines of its versions again.
        metrics: Counts engines that were replaced because they had died.
        announce: Called with a version that has a new engine.

    Attributes:
        failure: Why the process must be replaced, see `Segmenter`.
    """

    def __init__(
        self,
        settings: Settings,
        repository: Repository,
        metrics: Metrics,
        announce: Callable[[ServedModel], None],
    ) -> None:
        self.failure: str | None = None
        self._settings = settings
        self._repository = repository
        self._metrics = metrics
        self._announce = announce
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """From now on engines are replaced, in the running event loop."""
        self._loop = asyncio.get_running_loop()

    async def replace(self, model: ServedModel, build: Callable[[], LoadedModel]) -> None:
        """Builds and warms up an engine, swaps it in, drains and closes the old one.

        Args:
            model: If it has been closed meanwhile, the new engine is closed.
            build: Gives the same version with another engine, warm; runs in a thread.

        Raises:
            Exception: What `build` raised; nothing has changed.
        """
        model.loaded = await run_in_thread(build, lambda loaded: loaded.backend.close())
        model.engine.swap(model.loaded.backend)
        model.scheduler.adopt(choose_policy(self._settings, model.engine, model.config))
        self._announce(model)
        self.start_upgrade(model)

    def report_death(self, model: ServedModel) -> None:
        """An engine has died; any thread may call this."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(lambda: spawn(self._rebuild(model), model.builds))

    async def _rebuild(self, model: ServedModel) -> None:
        """Replaces a dead engine; tries until it succeeds, or the model has ended.

        After too many failures of engines the process is given up: an error of CUDA may last until
        the process ends. A model's files may be repaired, so for them there is no limit.
        """
        pause_s, failures = FIRST_PAUSE_S, 0
        build = partial(self._build_again, model.loaded)
        while not model.engine.is_closed:
            try:
                async with asyncio.timeout(REBUILD_S):
                    await self.replace(model, build)
            except TimeoutError:
                self._give_up(model, f"an attempt to replace it hangs for {REBUILD_S:g} s")
                return
            except Exception as error:  # the cause may be temporary
                failures += not _is_of_files(error)
                if failures == self._settings.max_rebuilds:
                    self._give_up(model, f"{failures} attempts to replace it failed: {error!r}")
                    return
                logger.error("no new engine yet, next attempt in %g s: %s", pause_s, error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                engine = model.engine.current
                logger.info("a new engine is ready on %s (%s)", engine.device, engine.name)
                self._metrics.engine_restarts.labels(model.name).inc()
                return

    def _build_again(self, loaded: LoadedModel) -> LoadedModel:
        """The same version with another engine on the same device.

        Raises:
            BackendError: The new engine has fallen back to another device.
        """
        rebuilt = self._repository.rebuild(loaded)
        device = rebuilt.backend.device
        if device != loaded.backend.device:
            rebuilt.backend.close()
            raise BackendError(f"the new engine is on {device}, not on {loaded.backend.device}")
        return rebuilt

    def _give_up(self, model: ServedModel, reason: str) -> None:
        """Has the process replaced; what waits for the engine fails."""
        self.failure = f"the engine of model {model.name!r} has failed: {reason}"
        logger.error("%s", self.failure)
        model.engine.close()

    def start_upgrade(self, model: ServedModel) -> None:
        """Builds a faster engine in the background, if the current one names one; one at a time."""
        upgrade: Upgrade | None = getattr(model.engine.current, "upgrade", None)
        if upgrade is not None and self._loop is not None and not model.is_upgrading:
            model.is_upgrading = True
            spawn(self._upgrade(model, upgrade), model.builds)

    async def _upgrade(self, model: ServedModel, upgrade: Upgrade) -> None:
        engine, loaded = model.engine, model.loaded

        def report(status: str, progress: float) -> None:
            engine.build = EngineBuild(status, progress)

        def build() -> LoadedModel:
            report("building the engine", 0.0)
            upgrade.build(report)
            report("loading", 1.0)
            backend = upgrade.load()
            try:
                loaded.probe(backend)
            except BaseException:
                backend.close()
                raise
            return replace(loaded, backend=backend)

        try:
            await self.replace(model, build)
        except asyncio.CancelledError:
            upgrade.cancel()
            raise
        except Exception as error:
            report(f"failed: {error}", engine.build.progress if engine.build else 0.0)
            logger.error("%s goes on, the faster engine failed: %s", loaded.backend.name, error)
        else:
            report("done", 1.0)
            logger.info("the engine is %s now", engine.current.name)
        finally:
            model.is_upgrading = False


def _is_of_files(error: Exception) -> bool:
    """Whether a model's files are the reason that there is no engine, not the engine."""
    cause = error.__cause__
    reads = cause is None or isinstance(cause, (OSError, ConfigError))
    return isinstance(error, ModelRefused) and reads
