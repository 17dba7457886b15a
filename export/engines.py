"""What solo-export makes for engines beside ONNX graphs: packages, TensorRT engines, cubins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast, get_args

from export.errors import ExportError
from export.publish import Artefact
from export.to_aoti import AotiOptions, export_aoti
from export.to_tensorrt import build_tensorrt
from pipeline.model_config import ModelConfig
from service.engines.aoti_package import PackagePrecision
from service.engines.artefacts import ONNX_FILE
from service.engines.base import BackendError, Precision
from service.engines.kernels.nvrtc import ARCHITECTURES, PREBUILT
from service.engines.kernels.prebuild import prebuild
from training.configs.schema import Config
from training.model.solo import Solo

Say = Callable[[str], None]


def parse_package(text: str) -> AotiOptions:
    """A package as the command line names it, DEVICE:PRECISION, e.g. "cuda:fp16".

    Raises:
        ValueError: The device or the precision is none that there is.
    """
    device, _, precision = text.partition(":")
    precisions = get_args(PackagePrecision)
    if device not in ("cpu", "cuda") or precision not in precisions:
        raise ValueError(f"{text!r} is not cpu or cuda, a colon, and one of {precisions}")
    return AotiOptions(
        device=cast(Literal["cpu", "cuda"], device), precision=cast(PackagePrecision, precision)
    )


def make_packages(
    network: Solo, config: Config, model: ModelConfig, packages: Sequence[AotiOptions], say: Say
) -> list[Artefact]:
    """AOTInductor packages of a network, compared with PyTorch in float32.

    Raises:
        ParityError: A package disagrees.
    """
    made = []
    for options in packages:
        say(f"compiling a package for {options.device} in {options.precision}; this takes minutes")
        wanted = replace(options, max_batch=model.limits.max_batch)
        digest = model.files[ONNX_FILE].sha256
        artefact = export_aoti(network, config, wanted, onnx_sha256=digest)
        made.append(Artefact(artefact.file_name, artefact.data, artefact.parity))
    return made


def build_engines(target: Path, precisions: Sequence[Precision], say: Say) -> list[Path]:
    """TensorRT engines of a published version, in the engine cache of this machine.

    Args:
        target: <model_repo>/<name>/<version>.
        precisions: Of the graphs that they are built from.
        say: Called with messages about the progress.

    Raises:
        ExportError: TensorRT or a graph is missing, or the build failed.
    """
    folder, version = target.parent, int(target.name)
    return [build_tensorrt(folder, version=version, precision=p, say=say) for p in precisions]


def build_kernels(architectures: Sequence[str], say: Say) -> list[Path]:
    """The CUDA kernels for the named architectures, all known ones if none is named.

    Raises:
        ExportError: The compiler is missing or refuses.
    """
    wanted = tuple(architectures) or ARCHITECTURES
    say(f"compiling the CUDA kernels for {', '.join(wanted)}")
    try:
        return prebuild(PREBUILT, wanted)
    except (BackendError, OSError) as error:
        raise ExportError(f"the CUDA kernels cannot be built: {error}") from error
