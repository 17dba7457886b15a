"""TensorRT, versions 10 (from 10.1) and 11, on an NVIDIA GPU. NOT RUN ON HARDWARE.

No TensorRT library and no GPU has been at hand. Every call is checked against the real Python
bindings of 10 and 11 and against cuda-core, and the logic against a fake (tests/service/engines);
speed, memory and results are not known. docs/tensorrt.md says what to look at first.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.model_config import ModelConfig
from pipeline.postprocess import TileCandidates
from pipeline.types import Tile
from service.engines.base import Backend, BackendError, BackendOptions, Precision, split_batch
from service.engines.tensorrt import build as trt_build
from service.engines.tensorrt.build import Engine, choose_options, obtain_engine, read_environment
from service.engines.tensorrt.cache import BuildOptions, EngineCache, build_key
from service.engines.tensorrt.device import Gpu, address
from service.engines.tensorrt.log import Messages, build_logger
from service.engines.tensorrt.process import build_job
from service.engines.tensorrt.slots import Outputs, Slot, SlotPool
from service.engines.tensorrt.tensors import read_tensors
from service.models.builder import SwitchingBackend

logger = logging.getLogger(__name__)

CONCURRENCY = 2
"""Batches at once: one is copied while the other is computed."""

MASK_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}

Finish = Callable[[Slot, Outputs, int, Callable[[], None]], Sequence[TileCandidates]]
"""Makes candidates of a run's first tiles; calls its last argument when the slot may go on."""


class TrtBackend:
    """A deserialised engine with its slots.

    Args:
        slots: At least `concurrency`.
        finish: What becomes of a run's outputs.
        precision: Of the engine.
        reason: Why TensorRT, which engine.
        owners: What must live as long as the slots: TensorRT's runtime and logger.
    """

    name = "tensorrt"
    device = "cuda"
    concurrency = CONCURRENCY

    def __init__(
        self,
        slots: Sequence[Slot],
        finish: Finish,
        precision: Precision,
        reason: str,
        owners: tuple[object, ...],
    ) -> None:
        self.precision: Precision = precision
        self.reason = reason
        self._pool = SlotPool(slots)
        self._finish = finish
        self._owners = owners

    def infer(self, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
        """See `Backend.infer`."""
        slot = self._pool.take()
        given = False

        def give() -> None:
            nonlocal given
            if not given:
                given = True
                self._pool.give(slot)

        try:
            return self._finish(slot, slot.run(tiles), len(tiles), give)
        except Exception as error:  # CUDA's errors have no common base
            slot.recover()
            give()
            if isinstance(error, BackendError):
                raise
            shape = (len(tiles), *tiles[0].image.shape)
            raise BackendError(f"TensorRT failed on images {shape}: {error}") from error

    def close(self) -> None:
        """See `Backend.close`; what is still on its way keeps its slot until it is done."""
        self._pool.close()


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
) -> TrtBackend:
    """Loads a model's engine from the cache, or builds it first, which takes minutes.

    Args:
        model: ONNX in the precision asked for, weights inside; its bytes or its path.
        options: Device and precision.
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
        return _load(engine, build, config)
    except EngineRefused as error:
        logger.warning("engine %s is built again: %s", engine.key.digest, error)
    engines.forget(engine.key)
    return _load(obtain_engine(graph, build, engines), build, config)


def load_trt_backend(
    model: bytes | Path, options: BackendOptions, config: ModelConfig, cache: Path
) -> TrtBackend:
    """Like `build_trt_backend`, but never builds.

    Raises:
        BackendError: The cache has no such engine, or TensorRT cannot use it; it is forgotten then.
    """
    build, engines = choose_options(config, precision=options.precision), EngineCache(cache)
    key = build_key(_read(model), build, read_environment())
    plan = engines.load(key)
    if plan is None:
        raise BackendError(f"engine {key.digest} is not in {cache}")
    try:
        origin = f"engine {key.digest} from the cache"
        return _load(Engine(plan, key, origin, stored=True), build, config)
    except EngineRefused:
        engines.forget(key)
        raise


class EngineRefused(BackendError):
    """TensorRT does not deserialise an engine."""


def _read(model: bytes | Path) -> bytes:
    return model.read_bytes() if isinstance(model, Path) else model


def _load(engine: Engine, build: BuildOptions, config: ModelConfig) -> TrtBackend:
    """Deserialises an engine and makes its slots.

    Raises:
        EngineRefused: TensorRT does not take the plan.
        BackendError: The engine breaks the graph contract, or memory does not suffice.
    """
    import tensorrt as trt

    messages = Messages()
    log = build_logger(messages)
    runtime = trt.Runtime(log)
    loaded = runtime.deserialize_cuda_engine(engine.plan)
    if loaded is None:
        raise EngineRefused(f"TensorRT refuses the engine: {messages.explain()}")
    finish, where = _choose_finish(config)
    # Where candidates stay on the device a third batch is post-processed meanwhile.
    count = CONCURRENCY if finish is fetch_candidates else CONCURRENCY + 1
    try:
        gpu = Gpu()
        tensors = read_tensors(loaded, build.buckets, build.max_batch, gpu.create_stream())
        slots = [Slot(gpu, loaded, tensors, build.buckets, build.max_batch) for _ in range(count)]
    except BackendError:
        raise
    except Exception as error:  # CUDA's errors have no common base
        raise BackendError(f"{engine.origin} cannot be set up: {error}") from error
    environment = engine.key.environment
    reason = f"TensorRT {environment.tensorrt} works ({environment.gpu}), {engine.origin}; {where}"
    return TrtBackend(slots, finish, build.precision, reason, (runtime, log))


def fetch_candidates(
    slot: Slot, outputs: Outputs, batch: int, give: Callable[[], None]
) -> Sequence[TileCandidates]:
    """Copies a run's outputs to the host, where the pipeline post-processes them."""
    arrays = slot.fetch(outputs, batch)
    candidates = split_batch(
        arrays["scores"].astype(np.float32, copy=False),
        arrays["labels"].astype(np.int64, copy=False),
        arrays["mask_probs"].astype(np.float32, copy=False),
    )
    give()  # not before: the arrays are the slot's
    return candidates


