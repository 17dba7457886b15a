"""The AOTInductor backend on a GPU, over fakes of `torch.cuda` and `cuda.core`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.model_config import Canvas
from pipeline.types import Candidates
from service.engines import aotinductor as aoti
from service.engines.aoti_package import PackagePrecision
from service.engines.aotinductor import Runner, build_aoti_backend
from service.engines.base import BackendError, BackendOptions
from service.engines.slots import SlotBackend
from tests.service.engines.test_aoti_package import build_archive
from tests.support.aoti import CONFIG, INFO, build_tiles, eager_backend, served_config
from tests.support.fake_cuda import FakeCuda, view_memory
from tests.support.fake_gpu import HostSelect
from tests.support.tiny_solo import tiny_network
from training.model.solo import Solo

CANVASES = ((96, 64), (96, 160), (160, 96))
"""The batches of the tests are on the first of them, and on others."""


class FakeTorchCuda:
    """`torch.cuda` over a fake `cuda.core`: what a runner does is put on the current stream."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.current: int | None = None
        self.recording: list[Callable[[], None]] | None = None
        self.pools: list[Any] = []
        self.reset: list[Any] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = self

        class CudaGraph:
            def __init__(self) -> None:
                self.steps: list[Callable[[], None]] = []

            def replay(self) -> None:
                assert fake.current is not None and self not in fake.reset
                for step in self.steps:
                    fake.cuda.streams[fake.current].put(step)

            def reset(self) -> None:
                fake.reset.append(self)

        @contextmanager
        def stream(handle: int) -> Iterator[None]:
            before, fake.current = fake.current, handle
            yield
            fake.current = before

        @contextmanager
        def graph(made: CudaGraph, *, pool: Any, stream: int, **mode: Any) -> Iterator[None]:
            assert mode == {"capture_error_mode": "thread_local"}
            if not fake.cuda.graphs_work:
                raise RuntimeError("operation not permitted when stream is capturing")
            fake.pools.append(pool)
            fake.recording = made.steps
            yield
            fake.recording = None

        for name, value in {
            "is_available": lambda: True,
            "get_device_capability": lambda gpu=0: (9, 0),
            "ExternalStream": lambda handle, gpu: handle,
            "graph_pool_handle": object,
            "CUDAGraph": CudaGraph,
            "stream": stream,
            "graph": graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(aoti, "view_tensor", self.view)

    def view(self, address: int, shape: tuple[int, ...], kind: str, gpu: int) -> Tensor:
        assert gpu == self.cuda.current_device
        return torch.from_numpy(view_memory(address, np.dtype(kind), shape))

    def run(self, network: Solo, mask_type: torch.dtype) -> Runner:
        """A runner whose outputs are written when the stream gets there."""

        def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            assert self.current is not None
            with torch.no_grad():
                scores, labels, masks = network.candidates(*inputs)
            shapes = (scores, torch.float32), (labels, torch.int64), (masks, mask_type)
            outputs = [torch.empty_like(output, dtype=dtype) for output, dtype in shapes]

            def step() -> None:
                with torch.no_grad():
                    for output, found in zip(outputs, network.candidates(*inputs), strict=True):
                        output.copy_(found)

            if self.recording is not None:
                self.recording.append(step)
            else:
                self.cuda.streams[self.current].put(step)
            return outputs

        return run


@pytest.fixture
def torch_cuda(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTorchCuda:
    fake = FakeTorchCuda(fake_cuda)
    fake.install(monkeypatch)
    return fake


def build_cuda_backend(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    runner: Runner,
    precision: PackagePrecision = "fp32",
    canvases: Sequence[Canvas] = (),
    **options: Any,
) -> SlotBackend:
    monkeypatch.setattr(aoti, "load_runner", lambda data, device, gpu=0: runner)
    info = replace(INFO, target="sm_90", precision=precision)
    file = folder / f"model.sm_90.{precision}.pt2"
    file.write_bytes(build_archive(info.to_metadata()))
    wanted = BackendOptions(device="cuda", precision=precision, **options)
    return build_aoti_backend(file, wanted, served_config(file, canvases=canvases))


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize(
    ("precision", "mask_type", "tolerance"),
    [
        ("fp32", torch.float32, 1e-5),
        ("fp16", torch.float16, 1e-3),
        ("bf16", torch.bfloat16, 4e-3),
    ],
)
def test_a_package_on_cuda_is_recorded_and_gives_each_canvas_its_candidates(
    torch_cuda: FakeTorchCuda,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    on_device: bool,
    precision: PackagePrecision,
    mask_type: torch.dtype,
    tolerance: float,
) -> None:
    if on_device:
        monkeypatch.setattr(aoti, "load_select", lambda device, *rest: HostSelect(device))
    else:
        monkeypatch.setattr(aoti, "load_select", lambda *arguments: "no kernels here")
    network = tiny_network(CONFIG)
    runner = torch_cuda.run(network, mask_type)
    backend = build_cuda_backend(monkeypatch, tmp_path, runner, precision, CANVASES, slots=1)
    assert len(torch_cuda.pools) == 2 * 3  # batches of 1 and 3 on three canvases
    assert (backend.device, backend.precision, backend.concurrency) == ("cuda", precision, 1)
    place = "device" if on_device else "host: no kernels here"
    assert backend.reason.endswith(f"post-processed on the {place}")
    reference = eager_backend(network)
    for batch, height, width in ((3, 96, 64), (1, 64, 64), (3, 96, 64), (2, 32, 160)):
        tiles = build_tiles(batch, height, width)
        for found, wanted in zip(backend.infer(tiles), reference.infer(tiles), strict=True):
            assert isinstance(found, Candidates) and isinstance(wanted, Candidates)
            np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)
            assert found.mask_probs.dtype == np.float32
            np.testing.assert_allclose(found.mask_probs, wanted.mask_probs, atol=tolerance)
    assert len(torch_cuda.pools) == 6 and len(set(torch_cuda.pools)) == 1
    backend.close()
    assert len(torch_cuda.reset) == 6
    assert not torch_cuda.cuda.open_buffers


def test_a_package_runs_on_each_gpu(
    torch_cuda: FakeTorchCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The fakes refuse a stream or memory of another GPU than the current one."""
    monkeypatch.setattr(aoti, "load_select", lambda device, *rest: HostSelect(device))
    network = tiny_network(CONFIG)
    runner = torch_cuda.run(network, torch.float32)
    backend = build_cuda_backend(monkeypatch, tmp_path, runner, slots=1, gpus=(1, 2))
    assert backend.concurrency == 2
    assert "on GPUs 1, 2; post-processed on the device" in backend.reason
    wanted = eager_backend(network).infer(build_tiles(2, 64, 64))
    for _ in range(4):
        for one, other in zip(backend.infer(build_tiles(2, 64, 64)), wanted, strict=True):
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
    assert {stream.device for stream in torch_cuda.cuda.streams.values()} == {1, 2}
    backend.close()
    assert not torch_cuda.cuda.open_buffers


def test_a_package_that_cannot_be_recorded_runs_without(
    torch_cuda: FakeTorchCuda,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(aoti, "load_select", lambda device, *rest: HostSelect(device))
    torch_cuda.cuda.graphs_work = False
    network = tiny_network(CONFIG)
    runner = torch_cuda.run(network, torch.float32)
    backend = build_cuda_backend(monkeypatch, tmp_path, runner, canvases=CANVASES)
    assert backend.concurrency == 2
    tiles = build_tiles(2, 64, 64)
    wanted = eager_backend(network).infer(tiles)
    for _ in range(3):
        for one, other in zip(backend.infer(tiles), wanted, strict=True):
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
    assert "no CUDA graphs" in caplog.text


def test_outputs_that_break_the_graph_contract_are_refused(
    torch_cuda: FakeTorchCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(aoti, "load_select", lambda device, *rest: HostSelect(device))
    runner = torch_cuda.run(tiny_network(CONFIG), torch.float16)
    backend = build_cuda_backend(monkeypatch, tmp_path, runner)
    with pytest.raises(BackendError, match=r"mask_probs is .*'float16'.*expected .*'float32'"):
        backend.infer(build_tiles(1, 64, 64))
    with pytest.raises(BackendError, match=r"canvas of \(64, 72\)"):
        backend.infer(build_tiles(1, 64, 72))


def test_memory_of_a_device_is_a_tensor_without_a_copy() -> None:
    """Without a GPU torch refuses, but only after it has read what we say of the memory."""
    if torch.cuda.is_available():
        memory = torch.arange(6, device="cuda")
        view = aoti.view_tensor(memory.data_ptr(), (2, 3), "<i8")
        assert view.data_ptr() == memory.data_ptr() and view.tolist() == [[0, 1, 2], [3, 4, 5]]
    else:
        with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
            aoti.view_tensor(64, (2, 3), "<i8")
