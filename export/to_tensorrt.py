"""Builds a published version's TensorRT engine before any server needs it. NOT RUN ON HARDWARE.

The engine is the one that the server would build itself: same options, same cache, same key. It is
never published, for it runs on no other GPU than this one's kind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from export.errors import ExportError
from pipeline.model_config import ModelConfig
from service.engines.base import BackendError, Precision
from service.engines.tensorrt.build import choose_options, find_obstacle, obtain_engine
from service.engines.tensorrt.cache import EngineCache, HardwareCompatibility, choose_cache
from service.models.repository import ModelRefused, read_config

GRAPHS: dict[Precision, str] = {
    "fp32": "model.onnx",
    "fp16": "model.fp16.onnx",
    "bf16": "model.bf16.onnx",
}
"""Files of a version that TensorRT can build from; the int8 graph is made for the CPU."""


def build_tensorrt(
    folder: Path,
    *,
    version: int | None = None,
    precision: Precision = "fp16",
    cache: Path | None = None,
    optimization_level: int = 3,
    workspace_bytes: int | None = None,
    hardware_compatibility: HardwareCompatibility = "none",
    say: Callable[[str], None] = print,
) -> Path:
    """Puts the engine of a published version into the engine cache.

    The server finds it there only if it is built with the server's options, which are the
    defaults of all that follows `cache`.

    Args:
        folder: A model's folder of model_repo.
        version: Default: the highest.
        precision: Of the graph to build from, which must be published.
        cache: Folder of engines; default: where the server looks.
        optimization_level: 0 builds fastest, 5 searches longest.
        workspace_bytes: Most scratch memory of one layer; None leaves it to TensorRT.
        hardware_compatibility: On which GPUs the engine may run.
        say: Called with messages about the progress.

    Returns:
        The engine's file.

    Raises:
        ExportError: TensorRT cannot be used here, the version has no such graph or another one
            than config.json says, or the engine cannot be built or stored.
    """
    obstacle = find_obstacle()
    if obstacle:
        raise ExportError(f"no TensorRT engine: {obstacle}")
    try:
        config = read_config(folder, version)
        options = choose_options(
            config,
            precision=precision,
            optimization_level=optimization_level,
            workspace_bytes=workspace_bytes,
            hardware_compatibility=hardware_compatibility,
        )
    except (ModelRefused, ValidationError) as error:
        raise ExportError(f"no TensorRT engine: {error}") from error
    graph = _read_graph(folder, config, precision)
    engines = EngineCache(cache) if cache else choose_cache(folder / str(config.version))
    try:
        engine = obtain_engine(graph, options, engines, _announce(say))
    except BackendError as error:
        raise ExportError(f"no TensorRT engine: {error}") from error
    if not engine.stored:
        raise ExportError(engine.origin)
    file = engines.engine_file(engine.key)
    say(f"{engine.origin}: {file}")
    return file


def _read_graph(folder: Path, config: ModelConfig, precision: Precision) -> bytes:
    """The graph of a precision, with the hash that config.json says."""
    name = GRAPHS.get(precision)
    if name is None or name not in config.files:
        raise ExportError(
            f"no TensorRT engine: {folder.name} version {config.version} has no graph of "
            f"precision {precision} for it, only {sorted(config.files)}"
        )
    file = folder / str(config.version) / name
    try:
        graph = file.read_bytes()
    except OSError as error:
        raise ExportError(f"{file}: {error.strerror or error}") from error
    digest = hashlib.sha256(graph).hexdigest()
    if digest != config.files[name].sha256:
        raise ExportError(
            f"{file}: its SHA-256 is {digest}, config.json says {config.files[name].sha256}"
        )
    return graph


def _announce(say: Callable[[str], None]) -> Callable[[str, float], None]:
    """Says every tenth of a build once."""
    tenth = -1

    def report(status: str, progress: float) -> None:
        nonlocal tenth
        if int(10 * progress) > tenth:
            tenth = int(10 * progress)
            say(f"{status}, {progress:.0%}")

    return report
