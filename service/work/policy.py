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
        batch: Whether canvases of different images share engine calls.
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
    """Batches on a GPU; on the CPU, where they gain nothing, an image keeps its thread.

    An engine call that uses several cores is batched on the CPU too, so that one image is decoded
    while the engine has another.

    Args:
        settings: Threads, batch size and delay.
        engine: The model's.
        limits: The model's, from config.json.
    """
    current = engine.current
    on_cpu, calls = current.device == "cpu", current.concurrency
    delay_ms = settings.max_delay_ms
    one_core_a_call = calls > 1 or (limits.threads or settings.threads) == 1
    if on_cpu and not delay_ms and one_core_a_call:
        threads = min(settings.pool_threads, calls)
        return Policy(threads=threads, helpers=calls - threads, calls=calls)
    if delay_ms is None:
        delay_ms = 0.0 if on_cpu else GPU_DELAY_MS
    return Policy(
        threads=settings.pool_threads + calls,
        calls=calls,
        batch=True,
        max_batch=min(settings.max_batch, limits.max_batch),
        max_delay_s=delay_ms / 1000,
    )
