from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.emulate import emulate
from export.errors import GraphError
from export.precision import LOW_TYPES, LowPrecision, find_values, lower_precision
from tests.support.typed_graph import build_graph, feeds_of

NUMPY_TYPES = {p: helper.tensor_dtype_to_np_dtype(t.elem_type) for p, t in LOW_TYPES.items()}
PRECISIONS: tuple[LowPrecision, ...] = ("fp16", "bf16")


def run(graph: bytes, feeds: dict[str, Any]) -> list[Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    outputs: list[Any] = session.run(["scores", "labels", "mask_probs"], feeds)
    return outputs


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> LowPrecision:
    chosen: LowPrecision = request.param
    return chosen


@pytest.fixture
def typed(precision: LowPrecision) -> onnx.ModelProto:
    return onnx.load_from_string(lower_precision(build_graph(), precision))


def test_inputs_scores_and_labels_keep_their_types(
    typed: onnx.ModelProto, precision: LowPrecision
) -> None:
    values = (*typed.graph.input, *typed.graph.output)
    assert {v.name: v.type.tensor_type.elem_type for v in values} == {
        "images": TensorProto.UINT8,
        "valid_hw": TensorProto.INT64,
        "scores": TensorProto.FLOAT,
        "labels": TensorProto.INT64,
        "mask_probs": LOW_TYPES[precision].elem_type,
    }


def test_only_the_parts_named_by_the_rule_are_float32(
    typed: onnx.ModelProto, precision: LowPrecision
) -> None:
    low = find_values(typed, LOW_TYPES[precision].elem_type)
    full = find_values(typed, TensorProto.FLOAT)
    islands = {"normalised", "statistics", "category_logits", "category_probs", "area", "inside"}
    assert {*islands, "total", "maskness", "coordinates", "ranked", "scores", "scales"} <= full
    pixels = {"features", "grouped", "scaled", "shifted", "active", "enlarged", "mask_logits"}
    assert {*pixels, "rows", "all_masks", "mask_probs"} <= low


def test_weights_are_low_precision_except_for_the_category_convolution(
    typed: onnx.ModelProto, precision: LowPrecision
) -> None:
    types = {t.name: t.data_type for t in typed.graph.initializer}
    low = LOW_TYPES[precision].elem_type
    assert types["stem_weight_low"] == types["mask_weight_low"] == types["gamma_low"] == low
    assert types["category_weight"] == TensorProto.FLOAT
    assert "stem_weight" not in types and "mask_weight" not in types


def test_casts_are_neither_chained_nor_duplicated(typed: onnx.ModelProto) -> None:
    made_by = producers(typed)
    casts = [node for node in typed.graph.node if node.op_type == "Cast"]
    sources = [cast.input[0] for cast in casts]
    assert len(sources) == len(set(sources))
    before = [made_by[name].op_type for name in sources if name in made_by]
    assert "Cast" not in before
    read = {name for node in typed.graph.node for name in node.input}
    assert all(cast.output[0] in read for cast in casts)


def test_the_emulation_equals_onnxs_reference_evaluator(precision: LowPrecision) -> None:
    """Two independent evaluations of the typed graph; sums may differ by one rounding step."""
    graph = lower_precision(build_graph(), precision)
    feeds = feeds_of((16, 32))
    reference = ReferenceEvaluator(onnx.load_from_string(graph))
    scores, labels, masks = (np.asarray(output) for output in reference.run(None, feeds))
    found = run(emulate(graph, precision), feeds)
    assert scores.dtype == np.float32 and masks.dtype == NUMPY_TYPES[precision]
    tolerance = {"fp16": 2e-3, "bf16": 1.6e-2}[precision]  # four steps of the type at 1
    np.testing.assert_allclose(found[0], scores, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found[2], masks.astype(np.float32), rtol=0, atol=tolerance)
    np.testing.assert_array_equal(found[1], labels)


def test_the_emulation_rounds_where_the_cpu_provider_does_not(precision: LowPrecision) -> None:
    graph = lower_precision(build_graph(), precision)
    masks = run(emulate(graph, precision), feeds_of((16, 32)))[2]
    rounded = masks.astype(NUMPY_TYPES[precision]).astype(np.float32)
    np.testing.assert_array_equal(masks, rounded)
    full = run(build_graph(), feeds_of((16, 32)))[2]
    assert 0 < np.abs(masks - full).max() < 0.02


@pytest.mark.parametrize("image_hw", [(56, 56), (272, 272)])
def test_areas_above_2048_and_65504_pixels_are_exact(
    precision: LowPrecision, image_hw: tuple[int, int]
) -> None:
    """One candidate's mask covers the canvas: its area is not representable in fp16."""
    area = image_hw[0] * image_hw[1]
    assert area > (65504 if image_hw[0] > 100 else 2048)
    with np.errstate(over="ignore"):
        assert float(np.float16(area + 1)) != area + 1
    graph = lower_precision(build_graph(full_mask=True), precision)
    model = onnx.load_from_string(emulate(graph, precision))
    for name in ("area", "maskness"):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    areas, maskness, scores = session.run(["area", "maskness", "scores"], feeds_of(image_hw))
    assert areas.max() == area
    assert np.isfinite(maskness).all() and maskness.max() == pytest.approx(1, abs=1e-3)
    assert np.isfinite(scores).all() and (np.diff(scores) <= 0).all()


def test_float16_runs_on_the_cpu_provider_and_halves_the_size() -> None:
    graph = lower_precision(build_graph(channels=1024), "fp16")
    assert len(graph) < 0.55 * len(build_graph(channels=1024))
    masks = run(graph, feeds_of((16, 32)))[2]
    assert masks.dtype == np.float16


def test_the_same_graph_gives_the_same_bytes(precision: LowPrecision) -> None:
    assert lower_precision(build_graph(), precision) == lower_precision(build_graph(), precision)


def test_bfloat16_uses_the_opset_with_its_convolution() -> None:
    opsets = [
        onnx.load_from_string(lower_precision(build_graph(), p)).opset_import[0].version
        for p in PRECISIONS
    ]
    assert opsets == [18, 22]


def test_a_weight_too_large_for_float16_is_rejected_but_fits_bfloat16() -> None:
    model = onnx.load_from_string(build_graph())
    weight = next(t for t in model.graph.initializer if t.name == "stem_weight")
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = 70000
    weight.CopyFrom(numpy_helper.from_array(values, "stem_weight"))
    graph = model.SerializeToString()
    with pytest.raises(GraphError, match="stem_weight contains 70000, too large"):
        lower_precision(graph, "fp16")
    assert lower_precision(graph, "bf16")


def test_a_graph_with_inconsistent_types_is_rejected() -> None:
    model = onnx.load_from_string(build_graph())
    node = next(n for n in model.graph.node if n.output[0] == "scaled")
    node.input[1] = "valid_hw"
    with pytest.raises(GraphError, match="types of the graph cannot be inferred"):
        lower_precision(model.SerializeToString(), "fp16")


def test_ranks_are_descending_in_every_precision(precision: LowPrecision) -> None:
    scores = run(emulate(lower_precision(build_graph(), precision), precision), feeds_of((16, 32)))
    assert all(a >= b for row in scores[0] for a, b in pairwise(row))
