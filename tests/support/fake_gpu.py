"""A GPU for ONNX Runtime that is the host: the service's slots over a fake `cuda.core`.

Sessions are real ones on the CPU. What they are asked to run on CUDA they put on the slot's fake
stream, so it runs as late, and sees the memory, that it would on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort

from pipeline.types import Candidates
from service.engines.device import CudaDevice
from service.engines.driver import Gpu
from service.engines.kernels.select import DeviceBatch
from service.engines.ort_session import CPU, CUDA
from tests.support.fake_cuda import FakeCuda, read_memory

GPU = Gpu("Test GPU", "sm_90")
_NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
_REAL_SESSION = ort.InferenceSession


class HostSelect:
    """The kernels' part, on the host: reads the addresses and gives the memory back at once.

    Attributes:
        held: Releases that are held back instead, if there is a list.
        streams: What it was called with.
        threads: Who called it.
        fail: Raised instead, if set.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self.held: list[Callable[[], None]] | None = None
        self.streams: list[int] = []
        self.threads: set[str] = set()
        self.fail: Exception | None = None

    def __call__(self, batch: DeviceBatch, stream: int) -> list[Candidates]:
        self.streams.append(stream)
        self.threads.add(threading.current_thread().name)
        if self.fail is not None:
            raise self.fail
        self._device.synchronize(stream)
        shape = (batch.batch, batch.candidates)
        scores = read_memory(batch.scores, np.float32, shape)
        labels = read_memory(batch.labels, np.int64, shape)
        masks = read_memory(batch.mask_probs, _NUMPY[batch.mask_type], (*shape, *batch.mask_hw))
        if batch.mask_type == "bfloat16":
            masks = (masks.astype(np.uint32) << 16).view(np.float32)
        if self.held is None:
            batch.release()
        else:
            self.held.append(batch.release)
        return [
            Candidates(s[s > 0], i[s > 0], m[s > 0].astype(np.float32))
            for s, i, m in zip(scores, labels, masks, strict=True)
        ]


class _Binding:
    """A binding to memory of the fake GPU, which ONNX Runtime calls memory of the CPU."""

    def __init__(self, binding: Any) -> None:
        self.real = binding
        self.addresses: dict[str, int] = {}
        self.gpus: set[int] = set()

    def bind_input(self, name: str, device: str, *rest: Any) -> None:
        self._bind(self.real.bind_input, name, device, rest)

    def bind_output(self, name: str, device: str, *rest: Any) -> None:
        self._bind(self.real.bind_output, name, device, rest)

    def _bind(self, bind: Callable[..., None], name: str, device: str, rest: Any) -> None:
        assert device == "cuda"
        bind(name, "cpu", 0, *rest[1:])
        self.addresses[name] = rest[-1]
        self.gpus.add(rest[0])


class ClaimingSession:
    """A session on the CPU that claims the providers it was asked for.

    Attributes:
        asked: The providers of every session, with their options.
        cuda: The fake that holds the streams.
        refuses_graphs: Whether CUDA graphs are refused, as where nodes stay on the CPU.
        fails_to_record: Whether the first run that would be recorded fails.
        graph_ids: Of every run with bound memory, in their order.
    """

    asked: list[list[tuple[str, dict[str, str]]]]
    cuda: FakeCuda
    refuses_graphs: bool
    fails_to_record: bool
    graph_ids: list[int]

    def __init__(self, source: Any, options: Any, providers: list[Any]) -> None:
        type(self).asked.append(providers)
        self._options = providers[0][1]
        if providers[0][0] == CUDA:
            self.cuda.check_works(int(self._options["device_id"]))
        if self.refuses_graphs and "enable_cuda_graph" in self._options:
            raise RuntimeError("graph capture: not all nodes are on the CUDAExecutionProvider")
        self._providers = [name for name, _ in providers]
        self._session = _REAL_SESSION(source, options, providers=[CPU])
        self._recorded: dict[int, tuple[int, dict[str, int]]] = {}

    def get_providers(self) -> list[str]:
        return self._providers

    def disable_fallback(self) -> None:
        pass

    def io_binding(self) -> _Binding:
        return _Binding(self._session.io_binding())

    def run_with_iobinding(self, binding: _Binding, options: ort.RunOptions) -> None:
        """Puts the run on the slot's stream; a graph belongs to a thread and to addresses."""
        entry = options.get_run_config_entry
        assert entry("disable_synchronize_execution_providers") == "1"
        graph_id = int(entry("gpu_graph_id"))
        self.graph_ids.append(graph_id)
        if graph_id != -1:
            assert "enable_cuda_graph" in self._options
            if self.fails_to_record:
                raise RuntimeError("operation not permitted when stream is capturing")
            made = threading.get_ident(), dict(binding.addresses)
            assert self._recorded.setdefault(graph_id, made) == made
        stream = self.cuda.streams[int(self._options["user_compute_stream"])]
        assert binding.gpus == {int(self._options["device_id"])} == {stream.device}
        stream.put(lambda: self._session.run_with_iobinding(binding.real))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def install(
    monkeypatch: Any, cuda: FakeCuda | None = None, *, fake_kernels: bool = True
) -> type[ClaimingSession]:
    """Makes ONNX Runtime, the driver, CUDA and the kernels look as with a GPU.

    Args:
        monkeypatch: Undoes it.
        cuda: In the place of `cuda.core`; None takes a new one.
        fake_kernels: Whether `HostSelect` stands in for the kernels.

    Returns:
        The class of the sessions, which tests do not share.
    """
    if cuda is None:
        cuda = FakeCuda()
        cuda.install(monkeypatch)
    content = {
        "asked": [],
        "cuda": cuda,
        "refuses_graphs": False,
        "fails_to_record": False,
        "graph_ids": [],
    }
    session = type("Session", (ClaimingSession,), content)
    if fake_kernels:
        monkeypatch.setattr(
            "service.engines.onnxruntime.load_select", lambda device, *rest: HostSelect(device)
        )
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(ort, "InferenceSession", session)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    for module in ("onnxruntime", "choose"):
        monkeypatch.setattr(f"service.engines.{module}.find_gpu", lambda ordinals=(0,): GPU)
    return session
