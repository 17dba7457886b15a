"""A server's metrics as text."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from service.observe.metrics import Metrics


def render(metrics: Metrics) -> str:
    """All metrics as of now in Prometheus' text format; also where an event loop runs."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, metrics.answer("")).result()[0].decode()
