"""An error of CUDA after which every call on that GPU fails: only another process helps.

ONNX Runtime runs on the host in the place of a GPU, over a `cuda.core` that breaks for good.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from service.engines.base import BackendError
from service.models import renewal
from service.models.repository import load_repository
from service.models.store import ModelStore
from service.observe.metrics import Metrics
from service.settings import Settings
from tests.service.conftest import OPTIONS
from tests.support import fake_gpu
from tests.support.stores import infer, until


@pytest.mark.parametrize("gpus", [(0,), (0, 1), (1, 0)])
async def test_the_process_has_failed_after_some_attempts(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gpus: tuple[int, ...],
) -> None:
    """Also where other GPUs still work: their slots must not answer for the broken one."""
    session = fake_gpu.install(monkeypatch)
    monkeypatch.setattr(renewal, "FIRST_PAUSE_S", 0.01)
    options = replace(OPTIONS, device="cuda", gpus=gpus)
    repository = load_repository(settings.model_repo, options)
    store = ModelStore(
        settings.model_copy(update={"device": "cuda", "max_rebuilds": 2}), repository, Metrics()
    )
    store.start()
    model = store.find("blobs", None)
    for _ in range(4):
        assert len(await infer(model)) == 1
    session.cuda.broken.add(0)
    with pytest.raises(BackendError):
        for _ in range(len(gpus)):
            await asyncio.wait_for(infer(model), 20)
    await until(lambda: store.renewal.failure is not None)
    assert "2 attempts to replace it failed" in str(store.renewal.failure)
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in str(store.renewal.failure)
    assert caplog.text.count("the engine has failed") == 1
    await store.close(finished=False)
