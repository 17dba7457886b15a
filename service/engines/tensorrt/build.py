"""Builds a TensorRT engine from ONNX, with TensorRT 10 (from 10.1) and 11. NOT RUN ON HARDWARE.

No TensorRT library and no GPU has been available. Every call is checked against the real Python
bindings of 10 and 11 (tests/service/engines/tensorrt/test_api.py), and the logic against a fake;
how TensorRT behaves is not known.

The network is strongly typed: its precision is that of the ONNX file. Each bucket of canvases gets
an optimisation profile of its own.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.canvases import cover_canvases, list_canvases
from pipeline.model_config import ModelConfig
from service.engines.base import BackendError
from service.engines.builder import Report
from service.engines.tensorrt.cache import (
    BuildOptions,
    EngineCache,
    EngineKey,
    Environment,
    build_key,
)
from service.engines.tensorrt.log import Messages, PhaseProgress, build_logger, build_monitor
from service.files import replace_bytes

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger(__name__)

LEAST_VERSION = (10, 1)
"""The first whose parser knows DeformConv."""
INPUTS = ("images", "valid_hw")
OUTPUTS = ("scores", "labels", "mask_probs")


def _ignore(status: str, progress: float) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class Engine:
    """An engine, from the cache or fresh.

    Attributes:
        plan: Its bytes.
        key: What it was built from and for.
        origin: Where it comes from, one sentence.
        stored: Whether the cache holds it.
    """

    plan: bytes
    key: EngineKey
    origin: str
    stored: bool


def find_obstacle() -> str | None:
    """Why TensorRT cannot be used here, one sentence; None if it can."""
    for module, package in (("tensorrt", "tensorrt"), ("cuda.core", "cuda-core")):
        try:
            missing = importlib.util.find_spec(module) is None
        except ModuleNotFoundError:  # of the parent package
            missing = True
        if missing:
            return f"the package {package} is not installed (extra tensorrt)"
    try:
        environment = read_environment()
    except BackendError as error:
        return str(error)
    return _refuse_version(environment.tensorrt)


def _refuse_version(version: str) -> str | None:
    if _parse_version(version) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        return f"TensorRT is {version}, at least {least} is needed"
    return None


def _parse_version(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def read_environment() -> Environment:
    """Versions and GPU that an engine built now depends on.

    Raises:
        BackendError: TensorRT or CUDA does not load, or there is no GPU.
    """
    try:
        import tensorrt as trt
        from cuda.core import Device, system

        major, minor = system.get_user_mode_driver_version()
        device = Device()
        capability = device.compute_capability
        return Environment(
            tensorrt=trt.__version__,
            cuda=f"{major}.{minor}",
            sm=f"sm_{capability.major}{capability.minor}",
            gpu=device.name,
        )
    except Exception as error:  # loaders and drivers fail in many ways
        raise BackendError(f"TensorRT cannot be used: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def choose_options(config: ModelConfig, **changes: object) -> BuildOptions:
    """Options for every canvas that a model's images can have and for its largest batch.

    Args:
        config: The version's.
        **changes: Fields of `BuildOptions` that differ from the usual.
    """
    batch = config.limits.max_batch
    usual = {"buckets": cover_canvases(list_canvases(config.input)), "max_batch": batch}
    return BuildOptions.model_validate({**usual, "opt_batch": batch, **changes})


def obtain_engine(
    graph: bytes, options: BuildOptions, cache: EngineCache, report: Report = _ignore
) -> Engine:
    """The engine of a graph, from the cache, or built and stored.

    If the cache cannot be written the engine is returned all the same, and built again next time.

    Args:
        graph: ONNX with its weights inside, in the precision of `options`.
        options: What to build for.
        cache: Folder of engines.
        report: Called with the progress of a build.

    Raises:
        BackendError: The graph cannot be built; names the node if one is at fault.
    """
    environment = read_environment()
    obstacle = _refuse_version(environment.tensorrt)
    if obstacle:
        raise BackendError(obstacle)
    key = build_key(graph, options, environment)
    plan = cache.load(key)
    if plan is not None:
        return Engine(plan, key, f"engine {key.digest} from the cache", stored=True)
    started_s = time.monotonic()
    plan = build_plan(graph, options, cache.timing_file(environment), report)
    build_s = time.monotonic() - started_s
    origin = f"engine {key.digest} built in {build_s:.0f} s"
    try:
        cache.store(key, plan, build_s)
    except OSError as error:
        origin += f", not stored in {cache.folder}: {error.strerror or error}"
        logger.error("%s", origin)
        return Engine(plan, key, origin, stored=False)
    return Engine(plan, key, origin, stored=True)


def build_plan(
    graph: bytes, options: BuildOptions, timing_file: Path, report: Report = _ignore
) -> bytes:
    """Builds an engine, without looking into the cache.

    Args:
        graph: ONNX with its weights inside.
        options: What to build for.
        timing_file: Timings of earlier builds; updated. It may be missing or unusable.
        report: Called with the progress of the build.

    Raises:
        BackendError: Names the node, profile or limit at fault, as far as TensorRT says.
    """
    import tensorrt as trt

    messages = Messages()
    log = build_logger(messages)
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # what pybind11 makes of a null pointer
        raise BackendError(f"TensorRT gives no builder: {messages.explain()}") from error
    network = builder.create_network(_network_flags())
    parser = trt.OnnxParser(network, log)
    report("reading the graph", 0.0)
    if not parser.parse(graph):
        raise BackendError(f"TensorRT cannot read the graph: {_describe_errors(parser)}")
    _check_names(network)
    config = builder.create_builder_config()
    _configure(config, options)
    for index in range(len(options.buckets)):
        _add_profile(builder, config, options, index)
    timings = _load_timings(config, timing_file)
    config.progress_monitor = build_monitor(PhaseProgress(report))
    report("building the engine", 0.0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(f"TensorRT cannot build the engine: {messages.explain()}")
    _save_timings(config, timings, timing_file)
    report("built", 1.0)
    return bytes(plan)


def _network_flags() -> int:
    """Strong typing; in TensorRT 11 it is always on and the flag is deprecated."""
    import tensorrt as trt

    if _parse_version(trt.__version__)[0] >= 11:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _describe_errors(parser: trt.OnnxParser) -> str:
    """All errors of the parser, each with its node."""
    found = []
    for index in range(parser.num_errors):
        error: trt.ParserError = parser.get_error(index)
        name = error.node_name() or f"number {error.node()}"
        found.append(f"node {name} ({error.node_operator()}): {error.desc()}")
    return "; ".join(found) or "no reason given"


def _check_names(network: trt.INetworkDefinition) -> None:
    inputs = [network.get_input(index).name for index in range(network.num_inputs)]
    outputs = [network.get_output(index).name for index in range(network.num_outputs)]
    if sorted(inputs) != sorted(INPUTS) or sorted(outputs) != sorted(OUTPUTS):
        raise BackendError(
            f"the graph has inputs {inputs} and outputs {outputs}, they must be {INPUTS} and "
            f"{OUTPUTS}"
        )


def _configure(config: trt.IBuilderConfig, options: BuildOptions) -> None:
    import tensorrt as trt

    config.builder_optimization_level = options.optimization_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.hardware_compatibility == "ampere_plus":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif options.hardware_compatibility == "same_compute_capability":
        if _parse_version(trt.__version__) < (10, 9):
            raise BackendError(
                f"hardware_compatibility same_compute_capability needs TensorRT 10.9, this is "
                f"{trt.__version__}"
            )
        level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
        config.hardware_compatibility_level = level
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)


def _add_profile(
    builder: trt.Builder, config: trt.IBuilderConfig, options: BuildOptions, index: int
) -> None:
    """The profile of a bucket: any batch up to the largest, any canvas of the bucket."""
    import tensorrt as trt

    bucket = options.buckets[index]
    batches = (1, min(options.opt_batch, options.max_batch), options.max_batch)
    canvases = (bucket.min_hw, bucket.opt_hw, bucket.max_hw)
    shapes = [(b, h, w, 3) for b, (h, w) in zip(batches, canvases, strict=True)]
    profile = builder.create_optimization_profile()
    profile.set_shape("images", *(trt.Dims(shape) for shape in shapes))
    profile.set_shape("valid_hw", *(trt.Dims((batch, 2)) for batch in batches))
    if config.add_optimization_profile(profile) != index:
        raise BackendError(f"TensorRT refuses the profile of images {shapes}")


def _load_timings(config: trt.IBuilderConfig, file: Path) -> trt.ITimingCache:
    """Loads the timings of earlier builds, or an empty cache where those do not fit."""
    timings = config.create_timing_cache(_read_or_empty(file))
    if timings is None or not config.set_timing_cache(timings, False):
        logger.warning("timing cache %s does not fit this TensorRT or GPU, it is replaced", file)
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, False)
    return timings


def _save_timings(config: trt.IBuilderConfig, timings: trt.ITimingCache, file: Path) -> None:
    """Merges what another process has saved meanwhile, and writes; a failure only costs time."""
    saved = _read_or_empty(file)
    if saved:
        others = config.create_timing_cache(saved)
        if others is not None:
            timings.combine(others, False)
    try:
        replace_bytes(file, bytes(timings.serialize()), shared=True)
    except OSError as error:
        logger.warning("timing cache %s is not written: %s", file, error)


def _read_or_empty(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""
