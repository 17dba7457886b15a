"""The shadows of all models: started, ended and concluded as config.json says.

A verdict is written into config.json: a promoted version is served alone from then on, and after a
rejection the served one stays. Then the model is loaded again, as after any change of the file.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.repository_config import RepositoryConfig, ShadowedVersion
from service.background import run_in_thread, spawn
from service.engines.base import BackendOptions
from service.errors import DeviceError, ModelRefused
from service.models.folders import explain_refusal, read_repository_config
from service.models.publishing import edit_config
from service.models.repository import load_version
from service.models.shadow import ShadowRun
from service.models.shadow_rule import ShadowTally, Verdict, describe_shadow
from service.observe.shadow_metrics import ShadowMetrics
from service.protocol import ShadowState
from service.settings import Settings
from service.work.request import ImageFile, Outcome, RequestOptions

logger = logging.getLogger(__name__)


class Shadows:
    """Used from one event loop.

    Args:
        settings: Largest image, longest engine call.
        root: The repository.
        options: How engines are built.
        metrics: Where shadows are counted.
        is_served: Whether a model is served now.
        is_idle: Whether no request is in flight; called by any thread.
        reload: Serves what a model's config.json says now.
    """

    def __init__(
        self,
        settings: Settings,
        root: Path,
        options: BackendOptions,
        metrics: ShadowMetrics,
        *,
        is_served: Callable[[str], bool],
        is_idle: Callable[[], bool],
        reload: Callable[[str], Awaitable[object]],
    ) -> None:
        self._settings = settings
        self._root = root
        self._options = options
        self._metrics = metrics
        self._is_served = is_served
        self._is_idle = is_idle
        self._reload = reload
        self._runs: dict[str, ShadowRun] = {}
        self._ended: dict[str, ShadowState] = {}
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def state_of(self, name: str) -> ShadowState | None:
        """Of the model's shadow: the one that runs, or else the last one that had a verdict."""
        run = self._runs.get(name)
        return self._ended.get(name) if run is None else run.state

    def offer(
        self,
        name: str,
        version: int,
        images: Sequence[ImageFile],
        options: RequestOptions,
        outcomes: Sequence[Outcome],
    ) -> None:
        """Shows a shadow what its model has answered; never fails."""
        run = self._runs.get(name)
        if run is None or run.policy.live != version:
            return
        try:
            run.offer(images, options, outcomes)
        except Exception:  # a request must not fail because of it
            logger.exception("the shadow of model %s is not shown a request", name)

    def follow(self, name: str) -> None:
        """Begins or ends the shadow of a model, as its config.json says now; returns at once."""
        if not self._is_closed:
            spawn(self._follow(name), self._tasks)

    async def close(self) -> None:
        """Ends all shadows."""
        self._is_closed = True
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for run in self._runs.values():
            await run.close()

    async def _follow(self, name: str) -> None:
        async with self._changing:
            policy = await asyncio.to_thread(self._read_policy, name)
            run = self._runs.get(name)
            if run is not None and run.policy == policy:
                return
            if run is not None:
                del self._runs[name]
                await run.close()
            if policy is not None:
                self._ended.pop(name, None)
                await self._start(name, policy)

    def _read_policy(self, name: str) -> ShadowedVersion | None:
        if not self._is_served(name):
            return None
        try:
            policy = read_repository_config(self._root / name).serve
        except (OSError, ConfigError):  # what is loaded goes on without a shadow
            return None
        return policy if isinstance(policy, ShadowedVersion) else None

    async def _start(self, name: str, policy: ShadowedVersion) -> None:
        build = partial(load_version, self._root / name, policy.shadow, self._options)
        try:
            loaded = await run_in_thread(build, lambda loaded: loaded.backend.close())
        except (ModelRefused, DeviceError) as error:
            reason = explain_refusal(error, self._root)
            logger.error("version %d of model %s is no shadow: %s", policy.shadow, name, reason)
            self._ended[name] = describe_shadow(policy, ShadowTally(), "failed", reason)
            return
        logger.info(
            "version %d of model %s segments %g of the images of version %d too",
            *(policy.shadow, name, policy.share, policy.live),
        )
        self._runs[name] = ShadowRun(
            name,
            policy,
            loaded,
            self._metrics,
            is_idle=self._is_idle,
            max_pixels=self._settings.max_image_pixels,
            call_timeout_s=self._settings.engine_timeout_s,
            on_verdict=lambda *found: spawn(self._conclude(name, *found), self._tasks),
        )

    async def _conclude(self, name: str, verdict: Verdict, reason: str) -> None:
        async with self._changing:
            run = self._runs.pop(name, None)
            if run is None:  # config.json has changed meanwhile
                return
            policy = run.policy
            self._ended[name] = describe_shadow(policy, run.tally, verdict, reason)
            await run.close()
            self._metrics.decisions.labels(name, verdict).inc()
            logger.warning("version %d of model %s is %s: %s", policy.shadow, name, verdict, reason)
            try:
                await asyncio.to_thread(record_verdict, self._root / name, policy, verdict)
                await self._reload(name)
            except Exception as error:  # the served version goes on
                logger.error("model %s: the verdict cannot be carried out: %s", name, error)
                failed = f"{reason}; it cannot be carried out: {error}"
                self._ended[name] = replace(self._ended[name], status="failed", reason=failed)


def record_verdict(folder: Path, policy: ShadowedVersion, verdict: Verdict) -> None:
    """Writes which version is served from now on; nothing if config.json has another policy now.

    Args:
        folder: The model's.
        policy: The one that has led to the verdict.
        verdict: What follows.

    Raises:
        OSError, ModelRefused: config.json cannot be changed.
    """
    version = policy.shadow if verdict == "promoted" else policy.live

    def change(content: dict[str, Any], before: RepositoryConfig) -> None:
        if before.serve == policy:
            content["serve"] = {"policy": "specific", "versions": [version]}

    edit_config(folder, change)
