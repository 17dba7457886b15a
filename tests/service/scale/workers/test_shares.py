from __future__ import annotations

import pytest

from service.scale.workers import shares
from service.scale.workers.shares import share
from service.settings import Settings


def test_what_workers_share() -> None:
    settings = Settings(
        workers=3,
        max_queue_canvases=100,
        max_image_canvases=17,
        max_decoded_pixels=1000,
        max_connections=1000,
        threads=5,
    )
    shared = share(settings)
    assert (shared.max_queue_canvases, shared.max_connections) == (34, 334)
    assert shared.max_decoded_pixels == 334
    assert shared.threads == 5  # as told
    large = share(Settings(workers=3, max_queue_canvases=100, max_image_canvases=50))
    assert large.max_queue_canvases == 100  # the largest image must be admitted


@pytest.mark.parametrize(
    ("cores", "workers", "pool_threads", "threads"),
    [(2, 2, 1, 2), (16, 16, 1, 2), (16, 4, 4, 8), (16, 2, 8, 16), (1, 2, 1, 1)],
)
def test_threads_that_nobody_has_set_follow_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int, pool_threads: int, threads: int
) -> None:
    monkeypatch.setattr(shares, "count_cores", lambda: cores)
    shared = share(Settings(workers=workers))
    assert (shared.pool_threads, shared.threads) == (pool_threads, threads)
