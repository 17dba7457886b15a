"""Inputs and outputs of a TensorRT engine. NOT RUN ON HARDWARE, see `trt`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.canvases import Bucket, Canvas
from service.engines.base import BackendError
from service.engines.tensorrt.device import address

if TYPE_CHECKING:
    import tensorrt as trt
    from cuda.core import Stream

Shape = tuple[int, ...]

HOST_DTYPES: dict[str, type[np.generic]] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": np.uint16,  # NumPy has no bfloat16
    "INT64": np.int64,
    "INT32": np.int32,
    "UINT8": np.uint8,
}


@dataclass(frozen=True)
class Tensor:
    """An input or output of the engine.

    Attributes:
        name: As in the graph.
        dtype: TensorRT's name of it, e.g. "HALF".
        max_bytes: Of the greatest shape of any profile.
    """

    name: str
    dtype: str
    max_bytes: int


def read_shape(dims: trt.Dims) -> Shape:
    """A shape of TensorRT's as a tuple; -1 for what is not known."""
    return tuple(dims[axis] for axis in range(len(dims)))


def count_bytes(shape: Shape, dtype: str) -> int:
    """Bytes of a dense tensor."""
    return int(np.prod(shape)) * np.dtype(HOST_DTYPES[dtype]).itemsize


def set_shapes(context: trt.IExecutionContext, batch: int, canvas: Canvas, where: str) -> None:
    """Gives both inputs their shapes.

    Raises:
        BackendError: Names the input and the shape that TensorRT refuses.
    """
    for name, shape in (("images", (batch, *canvas, 3)), ("valid_hw", (batch, 2))):
        if not context.set_input_shape(name, shape):
            raise BackendError(f"{name}: TensorRT refuses the shape {shape} in {where}")
    missing = context.infer_shapes()
    if missing:
        raise BackendError(f"TensorRT cannot infer the shapes of {missing} in {where}")


def read_tensors(
    engine: trt.ICudaEngine, buckets: Sequence[Bucket], max_batch: int, stream: Stream
) -> list[Tensor]:
    """Inputs and outputs of an engine, and the most bytes of each.

    Raises:
        BackendError: The engine is not what the graph contract says; names the tensor.
    """
    import tensorrt as trt

    if engine.num_optimization_profiles != len(buckets):
        raise BackendError(
            f"the engine has {engine.num_optimization_profiles} profiles for {len(buckets)} buckets"
        )
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    dtypes = {name: engine.get_tensor_dtype(name).name for name in names}
    check_dtypes(dtypes)
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    most = dict.fromkeys(names, 0)
    for profile, bucket in enumerate(buckets):
        context.set_optimization_profile_async(profile, address(stream.handle))
        set_shapes(context, max_batch, bucket.max_hw, f"profile {profile}")
        for name in names:
            shape = read_shape(context.get_tensor_shape(name))
            if min(shape) < 0:
                raise BackendError(f"{name}: its shape {shape} depends on the data")
            most[name] = max(most[name], count_bytes(shape, dtypes[name]))
    stream.sync()
    return [Tensor(name, dtypes[name], most[name]) for name in names]


def check_dtypes(dtypes: dict[str, str]) -> None:
    """Refuses an engine whose tensors are not those of the graph contract."""
    wanted = {
        "images": ("UINT8",),
        "valid_hw": ("INT64",),
        "scores": ("FLOAT",),
        "labels": ("INT64",),
        "mask_probs": ("FLOAT", "HALF", "BF16"),
    }
    if set(dtypes) != set(wanted):
        raise BackendError(f"the engine has {sorted(dtypes)}, expected {sorted(wanted)}")
    for name, allowed in wanted.items():
        if dtypes[name] not in allowed:
            raise BackendError(f"{name}: the engine has {dtypes[name]}, expected {allowed}")
