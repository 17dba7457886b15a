"""TensorRT, versions 10 (from 10.1) and 11, on an NVIDIA GPU. NOT RUN ON HARDWARE.

No TensorRT library and no GPU has been available. Every call is checked against the real Python
bindings of 10 and 11 and against cuda-core, and the logic against a fake (tests/service/engines);
speed, memory and results are not known. docs/tensorrt.md says what to look at first.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pipeline.model_config import ModelConfig
from service.engines.base import BackendError, BackendOptions
from service.engines.builder import Report, Upgrade
from service.engines.device import CudaDevice, CudaError
from service.engines.device_slot import DeviceSlot, build_device_slots, list_shapes
from service.engines.kernels.postprocessor import load_select
from service.engines.slots import Slot, SlotBackend, build_on_each, describe_gpus
from service.engines.tensorrt import build as trt_build
from service.engines.tensorrt.build import Engine, choose_options, obtain_engine, read_environment
from service.engines.tensorrt.cache import BuildOptions, EngineCache, build_key
from service.engines.tensorrt.call import LoadedEngine, TrtCall, check_engine
from service.engines.tensorrt.log import Messages, build_logger

logger = logging.getLogger(__name__)


class EngineRefused(BackendError):
    """TensorRT does not deserialise an engine."""


def find_obstacle(options: BackendOptions) -> str | None:
    """Why TensorRT cannot serve with these options here, one sentence; None if it can."""
    if options.device == "cpu":
        return "device cpu was asked for"
    if options.precision == "int8":
        return "the int8 graph is made for the CPU: TensorRT takes no uint8 activations"
    return trt_build.find_obstacle()


def has_engine(
    model: bytes | Path, options: BackendOptions, config: ModelConfig, cache: Path
) -> bool:
    """Whether `build_trt_backend` would find its engine in the cache, and so be quick.

    Raises:
        BackendError: TensorRT cannot be used at all.
    """
    build = choose_options(config, precision=options.precision)
    key = build_key(_read(model), build, read_environment())
    return EngineCache(cache).load(key) is not None


def build_trt_backend(
    model: bytes | Path, options: BackendOptions, config: ModelConfig, cache: Path
) -> SlotBackend:
    """Loads a model's engine from the cache, or builds it first, which takes minutes.

    Args:
        model: ONNX in the precision asked for, weights inside; its bytes or its path.
        options: Device, precision and slots.
        config: The version's: canvases, batch, post-processing.
        cache: Folder of engines.

    Raises:
        BackendError: Says why TensorRT, the graph or the engine cannot be used.
    """
    obstacle = find_obstacle(options)
    if obstacle:
        raise BackendError(obstacle)
    graph, engines = _read(model), EngineCache(cache)
    build = choose_options(config, precision=options.precision)
    engine = obtain_engine(graph, build, engines)
    try:
        return _load(engine, build, options, config)
    except EngineRefused as error:
        logger.warning("engine %s is built again: %s", engine.key.digest, error)
    engines.forget(engine.key)
    return _load(obtain_engine(graph, build, engines), build, options, config)


def load_trt_backend(
    model: bytes | Path, options: BackendOptions, config: ModelConfig, cache: Path
) -> SlotBackend:
    """Like `build_trt_backend`, but never builds.

    Raises:
        BackendError: The cache has no such engine, or TensorRT cannot use it and it is removed.
    """
    build, engines = choose_options(config, precision=options.precision), EngineCache(cache)
    key = build_key(_read(model), build, read_environment())
    plan = engines.load(key)
    if plan is None:
        raise BackendError(f"engine {key.digest} is not in {cache}")
    try:
        origin = f"engine {key.digest} from the cache"
        return _load(Engine(plan, key, origin, stored=True), build, options, config)
    except EngineRefused:
        engines.forget(key)
        raise


def plan_upgrade(
    model: bytes | Path, options: BackendOptions, config: ModelConfig, cache: Path
) -> Upgrade:
    """The build of a model's engine in a child process, and its loading; arguments as above."""
    graph = _read(model)
    build = choose_options(config, precision=options.precision)
    return Upgrade(
        partial(store_engine, graph, build, cache),
        partial(load_trt_backend, graph, options, config, cache),
    )


def store_engine(graph: bytes, build: BuildOptions, cache: Path, report: Report) -> None:
    """Puts the engine of a graph into the cache.

    Raises:
        BackendError: It cannot be built or stored.
    """
    engine = obtain_engine(graph, build, EngineCache(cache), report)
    if not engine.stored:  # the server could not load it
        raise BackendError(engine.origin)


def _read(model: bytes | Path) -> bytes:
    return model.read_bytes() if isinstance(model, Path) else model


def _load(
    engine: Engine, build: BuildOptions, options: BackendOptions, config: ModelConfig
) -> SlotBackend:
    """Deserialises an engine and builds its slots.

    Raises:
        EngineRefused: TensorRT does not take the plan.
        BackendError: The engine breaks the graph contract, or there is too little memory.
    """
    places: set[str] = set()

    def build_on(gpu: int) -> Sequence[Slot]:
        device = CudaDevice(gpu)  # now the thread's: the engine is loaded on it
        loaded = _deserialise(engine, build, config)
        select = load_select(device, config.postprocess, config.mask_stride)
        places.add(f"host: {select}" if isinstance(select, str) else "device")

        def build_slot() -> DeviceSlot:
            return DeviceSlot(
                device,
                partial(TrtCall, device, loaded),
                max_batch=build.max_batch,
                canvases=list_shapes(config),
                select=None if isinstance(select, str) else select,
            )

        return build_device_slots(options.slots, build_slot, config, threads=False)[0]

    try:
        slots = build_on_each(options.gpus, build_on)
    except CudaError as error:
        raise BackendError(f"{engine.origin} cannot be set up: {error}") from error
    environment = engine.key.environment
    where = f"post-processed on the {'; '.join(sorted(places))}"
    return SlotBackend(
        slots,
        name="tensorrt",
        device="cuda",
        precision=build.precision,
        reason=f"TensorRT {environment.tensorrt} works ({environment.gpu}), "
        f"{engine.origin}{describe_gpus(options)}; {where}",
        max_batch=build.max_batch,
    )


def _deserialise(engine: Engine, build: BuildOptions, config: ModelConfig) -> LoadedEngine:
    import tensorrt as trt

    messages = Messages()
    log = build_logger(messages)
    runtime = trt.Runtime(log)
    plan = runtime.deserialize_cuda_engine(engine.plan)
    if plan is None:
        raise EngineRefused(f"TensorRT refuses the engine: {messages.explain()}")
    return check_engine(plan, build.buckets, config, (runtime, log))
