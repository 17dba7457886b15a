"""Built TensorRT engines on disk, keyed on everything that decides whether one may be used.

    <cache>/<digest of the key>.engine    the plan
    <cache>/<digest of the key>.json      the key in full, SHA-256 and size of the plan
    <cache>/<TensorRT>-<GPU>.timing       timings of kernels, for the next build

An engine built for anything else could give wrong results. So a file is used only if its record
has the same key and the SHA-256 of its bytes; otherwise the engine is built again. Files are
written under a temporary name and renamed: a reader sees a whole file or none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.canvases import Bucket
from service.engines.base import Precision
from service.files import replace_bytes

logger = logging.getLogger(__name__)

BUILDER_VERSION = 1
"""Incremented when `build` makes a different engine of the same inputs."""

HardwareCompatibility = Literal["none", "same_compute_capability", "ampere_plus"]
PositiveInt = Annotated[int, Field(gt=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BuildOptions(_Record):
    """What an engine is built for.

    Attributes:
        precision: Of the graph; TensorRT takes every tensor's type from the ONNX file.
        buckets: Canvases, one optimisation profile each.
        max_batch: Most canvases in a call.
        opt_batch: Canvases in the call that the engine is tuned for.
        optimization_level: 0 builds fastest, 5 searches longest.
        workspace_bytes: Most scratch memory of one layer; None leaves it to TensorRT.
        hardware_compatibility: On which GPUs the engine may run: the model it was built on, its
            compute capability, or Ampere and later. The more GPUs, the slower.
        tf32: Whether float32 convolutions may round their inputs to TF32.
    """

    precision: Precision = "fp32"
    buckets: Annotated[tuple[Bucket, ...], Field(min_length=1)]
    max_batch: PositiveInt = 8
    opt_batch: PositiveInt = 8
    optimization_level: Annotated[int, Field(ge=0, le=5)] = 3
    workspace_bytes: PositiveInt | None = None
    hardware_compatibility: HardwareCompatibility = "none"
    tf32: bool = False


class Environment(_Record):
    """What builds an engine.

    Attributes:
        tensorrt: Version, e.g. "10.16.1.11".
        cuda: Version of the driver's CUDA, e.g. "13.0".
        sm: Compute capability, e.g. "sm_90".
        gpu: Name of the GPU.
    """

    tensorrt: str
    cuda: str
    sm: str
    gpu: str

    def runs_on(self, compatibility: HardwareCompatibility) -> Environment:
        """The environment without what the engine does not depend on."""
        if compatibility == "same_compute_capability":
            return self.model_copy(update={"gpu": "any"})
        if compatibility == "ampere_plus":
            return self.model_copy(update={"gpu": "any", "sm": "sm_80 and later"})
        return self


class EngineKey(_Record):
    """All that decides whether an engine is the right one."""

    onnx_sha256: str
    environment: Environment
    options: BuildOptions
    builder_version: int = BUILDER_VERSION

    @property
    def digest(self) -> str:
        """Name of the engine's files."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:32]


def build_key(graph: bytes, options: BuildOptions, environment: Environment) -> EngineKey:
    """The key of the engine that `options` make of a graph."""
    return EngineKey(
        onnx_sha256=hashlib.sha256(graph).hexdigest(),
        environment=environment.runs_on(options.hardware_compatibility),
        options=options,
    )


class EngineRecord(_Record):
    """The record beside an engine."""

    key: EngineKey
    plan_sha256: str
    plan_bytes: int
    build_s: float


class EngineCache:
    """A folder of engines; created when the first one is stored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def engine_file(self, key: EngineKey) -> Path:
        """File of the engine of a key."""
        return self.folder / f"{key.digest}.engine"

    def _record_file(self, key: EngineKey) -> Path:
        return self.folder / f"{key.digest}.json"

    def load(self, key: EngineKey) -> bytes | None:
        """The plan of a key; None if there is none, or none that is valid, which is logged."""
        file = self.engine_file(key)
        try:
            record = EngineRecord.model_validate_json(self._record_file(key).read_bytes())
            plan = file.read_bytes()
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            logger.warning("engine %s is built again: %s", file, error)
            return None
        if record.key != key:
            logger.warning("engine %s is built again: its record names another key", file)
            return None
        digest = hashlib.sha256(plan).hexdigest()
        if len(plan) != record.plan_bytes or digest != record.plan_sha256:
            logger.warning(
                "engine %s is built again: it has %d bytes and SHA-256 %s, its record says %d and "
                "%s",
                file,
                len(plan),
                digest,
                record.plan_bytes,
                record.plan_sha256,
            )
            return None
        return plan

    def store(self, key: EngineKey, plan: bytes, build_s: float) -> Path:
        """Writes an engine and then its record, without which it is not used.

        Returns:
            The engine's file.

        Raises:
            OSError: It cannot be written, e.g. the disk is full; nothing is left behind.
        """
        record = EngineRecord(
            key=key,
            plan_sha256=hashlib.sha256(plan).hexdigest(),
            plan_bytes=len(plan),
            build_s=round(build_s, 1),
        )
        file = self.engine_file(key)
        try:
            replace_bytes(file, plan, shared=True)
            data = record.model_dump_json(indent=2).encode()
            replace_bytes(self._record_file(key), data, shared=True)
        except OSError:
            self.forget(key)
            raise
        return file

    def forget(self, key: EngineKey) -> None:
        """Removes an engine that TensorRT refuses."""
        for file in (self._record_file(key), self.engine_file(key)):
            with suppress(OSError):
                file.unlink(missing_ok=True)

    def timing_file(self, environment: Environment) -> Path:
        """File of the timings of this TensorRT on this GPU."""
        gpu = "".join(c if c.isalnum() else "-" for c in environment.gpu)
        return self.folder / f"{environment.tensorrt}-{environment.sm}-{gpu}.timing"


def choose_cache(version_folder: Path, wanted: Path | None = None) -> EngineCache:
    """Where a version's engines go.

    Args:
        version_folder: <model_repo>/<model>/<version>.
        wanted: What the settings say; None takes `engines` in the version's folder, or where that
            cannot be written the user's cache folder, or a temporary one.
    """
    if wanted is not None:
        return EngineCache(wanted)
    default = version_folder / "engines"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    candidates = (default, Path(home) / "solo-serve", Path(tempfile.gettempdir()) / "solo-serve")
    return EngineCache(_first_writable(candidates))


def _first_writable(folders: Sequence[Path]) -> Path:
    for folder in folders:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
            return folder
    return folders[0]
