"""How a scheduler uses an engine: a pure function of the settings, the engine and the model."""

from __future__ import annotations

from pipeline.model_config import Limits
from service.engines.watch import WatchedEngine
from service.settings import Settings
from service.work.scheduler import Policy

GPU_DELAY_MS = 5.0


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
