"""The engines that `benchmarks gpu` compares, each behind the service's `Backend`."""

from __future__ import annotations

import hashlib
import importlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.gpu.subjects import GpuSubject
from export.onnx_graph import build_onnx
from export.to_aoti import (
    AotiOptions,
    TypedGraph,
    compile_program,
    describe_package,
    export_program,
)
from pipeline.model_config import FileSpec
from pipeline.types import Tile
from service.cores import count_cores
from service.engines.aoti_package import PackagePrecision, name_package
from service.engines.aotinductor import (
    AotiBackend,
    CudaDevice,
    HostSlot,
    Runner,
    build_aoti_backend,
    load_runner,
)
from service.engines.base import Backend, BackendError, BackendOptions, collate
from service.engines.onnxruntime import build_ort_backend

ENGINES = ("aoti", "eager", "ort", "trt")
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class EngineUnderTest:
    """An engine.

    Attributes:
        name: One of `ENGINES`.
        backend: The service's.
        precision: Of its arithmetic.
        build_s: How long building it took.
        prepare_compute: Makes a step that runs the engine alone, inputs and outputs on the device;
            None where the backend does not allow that.
    """

    name: str
    backend: Backend
    precision: str
    build_s: float
    prepare_compute: Callable[[Sequence[Tile]], Callable[[], Any]] | None


def build_engine(
    name: str, subject: GpuSubject, device: Device, precision: PackagePrecision, threads: int | None
) -> EngineUnderTest:
    """Builds one engine for one network.

    Raises:
        BackendError: It cannot run here; says why.
    """
    began_s = time.perf_counter()
    compute: Callable[[Sequence[Tile]], Callable[[], Any]] | None = None
    options = BackendOptions(device=device, precision=precision, threads=threads)
    if name == "eager":
        runner = _eager_runner(subject, device, precision)
        backend: Backend = _EagerBackend(subject, device, precision, runner, threads)
        compute = _compute_of(runner, device, graph=False)
    elif name == "aoti":
        data = _compile(subject, device, precision)
        backend = _serve_package(subject, data, options)
        compute = _compute_of(load_runner(data, device), device, graph=True)
    elif name == "ort":
        precision = "fp32"
        backend = build_ort_backend(
            build_onnx(subject.network), BackendOptions(device=device, threads=threads)
        )
    elif name == "trt":
        precision = "fp32"
        backend = _build_trt(subject, device)
    else:
        raise BackendError(f"engine is {name!r}, expected one of {', '.join(ENGINES)}")
    return EngineUnderTest(name, backend, precision, time.perf_counter() - began_s, compute)


def _eager_runner(subject: GpuSubject, device: Device, precision: PackagePrecision) -> Runner:
    graph = TypedGraph(subject.network, precision).to(device)

    @torch.inference_mode()
    def run(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        outputs: Sequence[torch.Tensor] = graph(*inputs)
        return outputs

    return run


class _EagerBackend(AotiBackend):
    """PyTorch without a compiler; its outputs are post-processed on the host."""

    name = "eager"

    def __init__(
        self,
        subject: GpuSubject,
        device: Device,
        precision: PackagePrecision,
        runner: Runner,
        threads: int | None,
    ) -> None:
        def run(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            return [output.cpu() for output in runner([tensor.to(device) for tensor in inputs])]

        info = describe_package(subject.config, _options(subject, device, precision))
        slot = HostSlot(run, threads or count_cores())
        super().__init__(info, [slot], device=device, concurrency=1, reason="asked for")


def _options(subject: GpuSubject, device: Device, precision: PackagePrecision) -> AotiOptions:
    return AotiOptions(
        device=device,
        precision=precision,
        max_batch=subject.served.limits.max_batch,
        canvas_hw=subject.canvas_hw,
    )


def _compile(subject: GpuSubject, device: Device, precision: PackagePrecision) -> bytes:
    info = describe_package(subject.config, _options(subject, device, precision))
    graph = TypedGraph(subject.network, precision).to(device)
    return compile_program(export_program(graph, info), info)


def _serve_package(subject: GpuSubject, data: bytes, options: BackendOptions) -> Backend:
    capability = torch.cuda.get_device_capability() if options.device == "cuda" else None
    target = "cpu" if capability is None else f"sm_{capability[0]}{capability[1]}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name_package(target, options.precision)
        file.write_bytes(data)
        spec = FileSpec(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        config = subject.served.model_copy(update={"files": {file.name: spec}})
        return build_aoti_backend(file, options, config)


def _build_trt(subject: GpuSubject, device: Device) -> Backend:
    try:
        trt = importlib.import_module("service.engines.tensorrt.engine")
    except ImportError as error:
        raise BackendError(f"there is no TensorRT backend: {error}") from error
    options = BackendOptions(device=device, engine="trt")
    obstacle = trt.find_obstacle(options)
    if obstacle is not None:  # before minutes go into the export
        raise BackendError(obstacle)
    with tempfile.TemporaryDirectory() as cache:
        backend: Backend = trt.build_trt_backend(
            build_onnx(subject.network), options, subject.served, Path(cache)
        )
        return backend


def _compute_of(
    runner: Runner, device: Device, *, graph: bool
) -> Callable[[Sequence[Tile]], Callable[[], Any]]:
    def prepare(tiles: Sequence[Tile]) -> Callable[[], Any]:
        inputs = [torch.from_numpy(array).to(device) for array in collate(tiles)]
        if graph and device == "cuda":
            return CudaDevice().capture(lambda: runner(inputs))[0]
        return lambda: runner(inputs)

    return prepare
