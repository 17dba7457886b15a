"""Metadata of an AOTInductor package, read without torch and without running any of it.

A .pt2 file is a ZIP archive with machine code. It is checked that the code is the published one and
was compiled for this machine before any of it is loaded.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.model_config import FileSpec
from service.engines.artefacts import read_file
from service.engines.base import BackendError, Precision
from service.engines.cpu import CPU_INFO, read_cpu

PackagePrecision = Literal["fp32", "fp16", "bf16"]
METADATA_KEY = "solo_serve"
METADATA_SUFFIX = "wrapper_metadata.json"
CPU_TARGET = "cpu"


@dataclass(frozen=True, kw_only=True)
class PackageInfo:
    """What a package was compiled from and for.

    Attributes:
        config: Name of the training configuration.
        target: "cpu", or a GPU architecture, e.g. "sm_90".
        precision: Of the convolutions and of the masks.
        torch: Version of the torch that compiled it, without the build suffix.
        machine: Of the host code, as `platform.machine` names it.
        max_batch: Most canvases in a call.
        max_canvas_hw: Largest canvas, px.
        fixed_canvas: Whether `max_canvas_hw` is the only one.
        host_cpu: The only CPU that runs it, see `describe_cpu`; None is any x86-64-v3 CPU.
        onnx_sha256: Of the model.onnx of the same weights; None if unknown.
    """

    config: str
    target: str
    precision: PackagePrecision
    torch: str
    machine: str
    max_batch: int
    max_canvas_hw: tuple[int, int]
    fixed_canvas: bool
    host_cpu: str | None = None
    onnx_sha256: str | None = None

    def to_metadata(self) -> dict[str, str]:
        """As stored in the package."""
        return {METADATA_KEY: json.dumps(asdict(self), sort_keys=True)}


def name_package(target: str, precision: Precision) -> str:
    """File name of a package in a version's folder."""
    return f"model.{target}.{precision}.pt2"


def name_target(capability: tuple[int, int] | None) -> str:
    """Target of a GPU's compute capability; None is the CPU."""
    return CPU_TARGET if capability is None else f"sm_{capability[0]}{capability[1]}"


def describe_cpu(file: Path = CPU_INFO) -> str:
    """The host's CPU with a digest of its instruction sets."""
    name, sets = read_cpu(file)
    return f"{name} {hashlib.sha256(sets.encode()).hexdigest()[:12]}"


def read_verified(package: Path, files: Mapping[str, FileSpec]) -> bytes:
    """Reads a package and compares it with config.json.

    Raises:
        BackendError: config.json does not list the file, or the file is missing or differs.
    """
    if package.name not in files:
        raise BackendError(f"config.json lists {sorted(files)}, but no {package.name}")
    try:
        data = read_file(package, files[package.name].bytes)
    except OSError as error:
        raise BackendError(f"{package}: {error.strerror or error}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != files[package.name].sha256:
        raise BackendError(
            f"{package}: its SHA-256 is {digest}, config.json says {files[package.name].sha256}"
        )
    return data


def read_info(data: bytes) -> PackageInfo:
    """Reads a package's metadata.

    Raises:
        BackendError: It is no package, or was not made by `solo-export`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [name for name in archive.namelist() if name.endswith(METADATA_SUFFIX)]
            if len(names) != 1:
                raise BackendError(f"the package has {len(names)} models, expected 1")
            content: dict[str, Any] = json.loads(archive.read(names[0]))
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise BackendError(f"this is no AOTInductor package: {error}") from error
    try:
        fields = json.loads(content[METADATA_KEY])
        fields["max_canvas_hw"] = tuple(fields["max_canvas_hw"])
        info = PackageInfo(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise BackendError(f"the package does not say what it is for: {error!r}") from error
    if info.precision not in get_args(PackagePrecision):
        raise BackendError(f"the package has precision {info.precision!r}")
    return info


def find_misfit(
    info: PackageInfo, *, target: str, torch_version: str, cpu_capability: str
) -> str | None:
    """Why a package cannot run here, one sentence; None if it can.

    Args:
        info: The package's.
        target: This machine's, as in `name_target`.
        torch_version: Of the torch that would run it.
        cpu_capability: Of this CPU, from torch, e.g. "AVX2".
    """
    if info.target != target:
        return f"the package is for {info.target}, this is {target}"
    if _release(info.torch) != _release(torch_version):
        return f"the package was made with torch {info.torch}, this is torch {torch_version}"
    if info.machine != platform.machine():
        return f"the package is for {info.machine} hosts, this is {platform.machine()}"
    if info.machine == "x86_64" and cpu_capability[:4] != "AVX2" and "AVX512" not in cpu_capability:
        return f"the package needs a CPU with AVX2, this one has {cpu_capability}"
    if info.host_cpu is not None and info.host_cpu != describe_cpu():
        return f"the package was made for the CPU {info.host_cpu}, this is {describe_cpu()}"
    return None


def _release(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]
