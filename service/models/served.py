"""One served version of a model: configuration, engine and scheduler."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from pipeline.model_config import ModelConfig
from service.engines.watch import WatchedEngine
from service.models.repository import LoadedModel
from service.protocol import ModelState
from service.work.scheduler import Scheduler


@dataclass(eq=False)
class ServedModel:
    """A version of a model that is served.

    Attributes:
        loaded: Its configuration, and the engine that it was loaded with.
        engine: Calls the engine of the moment.
        scheduler: Processes its canvases.
        users: Requests that use it.
        builds: Tasks that build engines for it.
        is_upgrading: Whether one of them builds a faster engine.
    """

    loaded: LoadedModel
    engine: WatchedEngine
    scheduler: Scheduler
    users: int = 0
    builds: set[asyncio.Task[None]] = field(default_factory=set)
    is_upgrading: bool = False

    @property
    def config(self) -> ModelConfig:
        """Its configuration."""
        return self.loaded.config

    @property
    def name(self) -> str:
        """The model's name."""
        return self.config.name

    @property
    def state(self) -> ModelState:
        """Its configuration and the state of its engine."""
        max_batch = self.scheduler.policy.max_batch
        return ModelState(self.config, self.engine.state, max_batch, self.loaded.asked_precision)
