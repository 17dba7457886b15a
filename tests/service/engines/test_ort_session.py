from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from pipeline.model_config import ModelConfig
from pipeline.repository_config import parse_model_config
from service.engines.base import BackendError, BackendOptions
from service.engines.calls import OutputLayout
from service.engines.ort_session import (
    CPU,
    build_session,
    check_signature,
    cuda_options,
    read_layout,
)
from tests.support.blob_model import build_graph, build_typed_graph, model_config


def read_config(**changes: Any) -> ModelConfig:
    content = {**model_config(b"graph"), **changes}
    return parse_model_config(json.dumps(content)).for_version(1)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (BackendOptions(), {"use_tf32": "0"}),
        (BackendOptions(precision="fp16"), {"use_tf32": "1", "prefer_nhwc": "1"}),
        (BackendOptions(precision="bf16"), {"use_tf32": "1", "prefer_nhwc": "1"}),
        (BackendOptions(gpu_mem_limit_bytes=1 << 32), {"gpu_mem_limit": "4294967296"}),
    ],
)
def test_options_of_cuda(options: BackendOptions, changes: dict[str, str]) -> None:
    plain = {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
        "prefer_nhwc": "0",
    }
    found = cuda_options(options, few_canvases=False, stream=None, has_graphs=False)
    assert found == {**plain, **changes}
    found = cuda_options(options, few_canvases=True, stream=7, has_graphs=True)
    fixed = {"cudnn_conv_algo_search": "EXHAUSTIVE", "user_compute_stream": "7"}
    assert found == {**plain, **changes, **fixed, "enable_cuda_graph": "1"}


def test_the_layout_is_the_graphs_and_else_the_configurations() -> None:
    options = BackendOptions(threads=1)
    half = build_session(build_typed_graph(onnx.TensorProto.FLOAT16), options, [(CPU, {})])
    found = read_layout(half, read_config(candidates=7))
    assert found == OutputLayout(candidates=3, mask_stride=4, mask_type="float16")
    outputs = half.get_outputs()
    outputs[0] = SimpleNamespace(name="scores", type="tensor(float)", shape=["B", "K"])
    session: Any = SimpleNamespace(get_inputs=half.get_inputs, get_outputs=lambda: outputs)
    assert read_layout(session, read_config(candidates=7)).candidates == 7


def change_graph(**names: Any) -> bytes:
    """The blob graph with another output type, or with a fixed batch."""
    model = onnx.load_from_string(build_graph())
    for name, change in names.items():
        for value in (*model.graph.input, *model.graph.output):
            if value.name == name:
                change(value.type.tensor_type)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("name", "message"),
    [("images", "batch, height and width must be dynamic"), ("mask_probs", "must be dynamic")],
)
def test_a_graph_with_a_fixed_batch_is_refused(name: str, message: str) -> None:
    def fix(tensor: Any) -> None:
        tensor.shape.dim[0].dim_value = 2

    graph = change_graph(**{name: fix})
    with pytest.raises(BackendError, match=f"{name}.*{message}"):
        check_signature(build_session(graph, BackendOptions(threads=1), [(CPU, {})]))


def test_a_graph_with_other_outputs_is_refused() -> None:
    model = onnx.load_from_string(build_graph())
    del model.graph.output[1]
    session = build_session(model.SerializeToString(), BackendOptions(threads=1), [(CPU, {})])
    with pytest.raises(BackendError, match=r"the graph's outputs are .*they must be"):
        check_signature(session)
