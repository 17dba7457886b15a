"""What travels between fronts and workers, and what a front knows of the workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.model_config import ModelConfig
from service.errors import ServiceError
from service.models.engine_state import EngineState
from service.scale.merged_metrics import Report
from service.work.stages import ImageFile, Outcome
from service.work.steps import Options


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request's images.

    Attributes:
        model: Name of the model.
        version: The version that the client named; None takes the worker's highest.
        expected: The version that the front would take.
        images: Encoded, or pixels.
        options: What the request asks for.
    """

    model: str
    version: int | None
    expected: int
    images: Sequence[ImageFile]
    options: Options


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of a call.

    Attributes:
        outcomes: One for each image; none if there is an error.
        version: Of the model that was used.
        config: Of the model, if `version` is not the expected one.
        error: Why nothing was done.
    """

    outcomes: Sequence[Outcome] = ()
    version: int = 0
    config: ModelConfig | None = None
    error: ServiceError | None = None


@dataclass(frozen=True)
class ModelState:
    """A served version of a model."""

    config: ModelConfig
    version: int
    engine: EngineState


@dataclass(frozen=True)
class Description:
    """What a worker serves, and why it does not serve the rest of its repository."""

    models: Sequence[ModelState]
    unavailable: Mapping[str, str] = field(default_factory=dict)


class WorkerLost(Exception):
    """A worker or its node died with a call in work; another one may do it."""


class Workers(Protocol):
    """All workers, for a front."""

    async def segment(self, call: Call) -> Answer:
        """Has one of them do it; cancelling drops the work.

        Raises:
            WorkerLost: It died.
        """
        ...

    async def describe(self) -> Description:
        """What one of them serves.

        Raises:
            WorkerLost: It died.
        """
        ...

    async def collect(self) -> list[Report]:
        """The metrics of every process of the application, fronts too."""
        ...
