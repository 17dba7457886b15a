"""ONNX Runtime on the CPU, on CUDA or with its TensorRT provider; never on another than it says.

CUDA and TensorRT were not run on hardware; what can run without one does so in the tests.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import onnxruntime as ort

from pipeline.model_config import ModelConfig
from pipeline.postprocess import TileCandidates
from pipeline.types import Tile
from service.cores import count_cores
from service.engines.base import BackendError, BackendOptions
from service.engines.driver import Gpu, find_gpu
from service.engines.ort_memory import CudaMemory
from service.engines.ort_options import (
    CPU,
    CUDA,
    TENSORRT,
    Provider,
    cuda_options,
    find_fixed_canvas,
    list_batch_sizes,
    tensorrt_cache_key,
    tensorrt_options,
)
from service.engines.ort_slots import BoundSlot, GraphLayout, HostSlot, Outputs, Select, Slot
from service.errors import DeviceError

logger = logging.getLogger(__name__)

GPU_SLOTS = 2  # one batch is copied while another is computed
INPUTS = {"images": ("uint8", 4), "valid_hw": ("int64", 2)}
OUTPUTS = {"scores": ("float", 2), "labels": ("int64", 2), "mask_probs": ("float", 4)}
_MASK_TYPES = {"float": "float32", "float16": "float16", "bfloat16": "bfloat16"}
_NVINFER = "libnvinfer.so.10"  # what the runtime's TensorRT provider is linked with


class OrtBackend:
    """A graph in ONNX Runtime.

    Args:
        slots: One entry for each batch that may run at once; the same one again if it can.
        device: "cpu" or "cuda".
        options: Gives the precision.
        reason: Why this device.
    """

    name = "onnxruntime"

    def __init__(
        self, slots: Sequence[Slot], device: str, options: BackendOptions, reason: str
    ) -> None:
        self.device = device
        self.precision = options.precision
        self.reason = reason
        self.concurrency = len(slots)
        self._slots = slots
        self._free: SimpleQueue[Slot] = SimpleQueue()
        for slot in slots:
            self._free.put(slot)

    def infer(self, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
        """See `Backend.infer`."""
        slot = self._free.get()
        try:
            return slot.infer(tiles)
        finally:
            self._free.put(slot)

    def interrupt(self) -> None:
        """See `Interruptible`; a call on a GPU ends by itself or not at all."""
        for slot in self._slots:
            if isinstance(slot, HostSlot):
                slot.interrupt()

    def close(self) -> None:
        """See `Backend.close`."""
        for slot in self._slots:
            slot.close()


def find_obstacle(options: BackendOptions) -> str | None:
    """Why ONNX Runtime cannot run on the device of the options, or None; `auto` always can."""
    return _find_cuda_obstacle(options) if options.device == "cuda" else None


def _find_cuda_obstacle(options: BackendOptions) -> str | None:
    if CUDA not in ort.get_available_providers():
        return (
            f"this ONNX Runtime {ort.__version__} has no CUDA, only "
            f"{ort.get_available_providers()}; install the extra service-gpu instead of service"
        )
    gpu = find_gpu()
    if not isinstance(gpu, Gpu):
        return gpu
    if options.precision == "int8":
        return "int8 graphs are made for the CPU"
    return None


def build_ort_backend(
    model: bytes | Path, options: BackendOptions, config: ModelConfig | None = None
) -> OrtBackend:
    """Builds the sessions on the device asked for.

    Args:
        model: The graph's bytes, or its path where it has data files beside it.
        options: With device `auto`, CUDA if it works and else the CPU, with a warning if there is
            a GPU.
        config: Lets a GPU keep its outputs and post-process them; on the CPU it says whether
            there are tiles.

    Raises:
        BackendError: The graph cannot be read or does not honour the graph contract.
        DeviceError: CUDA was asked for and does not work.
    """
    reason = "CPU provider"
    if options.device != "cpu":
        obstacle = _find_cuda_obstacle(options)
        try:
            if obstacle is not None:
                raise DeviceError(f"device cuda: {obstacle}")
            return _build_on_gpu(model, options, config)
        except DeviceError as error:
            if options.device == "cuda":
                raise
            if obstacle is None:
                logger.warning("device auto takes the CPU: %s", error)
            reason += f", for {error}"
    slots, options = _divide(options, config)
    session = _build_session(model, options, [(CPU, {})])
    if _check_signature(session) == "bfloat16":
        raise BackendError("ONNX Runtime has no bfloat16 on the CPU; fp32, fp16 and int8 work")
    return OrtBackend([HostSlot(session)] * slots, "cpu", options, reason)


def _divide(options: BackendOptions, config: ModelConfig | None) -> tuple[int, BackendOptions]:
    """How many calls there are at once on the CPU, and the options of one.

    The tiles of an image are canvases of the same cost, so cores that have some each need not
    wait for each other after every operator.
    """
    has_tiles = config is not None and config.input.resize.rule == "tile"
    divide = options.divide == "all" or (options.divide == "tiles" and has_tiles)
    if options.slots is None and divide:
        return options.threads or count_cores(), replace(options, threads=1)
    return options.slots or 1, options


def find_tensorrt_obstacle(options: BackendOptions) -> str | None:
    """Why ONNX Runtime's TensorRT provider cannot run here, or None."""
    if TENSORRT not in ort.get_available_providers():
        return f"this ONNX Runtime {ort.__version__} has no TensorRT provider"
    if options.precision != "fp32":
        # Its networks are weakly typed: with a lower precision allowed, the parts of the graph
        # that must stay float32 would not.
        return (
            "ONNX Runtime's TensorRT provider keeps no types, so it serves fp32 only, not "
            f"{options.precision}"
        )
    try:
        ctypes.CDLL(_NVINFER)
    except OSError as error:
        return f"TensorRT 10, which ONNX Runtime's provider needs, is not there ({error})"
    return _find_cuda_obstacle(options)


