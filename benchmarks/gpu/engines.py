"""The engines that `benchmarks gpu` compares: each is built as the service builds it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks.gpu.subjects import GpuSubject
from benchmarks.ours import ONNX_FILE, load_model
from export.config_json import describe_file, merge_config
from export.onnx_graph import build_onnx
from export.to_aoti import AotiOptions, TypedGraph, build_aoti, describe_package
from pipeline.model_config import FileSpec, ModelConfig
from service.engines.aoti_package import PackagePrecision, name_package, read_info
from service.engines.aotinductor import serve_runners
from service.engines.base import Backend, BackendError, BackendOptions
from service.engines.slots import SlotBackend
from training.configs.schema import Config
from training.model.solo import Solo

EngineName = Literal["aoti", "eager", "ort", "trt"]
"""`eager` is the graph of `aoti` run by PyTorch, on a GPU from a recorded CUDA graph."""
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


@dataclass(frozen=True, kw_only=True)
class EngineRecipe:
    """How engines are built.

    Attributes:
        device: Where they run.
        precision: Of `aoti` and `eager`.
        threads: Of a call on the CPU.
        packages: Folder where packages are kept and looked for; None compiles each time.
    """

    device: Device = "cuda"
    precision: PackagePrecision = "bf16"
    threads: int | None = None
    packages: Path | None = None

    def package_options(self, served: ModelConfig) -> AotiOptions:
        """Those of solo-export's `--aoti`, with the model's batches."""
        return AotiOptions(
            device=self.device, precision=self.precision, max_batch=served.limits.max_batch
        )


def build_engine(name: EngineName, subject: GpuSubject, recipe: EngineRecipe) -> EngineUnderTest:
    """Publishes a network in a repository of its own and loads it from there.

    Raises:
        BackendError, ExportError, ServiceError: It cannot run here; says why.
    """
    began_s = time.perf_counter()
    if name == "eager":
        eager = serve_eager(subject.network, subject.config, subject.served, recipe)
        return EngineUnderTest(eager, time.perf_counter() - began_s)
    with tempfile.TemporaryDirectory() as root:
        folder = publish_subject(subject, Path(root), recipe if name == "aoti" else None)
        precision = recipe.precision if name == "aoti" else "fp32"
        backend = load_model(
            folder, recipe.threads, device=recipe.device, engine=name, precision=precision
        ).backend
    return EngineUnderTest(backend, time.perf_counter() - began_s)


def publish_subject(subject: GpuSubject, root: Path, recipe: EngineRecipe | None) -> Path:
    """Writes a network as a model of a repository.

    Args:
        subject: The network.
        root: The repository's folder.
        recipe: Of the package that is published too; None publishes none.

    Returns:
        The model's folder.
    """
    files = {ONNX_FILE: build_onnx(subject.network)}
    if recipe is not None:
        with tempfile.TemporaryDirectory() as scratch:
            file = find_package(subject, recipe, recipe.packages or Path(scratch))
            files[file.name] = file.read_bytes()
    specs = {file: FileSpec(**describe_file(data)) for file, data in files.items()}
    config = subject.served.model_copy(update={"files": specs})
    folder = root / config.name
    version = folder / str(config.version)
    version.mkdir(parents=True)
    for name, data in files.items():
        (version / name).write_bytes(data)
    (folder / "config.json").write_text(json.dumps(merge_config(None, config)))
    return folder


def find_package(subject: GpuSubject, recipe: EngineRecipe, packages: Path) -> Path:
    """The subject's package as solo-export makes it; compiled unless `packages` has it.

    One that was kept for larger batches is taken too.
    """
    options = recipe.package_options(subject.served)
    wanted = describe_package(subject.config, options)
    file = packages / subject.config.name / name_package(wanted.target, wanted.precision)
    if file.exists():
        try:
            kept = read_info(file.read_bytes())
        except BackendError:  # half written
            kept = replace(wanted, torch="")
        if kept.max_batch >= wanted.max_batch and replace(kept, max_batch=0) == replace(
            wanted, max_batch=0
        ):
            return file
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_bytes(build_aoti(subject.network, subject.config, options))
    return part.replace(file)


def serve_eager(
    network: Solo, config: Config, served: ModelConfig, recipe: EngineRecipe
) -> SlotBackend:
    """A package's graph run by PyTorch in the service's slots.

    Args:
        network: In evaluation mode; stays as it is.
        config: Of the network.
        served: The service's configuration of it.
        recipe: Device, precision and threads.
    """
    info = describe_package(config, recipe.package_options(served))
    graph = TypedGraph(network, recipe.precision).to(recipe.device)

    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            outputs: Sequence[Tensor] = graph(*inputs)
        return outputs

    options = BackendOptions(device=recipe.device, threads=recipe.threads)
    backend = serve_runners(lambda gpu: run, info, options, served, "PyTorch without a compiler")
    backend.name = "eager"
    return backend
