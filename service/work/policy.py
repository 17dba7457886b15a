"""How a scheduler uses an engine: from the settings, the engine and the model."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.model_config import Limits
from service.engines.watch import WatchedEngine
from service.settings import Settings

GPU_DELAY_MS = 5.0


@dataclass(frozen=True)
class Policy:
    """How a scheduler uses its engine.

    Attributes:
        threads: Threads that decode, call the engine and post-process.
        helpers: Further threads that only take canvases of images that are being processed.
        calls: Engine calls at once.
        batch: Whether a canvas changes threads: some call the engine, meanwhile others decode and
            post-process.
        max_batch: Canvases in a call.
        max_delay_s: How long a canvas waits for others of its shape.
    """

    threads: int
    helpers: int = 0
    calls: int = 1
    batch: bool = False
    max_batch: int = 1
    max_delay_s: float = 0.0

    def __post_init__(self) -> None:
        least = min(self.threads, self.calls, self.max_batch)
        if least < 1 or self.helpers < 0 or self.max_delay_s < 0:
            raise ValueError(f"{self} is out of range")


def choose_policy(settings: Settings, engine: WatchedEngine, limits: Limits) -> Policy:
    """Batches on a GPU, and wherever a delay is set; on the CPU batches gain nothing.

    On the CPU an image keeps its thread, unless the engine takes one call at a time: then other
    threads decode and post-process meanwhile.

    Args:
        settings: Threads, batch size and delay.
        engine: The model's.
        limits: The model's, from config.json.
    """
    current = engine.current
    on_cpu, calls, threads = current.device == "cpu", current.concurrency, settings.pool_threads
    delay_ms = settings.max_delay_ms
    share_calls = bool(delay_ms) or not on_cpu
    if not share_calls and (calls > 1 or threads == 1):
        return Policy(min(threads, calls), helpers=max(0, calls - threads), calls=calls)
    if delay_ms is None:
        delay_ms = 0.0 if on_cpu else GPU_DELAY_MS
    return Policy(
        threads=max(threads, calls) if on_cpu else threads + calls,
        calls=calls,
        batch=True,
        max_batch=min(settings.max_batch, limits.max_batch) if share_calls else 1,
        max_delay_s=delay_ms / 1000,
    )
