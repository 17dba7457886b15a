"""The state of an engine, for the health route and the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from service.engines.base import Precision


@dataclass(frozen=True)
class EngineBuild:
    """A faster engine that is being built, or was, while another serves.

    Attributes:
        status: What is done at the moment, or how it ended.
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
        canvas_s: Seconds of a canvas, by engine and precision, where they were timed to choose one.
    """

    name: str
    device: str
    precision: Precision
    reason: str
    build: EngineBuild | None = None
    is_alive: bool = True
    canvas_s: Mapping[str, float] = field(default_factory=dict)
