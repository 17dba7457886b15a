"""What ONNX Runtime's providers are told: options as it wants them, all of them strings.

Symbols: B batch, H W canvas.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pipeline.model_config import InputSpec, ModelConfig, TileResize
from service.engines.base import BackendOptions

CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
CPU = "CPUExecutionProvider"

Provider = tuple[str, dict[str, str]]

# Few shapes to capture or to search for, and padding adds less than half to a batch.
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def find_fixed_canvas(spec: InputSpec) -> tuple[int, int] | None:
    """Height and width of the only canvas there is, or None if there are several."""
    return spec.resize.canvas_hw if isinstance(spec.resize, TileResize) else None


def list_batch_sizes(max_batch: int) -> tuple[int, ...]:
    """Batch sizes that smaller batches are padded to, ascending; the last is `max_batch`."""
    return (*(size for size in _BATCH_SIZES if size < max_batch), max_batch)


def cuda_options(
    options: BackendOptions, *, one_canvas: bool, stream: int | None, cuda_graph: bool
) -> dict[str, str]:
    """Options of the CUDA provider.

    Args:
        options: Precision and memory limit.
        one_canvas: The shapes are few and return: their best convolutions are worth a search.
        stream: Handle of the stream to compute on; None leaves it to the provider.
        cuda_graph: Record each shape's kernels once and replay them.
    """
    chosen = {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "EXHAUSTIVE" if one_canvas else "HEURISTIC",
        # fp32 means fp32: TF32 keeps 10 bits of the mantissa.
        "use_tf32": "0" if options.precision == "fp32" else "1",
    }
    if options.gpu_mem_limit_bytes is not None:
        chosen["gpu_mem_limit"] = str(options.gpu_mem_limit_bytes)
    if stream is not None:
        chosen["user_compute_stream"] = str(stream)
    if cuda_graph:
        chosen["enable_cuda_graph"] = "1"
    return chosen


def tensorrt_options(config: ModelConfig, cache: Path, stream: int | None) -> dict[str, str]:
    """Options of the TensorRT provider, for a float32 graph.

    Args:
        config: Its canvases and largest batch become the engine's profile.
        cache: Folder of this very engine, see `tensorrt_cache_key`.
        stream: Handle of the stream to compute on; None leaves it to the provider.
    """
    low, best, high = _profile_canvases(config)
    batch = config.limits.max_batch
    chosen = {
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
        "trt_profile_min_shapes": _shapes(1, low),
        "trt_profile_opt_shapes": _shapes(batch, best),
        "trt_profile_max_shapes": _shapes(batch, high),
    }
    if stream is not None:
        chosen["user_compute_stream"] = str(stream)
    return chosen


def tensorrt_cache_key(graph: bytes, versions: Mapping[str, str], config: ModelConfig) -> str:
    """Name of an engine's folder: another graph, library, GPU or profile is another folder.

    Args:
        graph: The ONNX file.
        versions: Of everything that takes part in building, and the GPU.
        config: Gives the profile.
    """
    parts = [hashlib.sha256(graph).hexdigest(), repr(sorted(versions.items()))]
    parts += [str(config.limits.max_batch), repr(_profile_canvases(config))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _shapes(batch: int, canvas_hw: tuple[int, int]) -> str:
    height, width = canvas_hw
    return f"images:{batch}x{height}x{width}x3,valid_hw:{batch}x2"


def _profile_canvases(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Smallest, most usual and largest canvas."""
    resize = config.input.resize
    if isinstance(resize, TileResize):
        return (resize.canvas_hw,) * 3
    step = resize.pad_multiple
    short, long = (-(-side // step) * step for side in (resize.short_side, resize.long_side))
    usual = min(long, -(-resize.short_side * 4 // (3 * step)) * step)
    return (step, step), (short, usual), (long, long)
