"""Messages between fronts and workers, and a front's list of workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from service.errors import ServiceError
from service.protocol import ModelState
from service.scale.merged_metrics import Report
from service.work.request import ClientProfile, ImageFile, Outcome, RequestOptions


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request's images, on their way to a worker.

    Attributes:
        model: Name of the model.
        version: The version that the client named; None takes the worker's highest.
        expected: The version that the front knows as the highest.
        images: Encoded, or pixels.
        options: What the request asks for.
        client: The API key or peer address that sent it.
    """

    model: str
    version: int | None
    expected: int
    images: Sequence[ImageFile]
    options: RequestOptions
    client: ClientProfile


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of a call.

    Attributes:
        outcomes: One for each image; none if there is an error.
        model: The version that was used, if it is not the expected one.
        error: Why nothing was done.
    """

    outcomes: Sequence[Outcome] = ()
    model: ModelState | None = None
    error: ServiceError | None = None


@dataclass(frozen=True)
class Description:
    """What a worker serves, why not the rest of its repository, and the default model."""

    models: Sequence[ModelState]
    unavailable: Mapping[str, str] = field(default_factory=dict)
    default_model: str | None = None


class WorkerLost(Exception):
    """A worker or its node failed, or cannot be reached; another worker can repeat the call."""


class WorkerDied(WorkerLost):
    """The worker's process ended during the call, perhaps because of it."""


class Workers(Protocol):
    """All workers, for a front."""

    async def segment(self, call: Call) -> Answer:
        """Has one of them do it; cancelling drops the work.

        Raises:
            WorkerDied: Its process ended meanwhile.
            WorkerLost: It cannot be reached.
        """
        ...

    async def describe(self) -> Description:
        """What one of them serves.

        Raises:
            WorkerLost: It cannot be reached.
        """
        ...

    async def collect(self) -> list[Report]:
        """The metrics of every process of the application, fronts too."""
        ...
