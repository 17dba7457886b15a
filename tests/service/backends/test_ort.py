from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from service.backends import ort as ort_backend
from service.backends.base import BackendError, BackendOptions
from service.backends.ort import build_ort_backend, check_device
from service.errors import DeviceError
from service.pipeline.types import Tile, Window
from tests.support.blob_model import build_graph

CPU = BackendOptions(device="cpu", threads=1)


def build_batch(batch: int, height: int, width: int) -> list[Tile]:
    images = np.random.default_rng(1).integers(0, 256, (batch, height, width, 3), np.uint8)
    return [Tile(image, (height, width), Window(0, 0, height, width)) for image in images]


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 64), (3, 64, 96), (2, 32, 128)])
def test_batches_and_canvases_of_any_size(batch: int, height: int, width: int) -> None:
    backend = build_ort_backend(build_graph(), CPU)
    found = backend.infer(build_batch(batch, height, width))
    assert len(found) == batch
    for candidates in found:
        assert candidates.mask_probs.shape[1:] == (height // 4, width // 4)
        assert (np.diff(candidates.scores) <= 0).all()


def test_a_batch_is_what_its_canvases_are_alone() -> None:
    backend = build_ort_backend(build_graph(), CPU)
    tiles = build_batch(4, 64, 64)
    for tile, candidates in zip(tiles, backend.infer(tiles), strict=True):
        (alone,) = backend.infer([tile])
        np.testing.assert_allclose(candidates.scores, alone.scores, rtol=1e-6)
        np.testing.assert_allclose(candidates.mask_probs, alone.mask_probs, rtol=1e-6)


def test_a_graph_is_read_from_a_path_too(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(build_graph())
    assert build_ort_backend(file, CPU).device == "cpu"


def test_a_closed_engine_says_so() -> None:
    backend = build_ort_backend(build_graph(), CPU)
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.infer(build_batch(1, 64, 64))


def test_bytes_that_are_no_graph_are_refused() -> None:
    with pytest.raises(BackendError, match="cannot load the graph"):
        build_ort_backend(b"no graph", CPU)


def test_cuda_that_the_runtime_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [ort_backend.CPU])
    with pytest.raises(DeviceError, match="has no CUDA"):
        check_device("cuda")
    check_device("auto")
    check_device("cpu")


def test_cuda_that_falls_back_in_silence_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A runtime that offers CUDA but gives a CPU session, as with missing libraries."""
    session = ort.InferenceSession

    def build(source: Any, options: Any, providers: list[str]) -> Any:
        return session(source, options, providers=[ort_backend.CPU])

    monkeypatch.setattr(ort, "get_available_providers", lambda: [ort_backend.CUDA, ort_backend.CPU])
    monkeypatch.setattr(ort, "InferenceSession", build)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    with pytest.raises(DeviceError, match="cannot use CUDA here"):
        build_ort_backend(build_graph(), BackendOptions(device="cuda", threads=1))
    assert build_ort_backend(build_graph(), BackendOptions(threads=1)).device == "cpu"
    assert "device auto takes the CPU" in caplog.text
