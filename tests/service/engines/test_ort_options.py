from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.model_config import ModelConfig, parse_model_config
from service.engines.base import BackendOptions
from service.engines.ort_options import (
    cuda_options,
    find_fixed_canvas,
    list_batch_sizes,
    tensorrt_cache_key,
    tensorrt_options,
)
from tests.support.blob_model import model_config

PUBLISHED_INPUT = {
    "resize": {"rule": "keep_ratio", "short_side": 800, "long_side": 1333, "pad_multiple": 32}
}
VERSIONS = {"tensorrt": "10.16.1", "gpu": "sm_90"}


def read_config(**changes: Any) -> ModelConfig:
    content = {**model_config(b"graph"), **changes}
    return parse_model_config(json.dumps(content)).for_version(1)


def test_only_tiles_have_one_canvas() -> None:
    assert find_fixed_canvas(read_config().input) == (128, 128)
    assert find_fixed_canvas(read_config(input=PUBLISHED_INPUT).input) is None


@pytest.mark.parametrize(
    ("max_batch", "sizes"),
    [(1, (1,)), (2, (1, 2)), (5, (1, 2, 3, 4, 5)), (8, (1, 2, 3, 4, 6, 8))],
)
def test_the_largest_batch_is_never_padded(max_batch: int, sizes: tuple[int, ...]) -> None:
    assert list_batch_sizes(max_batch) == sizes


def test_padding_adds_less_than_half() -> None:
    sizes = list_batch_sizes(64)
    for batch in range(1, 65):
        padded = next(size for size in sizes if size >= batch)
        assert padded < 1.5 * batch


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (BackendOptions(), {"use_tf32": "0"}),
        (BackendOptions(precision="fp16"), {"use_tf32": "1"}),
        (BackendOptions(gpu_mem_limit_bytes=1 << 32), {"gpu_mem_limit": "4294967296"}),
    ],
)
def test_options_of_cuda(options: BackendOptions, changes: dict[str, str]) -> None:
    plain = {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
    }
    found = cuda_options(options, one_canvas=False, stream=None, cuda_graph=False)
    assert found == {**plain, **changes}
    found = cuda_options(options, one_canvas=True, stream=7, cuda_graph=True)
    fixed = {"cudnn_conv_algo_search": "EXHAUSTIVE", "user_compute_stream": "7"}
    assert found == {**plain, **changes, **fixed, "enable_cuda_graph": "1"}


def test_options_of_tensorrt_for_many_canvases(tmp_path: Path) -> None:
    config = read_config(input=PUBLISHED_INPUT, limits={"max_batch": 4})
    assert tensorrt_options(config, tmp_path, 7) == {
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(tmp_path),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(tmp_path),
        "trt_profile_min_shapes": "images:1x32x32x3,valid_hw:1x2",
        "trt_profile_opt_shapes": "images:4x800x1088x3,valid_hw:4x2",
        "trt_profile_max_shapes": "images:4x1344x1344x3,valid_hw:4x2",
        "user_compute_stream": "7",
    }


def test_what_decides_about_an_engine_is_in_its_key() -> None:
    config = read_config()
    keys = [
        tensorrt_cache_key(b"graph", VERSIONS, config),
        tensorrt_cache_key(b"other", VERSIONS, config),
        tensorrt_cache_key(b"graph", {**VERSIONS, "tensorrt": "10.16.2"}, config),
        tensorrt_cache_key(b"graph", {**VERSIONS, "gpu": "sm_100"}, config),
        tensorrt_cache_key(b"graph", VERSIONS, read_config(limits={"max_batch": 4})),
        tensorrt_cache_key(b"graph", VERSIONS, read_config(input=PUBLISHED_INPUT)),
    ]
    assert len(set(keys)) == len(keys)
    assert tensorrt_cache_key(b"graph", dict(reversed(VERSIONS.items())), config) == keys[0]
