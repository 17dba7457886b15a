"""What the server says of an engine: to the health route and to the metrics.

An engine may change while it serves: one that is being built replaces the one that stands in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from service.engines.base import Backend, Precision
from service.models.watch import RestartingBackend


@dataclass(frozen=True)
class EngineBuild:
    """A faster engine that is made, or was made, while another serves.

    Attributes:
        status: A few words: what is done just now, or how it ended.
        progress: 0..1.
    """

    status: str
    progress: float


@dataclass(frozen=True)
class EngineState:
    """What a model is served by at the moment.

    Attributes:
        name: Kind of engine.
        device: "cpu" or "cuda".
        precision: Of its arithmetic.
        reason: Why this one.
        build: None if no other engine was to be built.
        is_alive: Whether it answers.
    """

    name: str
    device: str
    precision: Precision
    reason: str
    build: EngineBuild | None
    is_alive: bool = True


def describe_engine(backend: Backend) -> EngineState:
    """The state of an engine; one that switches has `status` and `progress` of its build."""
    is_alive = True
    if isinstance(backend, RestartingBackend):
        is_alive = backend.is_alive
        backend = backend.current
    build = None
    if hasattr(backend, "progress"):
        switching: Any = backend
        build = EngineBuild(switching.status, switching.progress)
    return EngineState(
        backend.name, backend.device, backend.precision, backend.reason, build, is_alive
    )
