"""Compiles the CUDA kernels with NVRTC, once per machine.

    prebuilt cubin (prebuild) -> cubin in the cache -> NVRTC, then into the cache

A stored cubin has its recipe in its first line: it is used only if it is complete and the recipe is
that of the current sources. A cache that cannot be read or written only costs time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from service.engines.base import BackendError
from service.files import replace_bytes

logger = logging.getLogger(__name__)

SOURCES = ("select", "paste", "runs")
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""Prebuilt by default."""
OPTIONS: Mapping[str, str | bool] = {
    "std": "c++17",
    "fma": False,  # fused products round differently from NumPy
    "ftz": False,
    "prec_div": True,
}
"""Of `cuda.core.ProgramOptions`."""
HEADER = "common.cuh"
KERNELS = Path(__file__).resolve().parent
"""Folder of the sources in the installed package."""
PREBUILT = KERNELS / "prebuilt"


@dataclass(frozen=True)
class Recipe:
    """Everything that the machine code depends on.

    Attributes:
        name: Of the source.
        source: SHA-256 of its text.
        options: Of the compiler.
        architecture: For example "sm_90".
        compiler: Its version; empty where any compiler will do.
    """

    name: str
    source: str
    options: str
    architecture: str
    compiler: str

    @property
    def key(self) -> str:
        """Digest of the recipe, 16 hex digits."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def matches(self, other: Recipe, *, any_compiler: bool) -> bool:
        """Whether both give the same machine code."""
        mine, others = asdict(self), asdict(other)
        if any_compiler:
            mine["compiler"] = others["compiler"] = ""
        return mine == others


def read_source(name: str, folder: Path = KERNELS) -> str:
    """Text of a source with its header inserted.

    Raises:
        BackendError: A file is missing.
    """
    try:
        header = (folder / HEADER).read_text(encoding="utf-8")
        text = (folder / f"{name}.cu").read_text(encoding="utf-8")
    except OSError as error:
        raise BackendError(f"the kernels' sources are incomplete: {error}") from error
    return text.replace(f'#include "{HEADER}"\n', header.replace("#pragma once\n", ""))


@functools.cache
def compiler_version() -> str:
    """NVRTC's version, with the build number of its package if there is one.

    Raises:
        BackendError: NVRTC is not installed.
    """
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # a missing package, or a library that cannot be loaded
        raise BackendError(f"NVRTC cannot be loaded: {error}") from error
    if int(status) != 0:
        raise BackendError(f"NVRTC does not say its version: status {int(status)}")
    build = "unknown"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        build = importlib.metadata.version("nvidia-cuda-nvrtc")
    return f"{major}.{minor} ({build})"


def describe(name: str, architecture: str, compiler: str, folder: Path = KERNELS) -> Recipe:
    """The recipe of a source for an architecture."""
    digest = hashlib.sha256(read_source(name, folder).encode()).hexdigest()
    options = json.dumps(dict(OPTIONS), sort_keys=True)
    return Recipe(name, digest, options, architecture, compiler)


def compile_cubin(name: str, architecture: str, folder: Path = KERNELS) -> bytes:
    """Compiles a source; needs no GPU and no driver.

    Raises:
        BackendError: NVRTC is missing or fails; the error has its messages.
    """
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise BackendError(f"the kernels cannot be compiled: {error}") from error
    source = read_source(name, folder)
    try:
        options = ProgramOptions(name=f"{name}.cu", arch=architecture, **dict(OPTIONS))
        return bytes(Program(source, "c++", options).compile("cubin").code)
    except Exception as error:  # cuda-core's exceptions have no common base
        raise BackendError(f"NVRTC refuses {name}.cu for {architecture}: {error}") from error


def default_cache() -> Path:
    """Folder of compiled kernels in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "solo-serve" / "kernels"


def write_cubin(path: Path, recipe: Recipe, code: bytes) -> None:
    """Stores machine code atomically.

    Raises:
        OSError: It cannot be written.
    """
    header = {**asdict(recipe), "sha256": hashlib.sha256(code).hexdigest()}
    replace_bytes(path, json.dumps(header, sort_keys=True).encode() + b"\n" + code, shared=True)


def read_cubin(path: Path, recipe: Recipe, *, any_compiler: bool = False) -> bytes | None:
    """Stored machine code of a recipe; None if there is none that is valid."""
    try:
        first, _, code = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s cannot be read: %s", path, error)
        return None
    try:
        header = json.loads(first)
        digest = header.pop("sha256")
        stored = Recipe(**header)
    except (ValueError, KeyError, TypeError, AttributeError):
        logger.warning("%s is damaged and is not used", path)
        return None
    if not stored.matches(recipe, any_compiler=any_compiler):
        return None
    if hashlib.sha256(code).hexdigest() != digest:
        logger.warning("%s is damaged and is not used", path)
        return None
    return code


def prebuilt_path(folder: Path, name: str, architecture: str) -> Path:
    """File of a prebuilt cubin."""
    return folder / f"{name}.{architecture}.cubin"


def cache_path(folder: Path, recipe: Recipe) -> Path:
    """File of a cubin that was compiled on this machine."""
    return folder / f"{recipe.name}.{recipe.architecture}.{recipe.key}.cubin"


def _read_prebuilt(name: str, capability: tuple[int, int], folder: Path) -> bytes | None:
    """The best prebuilt cubin: the same major version, and the same or a lower minor version."""
    major, minor = capability
    for older in range(minor, -1, -1):
        architecture = f"sm_{major}{older}"
        recipe = describe(name, architecture, "")
        path = prebuilt_path(folder, name, architecture)
        code = read_cubin(path, recipe, any_compiler=True)
        if code is not None:
            return code
    return None


def load_cubin(
    name: str,
    capability: tuple[int, int],
    *,
    cache: Path | None,
    prebuilt: Sequence[Path] = (PREBUILT,),
) -> bytes:
    """Machine code of a source for a GPU.

    Args:
        name: One of `SOURCES`.
        capability: The GPU's compute capability.
        cache: Folder of cubins compiled on this machine; None for no cache.
        prebuilt: Folders of cubins compiled elsewhere; searched first.

    Raises:
        BackendError: It is not stored and cannot be compiled.
    """
    for folder in prebuilt:
        code = _read_prebuilt(name, capability, folder)
        if code is not None:
            return code
    architecture = f"sm_{capability[0]}{capability[1]}"
    recipe = describe(name, architecture, compiler_version())
    path = None if cache is None else cache_path(cache, recipe)
    if path is not None:
        code = read_cubin(path, recipe)
        if code is not None:
            return code
    code = compile_cubin(name, architecture)
    if path is not None:
        try:
            write_cubin(path, recipe, code)
        except OSError as error:
            logger.warning("compiled kernels are not stored: %s", error)
    return code


def load_cubins(
    capability: tuple[int, int],
    *,
    cache: Path | None,
    prebuilt: Sequence[Path] = (PREBUILT,),
) -> dict[str, bytes]:
    """`load_cubin` of every source."""
    return {name: load_cubin(name, capability, cache=cache, prebuilt=prebuilt) for name in SOURCES}
