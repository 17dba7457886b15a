"""How a slot calls a TensorRT engine. NOT RUN ON HARDWARE, see `engine`.

For each shape a slot makes an execution context over its memory. One context for each recorded
graph, because a graph holds only as long as its context is not changed; the contexts of a slot
share its scratch memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.canvases import Bucket, find_bucket
from pipeline.model_config import ModelConfig
from service.engines.base import BackendError
from service.engines.calls import BatchShape, EngineOutputs, EngineRun, OutputLayout, SlotMemory
from service.engines.device import CudaDevice
from service.engines.kernels.select import MaskType

if TYPE_CHECKING:
    import tensorrt as trt

_DTYPES = {
    "images": ("UINT8",),
    "valid_hw": ("INT64",),
    "scores": ("FLOAT",),
    "labels": ("INT64",),
    "mask_probs": ("FLOAT", "HALF", "BF16"),
}
_MASK_TYPES: dict[str, MaskType] = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class LoadedEngine:
    """A deserialised engine that honours the graph contract.

    Attributes:
        engine: TensorRT's.
        layout: Of its outputs.
        buckets: One for each of its profiles.
        owners: What must live as long as the engine: TensorRT's runtime and logger.
    """

    engine: trt.ICudaEngine
    layout: OutputLayout
    buckets: Sequence[Bucket]
    owners: tuple[object, ...]


def check_engine(
    engine: trt.ICudaEngine,
    buckets: Sequence[Bucket],
    config: ModelConfig,
    owners: tuple[object, ...],
) -> LoadedEngine:
    """Compares an engine with the graph contract.

    Raises:
        BackendError: Names the tensor that differs.
    """
    if engine.num_optimization_profiles != len(buckets):
        raise BackendError(
            f"the engine has {engine.num_optimization_profiles} profiles for {len(buckets)} buckets"
        )
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    if set(names) != set(_DTYPES):
        raise BackendError(f"the engine has {sorted(names)}, expected {sorted(_DTYPES)}")
    dtypes = {name: engine.get_tensor_dtype(name).name for name in names}
    for name, allowed in _DTYPES.items():
        if dtypes[name] not in allowed:
            raise BackendError(f"{name}: the engine has {dtypes[name]}, expected {allowed}")
    candidates = engine.get_tensor_shape("scores")[1]
    layout = OutputLayout(
        candidates=candidates if candidates > 0 else config.candidates,
        mask_stride=config.mask_stride,
        mask_type=_MASK_TYPES[dtypes["mask_probs"]],
    )
    return LoadedEngine(engine, layout, buckets, owners)


class TrtCall:
    """An engine on a slot's stream.

    Args:
        device: The GPU.
        loaded: The engine, shared by all slots.
        stream: The slot's, by its handle.
    """

    def __init__(self, device: CudaDevice, loaded: LoadedEngine, stream: int) -> None:
        self._device = device
        self._loaded = loaded
        self._stream = stream
        self._scratch = device.allocate(max(1, loaded.engine.device_memory_size_v2))

    def bind(self, shape: BatchShape, memory: SlotMemory) -> EngineRun:
        """Makes an execution context for a shape.

        Raises:
            BackendError: Names the tensor and the shape that TensorRT refuses.
        """
        outputs = memory.outputs(self._loaded.layout, shape)
        context = self._create_context(shape)
        addresses = {
            "images": memory.images,
            "valid_hw": memory.valid_hw,
            "scores": outputs.scores,
            "labels": outputs.labels,
            "mask_probs": outputs.mask_probs,
        }
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise BackendError(f"{name}: TensorRT refuses its address {address:#x}")

        def enqueue() -> EngineOutputs:
            if not context.execute_async_v3(self._stream):
                images = (shape.batch, *shape.canvas_hw, 3)
                raise BackendError(f"TensorRT cannot run images {images}")
            return outputs

        def record() -> EngineRun:
            graph = self._device.capture(self._stream, enqueue)

            def replay() -> EngineOutputs:
                self._device.launch_graph(graph, self._stream)
                return outputs

            return EngineRun(replay, close=graph.close)

        return EngineRun(enqueue, record)

    def _create_context(self, shape: BatchShape) -> trt.IExecutionContext:
        import tensorrt as trt

        try:
            profile = find_bucket(self._loaded.buckets, shape.canvas_hw)
        except ValueError as error:
            raise BackendError(f"images: {error}") from error
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._loaded.engine.create_execution_context(strategy)
        if context is None:
            raise BackendError("TensorRT gives no execution context")
        context.set_device_memory(self._scratch.pointer, self._scratch.size_bytes)
        if not context.set_optimization_profile_async(profile, self._stream):
            raise BackendError(f"images: TensorRT refuses profile {profile} for {shape.canvas_hw}")
        inputs = {"images": (shape.batch, *shape.canvas_hw, 3), "valid_hw": (shape.batch, 2)}
        for name, wanted in inputs.items():
            if not context.set_input_shape(name, wanted):
                raise BackendError(
                    f"{name}: TensorRT refuses the shape {wanted} in profile {profile}"
                )
        missing = context.infer_shapes()
        if missing:
            raise BackendError(f"TensorRT cannot infer the shapes of {missing}")
        for name, expected in self._loaded.layout.shapes(shape).items():
            dims = context.get_tensor_shape(name)
            found = tuple(dims[axis] for axis in range(len(dims)))
            if found != expected:  # its memory has the size of the expected one
                raise BackendError(f"{name}: the engine gives {found}, expected {expected}")
        return context

    def close(self) -> None:
        """Frees the scratch memory and drops the engine."""
        self._device.free(self._scratch)
        del self._loaded
