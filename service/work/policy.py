"""How a scheduler uses an engine: from the settings, the engine and the model."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.canvases import find_padding
from pipeline.model_config import Canvas, ModelConfig
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
        canvases: What canvases are padded to, so that more have one shape; empty: they are not.
    """

    threads: int
    helpers: int = 0
    calls: int = 1
    batch: bool = False
    max_batch: int = 1
    max_delay_s: float = 0.0
    canvases: tuple[Canvas, ...] = ()

    def __post_init__(self) -> None:
        least = min(self.threads, self.calls, self.max_batch)
        if least < 1 or self.helpers < 0 or self.max_delay_s < 0:
            raise ValueError(f"{self} is out of range")

    @property
    def max_ahead(self) -> int:
        """Canvases that are created before the engine takes them.

        Several shapes need more of them for batches of one shape to be full.
        """
        return (4 if len(self.canvases) > 1 else 2) * self.max_batch * self.calls

    @property
    def max_pinned(self) -> int:
        """Canvases of batches that are in flight or not wholly post-processed.

        A batch on a GPU keeps its memory until the last of its canvases is post-processed. With two
        calls at once these are four full batches.
        """
        return max(2 * self.max_batch * self.calls, self.threads + self.calls)


def choose_policy(settings: Settings, engine: WatchedEngine, config: ModelConfig) -> Policy:
    """Batches on a GPU, and wherever a delay is set; on the CPU batches gain nothing.

    On the CPU an image keeps its thread, unless the engine takes one call at a time: then other
    threads decode and post-process meanwhile.

    Args:
        settings: Threads, batch size and delay.
        engine: The model's.
        config: The model's; only a GPU needs its `canvases`, on the CPU an image's canvas is exact.
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
        max_batch=min(settings.max_batch, config.limits.max_batch) if share_calls else 1,
        max_delay_s=delay_ms / 1000,
        canvases=find_padding(config, current.device),
    )
