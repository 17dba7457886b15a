"""The exported graph of every head, run at several canvas and batch sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from export.errors import GraphError
from export.onnx_graph import (
    build_onnx,
    check_graph,
    num_candidates,
)
from export.parity import build_cases, compare, run_onnx, run_torch
from tests.support.tiny_graph import Recipe, exported
from tests.support.tiny_solo import tiny_config, tiny_network
from training.configs.schema import Config, HeadKind
from training.model.solo import Solo

SIZES = ((64, 96), (160, 128), (96, 224))
VARIANTS = [
    pytest.param("vanilla", "published", 18, id="vanilla-published-18"),
    pytest.param("decoupled", "paper", 20, id="decoupled-paper-20"),
    pytest.param("decoupled_light", "published", 19, marks=pytest.mark.slow, id="light-published"),
    pytest.param("vanilla", "paper", 18, marks=pytest.mark.slow, id="vanilla-paper"),
    pytest.param("decoupled", "published", 18, marks=pytest.mark.slow, id="decoupled-published"),
    pytest.param("decoupled_light", "paper", 18, marks=pytest.mark.slow, id="light-paper"),
]


def strings_of(message: onnx.ModelProto) -> str:
    """The graph as text, without weights."""
    copy = onnx.ModelProto()
    copy.CopyFrom(message)
    for tensor in copy.graph.initializer:
        tensor.raw_data = b""
    return str(copy)


@pytest.mark.parametrize(("kind", "recipe", "opset"), VARIANTS)
def test_the_graph_is_a_self_contained_model_with_symbolic_dimensions(
    kind: HeadKind, recipe: Recipe, opset: int
) -> None:
    network, data = exported(kind, recipe, opset)
    model = onnx.load_from_string(data)
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    candidates = num_candidates(network)
    assert {i.name: (i.type, i.shape) for i in session.get_inputs()} == {
        "images": ("tensor(uint8)", ["batch", "height", "width", 3]),
        "valid_hw": ("tensor(int64)", ["batch", 2]),
    }
    assert {o.name: (o.type, o.shape) for o in session.get_outputs()} == {
        "scores": ("tensor(float)", ["batch", candidates]),
        "labels": ("tensor(int64)", ["batch", candidates]),
        "mask_probs": ("tensor(float)", ["batch", candidates, "mask_height", "mask_width"]),
    }
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    kinds = {node.op_type for node in model.graph.node}
    assert "BatchNormalization" not in kinds, "batch norm is folded into the convolutions"
    assert "GroupNormalization" not in kinds, "slow on ONNX Runtime's CPU"
    weights = sum(p.numel() * 4 for p in network.parameters())
    assert len(data) < weights + 150_000, "the file holds little but the weights"


@pytest.mark.parametrize(("kind", "recipe", "opset"), VARIANTS)
def test_the_graph_has_no_metadata_of_the_machine(
    kind: HeadKind, recipe: Recipe, opset: int
) -> None:
    model = onnx.load_from_string(exported(kind, recipe, opset)[1])
    text = strings_of(model)
    for trace in (".py", "site-packages", "stack_trace", "metadata_props", "doc_string", "/home"):
        assert trace not in text
    assert model.producer_name == "solo-serve"


@pytest.mark.parametrize(("kind", "recipe", "opset"), VARIANTS)
def test_pytorch_and_onnx_runtime_agree_at_every_size_and_batch(
    kind: HeadKind, recipe: Recipe, opset: int
) -> None:
    network, data = exported(kind, recipe, opset)
    report = compare(network, data, build_cases(SIZES, (1, 2), seed=1))
    assert report["passed"], report
    assert report["total"]["candidates_torch"] > 200
    assert report["total"]["max_mask_difference"] < 1e-4
    assert len(report["cases"]) == 12


@pytest.mark.parametrize(("kind", "recipe", "opset"), VARIANTS)
def test_an_image_does_not_depend_on_its_batch(kind: HeadKind, recipe: Recipe, opset: int) -> None:
    _, data = exported(kind, recipe, opset)
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    case = next(build_cases([(96, 128)], (3,)))
    outputs = session.run(None, {"images": case.images, "valid_hw": case.valid_hw})
    for index in range(3):
        part = slice(index, index + 1)
        alone = session.run(None, {"images": case.images[part], "valid_hw": case.valid_hw[part]})
        for together, single in zip(outputs, alone, strict=True):
            np.testing.assert_allclose(together[part], single, rtol=0, atol=1e-5)


def test_candidates_are_ranked_and_padding_is_ignored() -> None:
    network, data = exported("vanilla", "published", 18)
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    case = next(build_cases([(96, 128)], (2,)))
    found = run_onnx(session, case)
    for candidates in found:
        assert (np.diff(candidates.scores) <= 0).all()
        assert len(candidates.scores) > 5
    dirty = case.images.copy()
    rows, columns = case.valid_hw[1]
    dirty[1, rows:] = 255
    dirty[1, :, columns:] = 255
    again = session.run(None, {"images": dirty, "valid_hw": case.valid_hw})
    clean = session.run(None, {"images": case.images, "valid_hw": case.valid_hw})
    for one, other in zip(again, clean, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(run_torch(network, case)) == 2


def ablation_config(name: str) -> Config:
    """A row of the paper's ablations: another alignment, or one level at stride 8."""
    config = tiny_config("vanilla" if name == "single" else "decoupled_light")
    if name != "single":
        head = replace(config.model.head, align=cast(Any, name))
        return replace(config, model=replace(config.model, head=head))
    head = replace(
        config.model.head,
        num_grids=(9,),
        level_strides=(8,),
        mask_strides=(4,),
        scale_ranges=((1, 2048),),
    )
    return replace(config, model=replace(config.model, neck="single", head=head))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adaptive_max_pool", "region_grid", "single"])
