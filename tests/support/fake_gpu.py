"""A GPU for ONNX Runtime's slots that is the host: same code, same pointers, another memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort

from pipeline.types import Candidates
from service.engines.driver import Gpu
from service.engines.ort_memory import Region, Staged
from service.engines.ort_options import CPU, CUDA

GPU = Gpu("Test GPU", "sm_90")
_NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


class HostRegion:
    """An array whose address the engine gets; filled with NaN as float32 and as float16."""

    def __init__(self, n_bytes: int) -> None:
        self.array = np.full(n_bytes, 0xFF, np.uint8)
        self.pointer = int(self.array.ctypes.data)
        self.n_bytes = n_bytes
        self.uploads = 0

    def upload(self, n_bytes: int) -> None:
        self.uploads += 1

    def wait(self) -> None:
        pass


class HostMemory:
    """`service.engines.ort_memory.Memory` on the host; remembers what was allocated."""

    device = "cpu"
    stream = 4711

    def __init__(self) -> None:
        self.allocated: list[HostRegion] = []
        self.staged: list[HostRegion] = []

    def allocate(self, n_bytes: int) -> Region:
        self.allocated.append(HostRegion(n_bytes))
        return self.allocated[-1]

    def stage(self, n_bytes: int) -> Staged:
        self.staged.append(HostRegion(n_bytes))
        return self.staged[-1]


def read_pointer(pointer: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A copy of what lies at an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(ctypes.string_at(pointer, size), dtype).reshape(shape).copy()


@dataclass(kw_only=True)
class DeviceBatch:
    """The kernels' argument."""

    scores: int
    labels: int
    mask_probs: int
    mask_type: str
    batch: int
    candidates: int
    mask_hw: tuple[int, int]
    release: Callable[[], None]


@dataclass
class CudaPostprocessor:
    """The kernels' class, on the host: reads the addresses and gives the memory back at once.

    Attributes:
        held: Releases that are held back instead, if there is a list.
        streams: What it was called with.
    """

    spec: Any
    stride: int
    held: list[Callable[[], None]] | None = None
    streams: list[int] = field(default_factory=list)

    def select(self, batch: DeviceBatch, stream: int) -> list[Candidates]:
        self.streams.append(stream)
        shape = (batch.batch, batch.candidates)
        scores = read_pointer(batch.scores, np.float32, shape)
        labels = read_pointer(batch.labels, np.int64, shape)
        masks = read_pointer(batch.mask_probs, _NUMPY[batch.mask_type], (*shape, *batch.mask_hw))
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


class ClaimingSession:
    """A session on the CPU that claims the providers it was asked for.

    Attributes:
        asked: The providers of every session, with their options.
        refuse_graphs: Whether CUDA graphs are refused, as where nodes stay on the CPU.
    """

    asked: list[list[tuple[str, dict[str, str]]]]
    refuse_graphs: bool

    def __init__(self, source: Any, options: Any, providers: list[Any]) -> None:
        type(self).asked.append(providers)
        if self.refuse_graphs and "enable_cuda_graph" in providers[0][1]:
            raise RuntimeError("graph capture: not all nodes are on the CUDAExecutionProvider")
        self._providers = [name for name, _ in providers]
        self._session = _REAL_SESSION(source, options, providers=[CPU])

    def get_providers(self) -> list[str]:
        return self._providers

    def disable_fallback(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


_REAL_SESSION = ort.InferenceSession


def claiming_session() -> type[ClaimingSession]:
    """A class of its own, so that tests do not share `asked`."""
    return type("Session", (ClaimingSession,), {"asked": [], "refuse_graphs": False})


def install(monkeypatch: Any, *, fake_kernels: bool = True) -> type[ClaimingSession]:
    """Makes ONNX Runtime, the driver, memory and kernels look as with a GPU.

    Args:
        monkeypatch: Undoes it.
        fake_kernels: Whether kernels are `CudaPostprocessor` of this module.

    Returns:
        The class of the sessions.
    """
    session = claiming_session()
    if fake_kernels:
        kernels: Any = ModuleType("service.engines.kernels.postprocessor")
        kernels.CudaPostprocessor, kernels.DeviceBatch = CudaPostprocessor, DeviceBatch
        monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(ort, "InferenceSession", session)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr("service.engines.onnxruntime.CudaMemory", HostMemory)
    for module in ("onnxruntime", "choose"):
        monkeypatch.setattr(f"service.engines.{module}.find_gpu", lambda: GPU)
    return session