def load_kernels() -> Any:
    """The CUDA kernels' module, which needs packages that may not be there."""
    return importlib.import_module("service.engines.kernels.postprocessor")


def _choose_finish(config: ModelConfig) -> tuple[Finish, str]:
    """Post-processing on the device where the CUDA kernels load, else on the host; and which."""
    try:
        kernels = load_kernels()
        processor = kernels.CudaPostprocessor(config.postprocess, config.mask_stride)
    except Exception as error:  # compilers, drivers and loaders fail in many ways
        logger.warning("candidates are copied to the host: %s", error)
        return fetch_candidates, f"post-processed on the host, for {error}"

    def select(
        slot: Slot, outputs: Outputs, batch: int, give: Callable[[], None]
    ) -> Sequence[TileCandidates]:
        _, candidates, height, width = outputs.shapes["mask_probs"]
        device_batch = kernels.DeviceBatch(
            scores=outputs.addresses["scores"],
            labels=outputs.addresses["labels"],
            mask_probs=outputs.addresses["mask_probs"],
            mask_type=MASK_TYPES[outputs.dtypes["mask_probs"]],
            batch=batch,
            candidates=candidates,
            mask_hw=(height, width),
            release=give,
        )
        return list(processor.select(device_batch, address(slot.stream.handle)))

    return select, "post-processed on the device"


def build_in_background(
    first: Backend,
    model: bytes | Path,
    options: BackendOptions,
    config: ModelConfig,
    cache: Path,
    warm: Callable[[Backend], None],
) -> SwitchingBackend:
    """Serves with `first` while the model's engine is built in another process, then with it.

    Args:
        first: Serves from now on; the result owns it.
        model: See `build_trt_backend`.
        options: See `build_trt_backend`.
        config: See `build_trt_backend`.
        cache: See `build_trt_backend`.
        warm: Runs the new backend once and raises if its output is not right.
    """
    graph = _read(model)
    job = build_job(graph, choose_options(config, precision=options.precision), cache)
    return SwitchingBackend(
        first,
        job,
        lambda: load_trt_backend(graph, options, config, cache),
        warm,
        concurrency=CONCURRENCY,
    )
