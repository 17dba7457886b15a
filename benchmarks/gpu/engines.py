"""The engines that `benchmarks gpu` compares: each is built as the service builds it."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.gpu.subjects import GpuSubject
from benchmarks.ours import ONNX_FILE, load_model
from export.onnx_graph import build_onnx
from export.publish import describe_file, merge_config
from export.to_aoti import (
    AotiOptions,
    TypedGraph,
    compile_program,
    describe_package,
    export_program,
)
from pipeline.model_config import FileSpec
from service.engines.aoti_package import PackagePrecision, name_package, name_target
from service.engines.aotinductor import build_aoti_backend
from service.engines.base import Backend, BackendOptions

EngineName = Literal["aoti", "ort", "trt"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class EngineUnderTest:
    """An engine.

    Attributes:
        backend: The service's.
        build_s: How long export, compilation and loading took.
    """

    backend: Backend
    build_s: float


def build_engine(
    name: EngineName,
    subject: GpuSubject,
    device: Device,
    precision: PackagePrecision,
    threads: int | None,
) -> EngineUnderTest:
    """Publishes a network in a repository of its own and loads it from there.

    Raises:
        BackendError, ExportError, ServiceError: It cannot run here; says why.
    """
    began_s = time.perf_counter()
    compiled: dict[str, bytes] = {}
    if name == "aoti":
        capability = torch.cuda.get_device_capability() if device == "cuda" else None
        file = name_package(name_target(capability), precision)
        compiled[file] = _compile(subject, device, precision)
    files = {ONNX_FILE: build_onnx(subject.network), **compiled}
    specs = {file: FileSpec(**describe_file(data)) for file, data in files.items()}
    config = subject.served.model_copy(update={"files": specs})
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / config.name
        version = folder / str(config.version)
        version.mkdir(parents=True)
        for file, data in files.items():
            (version / file).write_bytes(data)
        (folder / "config.json").write_text(json.dumps(merge_config(None, config)))
        if name == "aoti":  # compiled for one canvas, which the service's first run does not have
            wanted = BackendOptions(device=device, precision=precision, threads=threads)
            (file,) = compiled
            backend: Backend = build_aoti_backend(version / file, wanted, config)
        else:
            backend = load_model(folder, threads, device=device, engine=name).backend
    return EngineUnderTest(backend, time.perf_counter() - began_s)


def _compile(subject: GpuSubject, device: Device, precision: PackagePrecision) -> bytes:
    options = AotiOptions(
        device=device,
        precision=precision,
        max_batch=subject.served.limits.max_batch,
        canvas_hw=subject.canvas_hw,
    )
    info = describe_package(subject.config, options)
    graph = TypedGraph(subject.network, precision).to(device)
    return compile_program(export_program(graph, info), info)
