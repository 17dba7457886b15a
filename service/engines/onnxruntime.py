"""ONNX Runtime on the CPU or on CUDA; never on another device than it says.

CUDA was not run on hardware: the tests give the slots memory on the host.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pipeline.canvases import find_recorded
from pipeline.model_config import ModelConfig
from pipeline.types import Int64, UInt8
from service.engines.base import BackendError, BackendOptions, divide_calls
from service.engines.calls import BatchShape, EngineOutputs, EngineRun, OutputLayout, SlotMemory
from service.engines.device import CudaDevice, CudaError
from service.engines.device_slot import (
    GPU_SLOTS,
    DeviceSlot,
    build_device_slots,
    list_shapes,
)
from service.engines.driver import Gpu, find_gpu
from service.engines.kernels.postprocessor import Select, load_select
from service.engines.kernels.select import MaskType
from service.engines.ort_session import (
    CPU,
    CUDA,
    OUTPUTS,
    build_cuda_session,
    build_session,
    check_signature,
    read_layout,
)
from service.engines.slots import HostSlot, Slot, SlotBackend, build_on_each, describe_gpus
from service.errors import DeviceError

logger = logging.getLogger(__name__)

# 16 is onnx.TensorProto.BFLOAT16, a type that NumPy does not have.
_BOUND_TYPES: dict[MaskType, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": 16}


def find_obstacle(options: BackendOptions) -> str | None:
    """Why ONNX Runtime cannot run on the device of the options, or None; `auto` always can."""
    return _find_cuda_obstacle(options) if options.device == "cuda" else None


def _find_cuda_obstacle(options: BackendOptions) -> str | None:
    if CUDA not in ort.get_available_providers():
        return (
            f"this ONNX Runtime {ort.__version__} has no CUDA, only "
            f"{ort.get_available_providers()}; install the extra service-gpu instead of service"
        )
    gpu = find_gpu(options.gpus)
    if not isinstance(gpu, Gpu):
        return gpu
    if options.precision == "int8":
        return "int8 graphs are made for the CPU"
    return None


def build_ort_backend(
    model: bytes | Path, options: BackendOptions, config: ModelConfig | None = None
) -> SlotBackend:
    """Builds the sessions on the device asked for.

    Args:
        model: The graph's bytes, or its path where it has data files beside it.
        options: With device `auto`, CUDA if it works and else the CPU, with a warning if there is
            a GPU.
        config: Lets a GPU keep its outputs and post-process them; on the CPU it says whether
            there are tiles.

    Raises:
        BackendError: The graph cannot be read or breaks the graph contract.
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
    count, options = divide_calls(options, config)
    session = build_session(model, options, [(CPU, {})])
    if check_signature(session) == "bfloat16":
        raise BackendError("ONNX Runtime has no bfloat16 on the CPU; fp32, fp16 and int8 work")
    return _name(_build_host_slots(session, count), "cpu", options, reason)


def _name(
    slots: Sequence[Slot],
    device: str,
    options: BackendOptions,
    reason: str,
    max_batch: int | None = None,
) -> SlotBackend:
    return SlotBackend(
        slots,
        name="onnxruntime",
        device=device,
        precision=options.precision,
        reason=reason,
        max_batch=max_batch,
    )


def _build_host_slots(session: ort.InferenceSession, count: int) -> list[HostSlot]:
    """Slots that share a session, which several threads may run; its outputs are new arrays."""

    def build() -> HostSlot:
        # One for all of a slot's calls: after an interrupt the backend is not used again.
        run_options = ort.RunOptions()

        def run(images: UInt8, valid_hw: Int64) -> list[NDArray[Any]]:
            feeds = {"images": images, "valid_hw": valid_hw}
            outputs = session.run(list(OUTPUTS), feeds, run_options)
            return [np.asarray(output) for output in outputs]

        def interrupt() -> None:
            run_options.terminate = True

        return HostSlot(run, interrupt)

    return [build() for _ in range(count)]


def _build_on_gpu(
    model: bytes | Path, options: BackendOptions, config: ModelConfig | None
) -> SlotBackend:
    """Slots on CUDA; outputs stay on the device where the kernels can be loaded.

    Raises:
        BackendError: The graph cannot be read or breaks the graph contract.
        DeviceError: CUDA does not work.
    """
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN from their own packages, if they are installed
    reasons: set[str] = set()

    def build(gpu: int) -> Sequence[Slot]:
        slots, reason = _build_on_one(model, replace(options, gpus=(gpu,)), config)
        reasons.add(reason)
        return slots

    slots = build_on_each(options.gpus, build)
    reason = f"CUDA provider{describe_gpus(options)}{''.join(sorted(reasons))}"
    return _name(slots, "cuda", options, reason, config.limits.max_batch if config else None)


