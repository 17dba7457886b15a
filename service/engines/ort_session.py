"""Sessions of ONNX Runtime: their providers, and the check of a graph against the contract."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from pipeline.model_config import ModelConfig
from service.cores import count_cores
from service.engines.base import BackendError, BackendOptions
from service.engines.calls import OutputLayout
from service.engines.kernels.select import MaskType
from service.errors import DeviceError

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
INPUTS = {"images": ("uint8", 4), "valid_hw": ("int64", 2)}
OUTPUTS = {"scores": ("float", 2), "labels": ("int64", 2), "mask_probs": ("float", 4)}
_MASK_TYPES: dict[str, MaskType] = {
    "float": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
}

Provider = tuple[str, dict[str, str]]


def cuda_options(
    options: BackendOptions, *, few_canvases: bool, stream: int | None, has_graphs: bool
) -> dict[str, str]:
    """Options of the CUDA provider, all of them strings.

    Args:
        options: Precision, memory limit and the GPU, which is the first of `gpus`.
        few_canvases: There are few shapes, for which an exhaustive search of convolutions pays off.
        stream: Handle of the stream to compute on; None leaves it to the provider.
        has_graphs: Record each shape's kernels once and replay them.
    """
    chosen = {
        "device_id": str(options.gpus[0]),
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "EXHAUSTIVE" if few_canvases else "HEURISTIC",
        # fp32 means fp32: TF32 keeps 10 bits of the mantissa.
        "use_tf32": "0" if options.precision == "fp32" else "1",
        # Tensor cores take NHWC: the graph is turned once, not every convolution's input.
        "prefer_nhwc": "1" if options.precision in ("fp16", "bf16") else "0",
    }
    if options.gpu_mem_limit_bytes is not None:
        chosen["gpu_mem_limit"] = str(options.gpu_mem_limit_bytes)
    if stream is not None:
        chosen["user_compute_stream"] = str(stream)
    if has_graphs:
        chosen["enable_cuda_graph"] = "1"
    return chosen


def build_cuda_session(
    model: bytes | Path,
    options: BackendOptions,
    *,
    few_canvases: bool,
    stream: int | None = None,
    has_graphs: bool = False,
) -> ort.InferenceSession:
    """A session on CUDA, never on another provider; arguments as in `cuda_options`."""
    wanted = cuda_options(options, few_canvases=few_canvases, stream=stream, has_graphs=has_graphs)
    session = build_session(model, options, [(CUDA, wanted), (CPU, {})])
    session.disable_fallback()
    return session


def build_session(
    model: bytes | Path, options: BackendOptions, providers: Sequence[Provider]
) -> ort.InferenceSession:
    """A session whose first provider is the one asked for.

    Raises:
        BackendError: The graph cannot be loaded.
        DeviceError: The provider does not work; the runtime would silently use another one.
    """
    session_options = ort.SessionOptions()
    session_options.intra_op_num_threads = options.threads or count_cores()
    session_options.inter_op_num_threads = 1
    session_options.log_severity_level = 3
    # Idle threads must not spin on cores that decode and encode images.
    session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = str(model) if isinstance(model, Path) else model
    wanted = providers[0][0]
    try:
        session = ort.InferenceSession(source, session_options, providers=list(providers))
    except Exception as error:  # the runtime's exceptions have no common base
        if wanted != CPU and "cuda" in str(error).lower():
            raise DeviceError(f"device cuda: {error}") from error
        raise BackendError(f"ONNX Runtime cannot load the graph: {error}") from error
    if session.get_providers()[0] != wanted:
        raise DeviceError(
            f"device cuda: ONNX Runtime cannot use its {wanted} here (driver or libraries are "
            f"missing or do not fit); it offers {session.get_providers()}"
        )
    return session


def read_layout(session: ort.InferenceSession, config: ModelConfig) -> OutputLayout:
    """The outputs' layout; config.json says what the graph leaves open."""
    mask_type = check_signature(session)
    slots = session.get_outputs()[0].shape[1]
    return OutputLayout(
        candidates=slots if isinstance(slots, int) else config.candidates,
        mask_stride=config.mask_stride,
        mask_type=mask_type,
    )


def check_signature(session: ort.InferenceSession) -> MaskType:
    """Compares a session's graph with the graph contract.

    Returns:
        The masks' type.
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