def build_ort_tensorrt_backend(
    model: bytes, options: BackendOptions, config: ModelConfig, cache: Path
) -> OrtBackend:
    """Builds an engine with the TensorRT provider, or reads it from the cache; takes minutes.

    Args:
        model: The graph's bytes, float32.
        options: Slots.
        config: Canvases and largest batch.
        cache: Folder with a folder for each engine.

    Raises:
        BackendError: The graph cannot be built.
        DeviceError: TensorRT does not work here.
    """
    obstacle = find_tensorrt_obstacle(options)
    if obstacle is not None:
        raise DeviceError(obstacle)
    gpu = find_gpu()
    versions = {"onnxruntime": ort.__version__, "gpu": repr(gpu), "tensorrt": _tensorrt_version()}
    folder = cache / tensorrt_cache_key(model, versions, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackendError(f"the engine cache {folder} cannot be made: {error}") from error
    return _build_on_gpu(model, options, config, folder)


def _tensorrt_version() -> str:
    library = ctypes.CDLL(_NVINFER)
    return str(library.getInferLibVersion())


def _build_on_gpu(
    model: bytes | Path,
    options: BackendOptions,
    config: ModelConfig | None,
    tensorrt_cache: Path | None = None,
) -> OrtBackend:
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN from their own packages, if they are installed
    canvas_hw = find_fixed_canvas(config.input) if config is not None else None

    def build(stream: int | None, *, cuda_graph: bool = False) -> ort.InferenceSession:
        wanted = cuda_options(
            options, one_canvas=canvas_hw is not None, stream=stream, cuda_graph=cuda_graph
        )
        providers = [(CUDA, wanted), (CPU, {})]
        if tensorrt_cache is not None:
            assert config is not None
            providers.insert(0, (TENSORRT, tensorrt_options(config, tensorrt_cache, stream)))
        session = _build_session(model, options, providers)
        session.disable_fallback()
        return session

    what = "TensorRT provider" if tensorrt_cache is not None else "CUDA provider"
    select = _load_select(config)
    if isinstance(select, str):
        session = build(None)
        if _check_signature(session) == "bfloat16":
            raise BackendError(f"bfloat16 masks cannot be copied to the host, and {select}")
        reason = f"{what}; outputs are copied to the host: {select}"
        return OrtBackend(
            [HostSlot(session)] * (options.slots or GPU_SLOTS), "cuda", options, reason
        )
    assert config is not None
    graphs = canvas_hw is not None and tensorrt_cache is None
    slots, graphs = _build_bound_slots(build, select, options, config, graphs)
    reason = f"{what}, post-processing on the GPU" + (", CUDA graphs" if graphs else "")
    return OrtBackend(slots, "cuda", options, reason)


def _build_bound_slots(
    build: Callable[..., ort.InferenceSession],
    select: Select,
    options: BackendOptions,
    config: ModelConfig,
    graphs: bool,
) -> tuple[list[BoundSlot], bool]:
    """Slots with CUDA graphs if that works, and whether it did."""
    canvas_hw, max_batch = find_fixed_canvas(config.input), config.limits.max_batch
    slots: list[BoundSlot] = []
    try:
        for _ in range(options.slots or GPU_SLOTS):
            slots.append(
                BoundSlot(
                    build_memory=CudaMemory,
                    build_session=lambda stream: build(stream, cuda_graph=graphs),
                    select=select,
                    read_layout=lambda session: _read_layout(session, config),
                    sizes=list_batch_sizes(max_batch) if canvas_hw else range(1, max_batch + 1),
                    fixed_canvas_hw=canvas_hw,
                    cuda_graph=graphs,
                )
            )
            if canvas_hw is not None:
                slots[-1].warm_up()
    except Exception as error:  # the runtime's and CUDA's exceptions have no common base
        for slot in slots:
            slot.close()
        if graphs:
            logger.warning("no CUDA graphs: %s", error)
            return _build_bound_slots(build, select, options, config, graphs=False)
        if isinstance(error, (BackendError, DeviceError)):
            raise
        raise DeviceError(f"device cuda: {error}") from error
    return slots, graphs


def _load_select(config: ModelConfig | None) -> Select | str:
    """What post-processes on the GPU, or why nothing does."""
    if config is None:
        return "nothing is known of the model"
    try:
        kernels: Any = importlib.import_module("service.engines.kernels.postprocessor")
        processor = kernels.CudaPostprocessor(config.postprocess, config.mask_stride)
    except Exception as error:  # compilers, drivers and loaders fail in many ways
        return f"the CUDA kernels cannot be loaded ({error})"

    def select(outputs: Outputs, stream: int) -> list[TileCandidates]:
        batch = kernels.DeviceBatch(
            scores=outputs.scores,
            labels=outputs.labels,
            mask_probs=outputs.mask_probs,
            mask_type=outputs.layout.mask_type,
            batch=outputs.batch,
            candidates=outputs.layout.candidates,
            mask_hw=outputs.mask_hw,
            release=outputs.release,
        )
        return list(processor.select(batch, stream))

    return select


def _build_session(
    model: bytes | Path, options: BackendOptions, providers: Sequence[Provider]
) -> ort.InferenceSession:
    """A session whose first provider is the one asked for.

    Raises:
        BackendError: The graph cannot be loaded.
        DeviceError: The provider cannot; the runtime alone would fall back without an error.
    """
    session_options = ort.SessionOptions()
    session_options.intra_op_num_threads = options.threads or count_cores()
    session_options.inter_op_num_threads = 1
    session_options.log_severity_level = 3
    # Waiting threads must not burn the cores that decode and encode.
    session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = str(model) if isinstance(model, Path) else model
    wanted = providers[0][0]
    try:
        session = ort.InferenceSession(source, session_options, providers=list(providers))
    except Exception as error:  # the runtime's exceptions have no common base
        if wanted != CPU and ("cuda" in str(error).lower() or "tensorrt" in str(error).lower()):
            raise DeviceError(f"device cuda: {error}") from error
        raise BackendError(f"ONNX Runtime cannot load the graph: {error}") from error
    if session.get_providers()[0] != wanted:
        raise DeviceError(
            f"device cuda: ONNX Runtime cannot use its {wanted} here (driver or libraries are "
            f"missing or do not fit); it offers {session.get_providers()}"
        )
    return session


def _read_layout(session: ort.InferenceSession, config: ModelConfig) -> GraphLayout:
    """What the slots must know of the graph; config.json says it where the graph leaves it open."""
    mask_type = _check_signature(session)
    slots = session.get_outputs()[0].shape[1]
    return GraphLayout(
        candidates=slots if isinstance(slots, int) else config.candidates,
        mask_stride=config.mask_stride,
        mask_type=mask_type,
    )


def _check_signature(session: ort.InferenceSession) -> str:
    """Compares the graph with the graph contract.

    Returns:
        The masks' type: "float32", "float16" or "bfloat16".
    """
    mask_type = "float"
    for kind, found, wanted in (
        ("input", session.get_inputs(), INPUTS),
        ("output", session.get_outputs(), OUTPUTS),
    ):
        signature = {a.name: (_element_type(a.type), len(a.shape)) for a in found}
        expected = dict(wanted)
        masks = signature.get("mask_probs", ("", 0))[0]
        if kind == "output" and masks in _MASK_TYPES:
            expected["mask_probs"], mask_type = (masks, 4), masks
        if signature != expected:
            raise BackendError(f"the graph's {kind}s are {signature}, they must be {wanted}")
        _check_dynamic(kind, found)
    return _MASK_TYPES[mask_type]


def _element_type(text: str) -> str:
    return text.removeprefix("tensor(").removesuffix(")")


def _check_dynamic(kind: str, arguments: list[Any]) -> None:
    """The batch is symbolic everywhere, and H and W of the images are."""
    for argument in arguments:
        axes = (0, 1, 2) if argument.name == "images" else (0,)
        for axis in axes:
            if isinstance(argument.shape[axis], int):
                raise BackendError(
                    f"{kind} {argument.name!r} has the fixed shape {argument.shape}; "
                    "batch, height and width must be dynamic"
                )