def test_the_papers_ablations_agree_at_every_size(name: str) -> None:
    """32x32: the 4x4 features are smaller than the grid; 160x128: not divisible by the grid."""
    network = tiny_network(ablation_config(name))
    data = build_onnx(network)
    sizes = ((32, 32), (64, 96), (160, 128))
    report = compare(network, data, build_cases(sizes, (1, 2), seed=1))
    assert report["passed"], report
    assert report["total"]["candidates_torch"] > 100
    assert report["total"]["max_mask_difference"] < 1e-4


@pytest.mark.slow
def test_the_export_is_deterministic() -> None:
    _, first = exported("vanilla", "published", 18)
    second = build_onnx(tiny_network(tiny_config("vanilla", "published")), opset=18)
    assert first == second


@pytest.mark.parametrize("opset", [11, 17, 21])
def test_other_opsets_are_rejected(opset: int) -> None:
    with pytest.raises(GraphError, match=f"opset is {opset}, expected one of 18, 19, 20"):
        build_onnx(tiny_network(tiny_config()), opset=opset)


def test_a_network_in_training_mode_is_rejected() -> None:
    with pytest.raises(GraphError, match="training mode"):
        build_onnx(tiny_network(tiny_config()).train())


def minimal_model(dims: tuple[str | int, ...]) -> onnx.ModelProto:
    make = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "minimal",
        [make("x", onnx.TensorProto.FLOAT, dims)],
        [make("y", onnx.TensorProto.FLOAT, dims)],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])


def test_check_graph_accepts_a_valid_model() -> None:
    check_graph(minimal_model(("batch", 3)), 18)


def test_check_graph_names_the_violation() -> None:
    model = minimal_model(("batch", 3))
    with pytest.raises(GraphError, match="expected 20"):
        check_graph(model, 20)
    model.graph.node[0].input[0] = "missing"
    with pytest.raises(GraphError, match="not valid ONNX"):
        check_graph(model, 18)


def test_a_fixed_dimension_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(network: Solo, opset: int) -> onnx.ModelProto:
        model = minimal_model((1, 64, 64, 3))
        model.graph.input[0].name = model.graph.node[0].input[0] = "images"
        model.graph.input.append(
            onnx.helper.make_tensor_value_info("valid_hw", onnx.TensorProto.INT64, ("b", 2))
        )
        return model

    monkeypatch.setattr("export.onnx_graph._export", fixed)
    with pytest.raises(GraphError, match=r"images has the shape \[1, 64, 64, 3\], expected"):
        build_onnx(tiny_network(tiny_config()))