def _build_on_one(
    model: bytes | Path, options: BackendOptions, config: ModelConfig | None
) -> tuple[Sequence[Slot], str]:
    """Slots on one GPU, and what they do with outputs."""
    select = "nothing is known of the model" if config is None else _load_select(config, options)
    if config is None or isinstance(select, str):
        few_canvases = config is not None and bool(find_recorded(config))
        session = build_cuda_session(model, options, few_canvases=few_canvases)
        if check_signature(session) == "bfloat16":
            raise BackendError(f"bfloat16 masks cannot be copied to the host, and {select}")
        slots = _build_host_slots(session, options.slots or GPU_SLOTS)
        return slots, f"; outputs are copied to the host: {select}"
    try:
        on_device, has_graphs = _build_slots(model, options, config, *select)
    except CudaError as error:
        raise DeviceError(f"device cuda: {error}") from error
    return on_device, ", post-processing on the GPU" + (", CUDA graphs" if has_graphs else "")


def _load_select(config: ModelConfig, options: BackendOptions) -> tuple[CudaDevice, Select] | str:
    try:
        device = CudaDevice(options.gpus[0])
    except CudaError as error:
        return f"the CUDA kernels cannot be loaded ({error})"
    select = load_select(device, config.postprocess, config.mask_stride)
    return select if isinstance(select, str) else (device, select)


def _build_slots(
    model: bytes | Path,
    options: BackendOptions,
    config: ModelConfig,
    device: CudaDevice,
    select: Select,
) -> tuple[list[Slot], bool]:
    """Slots with CUDA graphs, if the canvases are known and that works; whether they have them.

    Each slot has its own thread: the runtime keeps a session's recorded graphs for each thread.
    """
    few_canvases = bool(find_recorded(config))

    def build(has_graphs: bool) -> tuple[list[Slot], bool]:
        def build_call(stream: int) -> OrtCall:
            session = build_cuda_session(
                model, options, few_canvases=few_canvases, stream=stream, has_graphs=has_graphs
            )
            return OrtCall(session, read_layout(session, config), device.device_id)

        def build_slot() -> DeviceSlot:
            return DeviceSlot(
                device,
                build_call,
                max_batch=config.limits.max_batch,
                canvases=list_shapes(config),
                select=select,
                has_graphs=has_graphs,
            )

        return build_device_slots(options.slots, build_slot, config, threads=True)

    if few_canvases:
        try:
            slots, has_graphs = build(has_graphs=True)
        except Exception as error:  # the runtime refuses the session, or fails while it records
            logger.warning("no CUDA graphs: %s", error)
        else:
            if has_graphs:
                return slots, True
            for slot in slots:  # a session that could not record is not trusted with more runs
                slot.close()
    return build(has_graphs=False)


class OrtCall:
    """A session that is bound to a slot's memory; used by the slot's thread alone.

    Args:
        session: On the slot's stream.
        layout: Of its outputs.
        gpu: Ordinal of its GPU.
    """

    def __init__(self, session: ort.InferenceSession, layout: OutputLayout, gpu: int = 0) -> None:
        self._session = session
        self._layout = layout
        self._gpu = gpu
        self._graph_ids = itertools.count(1)

    def bind(self, shape: BatchShape, memory: SlotMemory) -> EngineRun:
        """Binds inputs and outputs; a recorded run is one with a graph id of its own."""
        outputs = memory.outputs(self._layout, shape)
        binding: Any = self._session.io_binding()
        images, valid_hw = (shape.batch, *shape.canvas_hw, 3), (shape.batch, 2)
        binding.bind_input("images", "cuda", self._gpu, np.uint8, images, memory.images)
        binding.bind_input("valid_hw", "cuda", self._gpu, np.int64, valid_hw, memory.valid_hw)
        types = {
            "scores": np.float32,
            "labels": np.int64,
            "mask_probs": _BOUND_TYPES[self._layout.mask_type],
        }
        for name, output_shape in self._layout.shapes(shape).items():
            address = getattr(outputs, name)
            binding.bind_output(name, "cuda", self._gpu, types[name], output_shape, address)

        def run(run_options: ort.RunOptions) -> EngineOutputs:
            self._session.run_with_iobinding(binding, run_options)
            return outputs

        def record() -> EngineRun:
            run_options = _build_run_options(next(self._graph_ids))
            run(run_options)  # the first run with an id records
            return EngineRun(partial(run, run_options))

        return EngineRun(partial(run, _build_run_options(-1)), record)

    def close(self) -> None:
        """Drops the session."""
        del self._session


def _build_run_options(graph_id: int) -> ort.RunOptions:
    """Options of a run that does not wait for the device; -1 neither records nor replays."""
    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options
