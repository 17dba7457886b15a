"""Graphs with early exits against the plain ones, at thresholds that empty and fill levels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.errors import GraphError
from export.exit_graph import add_exits
from export.parity import Case, draw_blobs
from export.quantize import quantize
from pipeline.types import Candidates
from service.engines.base import BackendError, split_batch
from tests.support.tiny_graph import Recipe, exported
from tests.support.tiny_solo import tiny_config
from tests.support.typed_graph import build_graph as build_other_graph
from training.configs.schema import HeadKind

SIDE_PX = 96
STRIDE = 4
FINE_CELLS = 8 * 8  # of the first of the two levels
NETWORKS = (
    "vanilla",
    "decoupled",
    pytest.param("published decoupled", marks=pytest.mark.slow),
    pytest.param("light", marks=pytest.mark.slow),
    "int8",
)

EXPORTS: dict[str, tuple[HeadKind, Recipe, int]] = {
    "vanilla": ("vanilla", "published", 18),
    "decoupled": ("decoupled", "paper", 20),
    "published decoupled": ("decoupled", "published", 18),
    "light": ("decoupled_light", "paper", 18),
}


def draw_images() -> Any:
    """[3, H, W, 3]: blobs, a uniform image, other blobs."""
    rng = np.random.default_rng(5)
    plain = np.full((SIDE_PX, SIDE_PX, 3), 90, np.uint8)
    hw = (SIDE_PX, SIDE_PX)
    return np.stack([draw_blobs(rng, hw), plain, draw_blobs(rng, hw)])


@lru_cache
def plain_graph(network: str) -> bytes:
    if network == "int8":
        images = draw_images()
        valid_hw = np.full((len(images), 2), SIDE_PX)
        return quantize(plain_graph("decoupled"), [Case("blobs", images, valid_hw)])
    return exported(*EXPORTS[network])[1]


def ranking_of(model: onnx.ModelProto) -> tuple[str, str]:
    """Names of the ranked category scores and of the threshold constant."""
    scores = next(n for n in model.graph.node if n.op_type == "TopK").output[0]
    comparison = next(n for n in model.graph.node if n.op_type == "Greater" and scores in n.input)
    return scores, comparison.input[1]


def with_threshold(graph: bytes, threshold: float) -> bytes:
    model = onnx.load_from_string(graph)
    name = ranking_of(model)[1]
    weight = next(w for w in model.graph.initializer if w.name == name)
    weight.CopyFrom(numpy_helper.from_array(np.array(threshold, np.float32), name))
    return bytes(model.SerializeToString())


def run(graph: bytes, images: Any, extra: dict[str, int] | None = None) -> list[Any]:
    """Outputs, and intermediate values given by name and type."""
    model = onnx.load_from_string(graph)
    for name, elem_type in (extra or {}).items():
        model.graph.output.append(helper.make_tensor_value_info(name, elem_type, None))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # with more, maps as small as these depend on the batch
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {"images": images, "valid_hw": np.full((len(images), 2), SIDE_PX)}
    return list(session.run(["scores", "labels", "mask_probs", *(extra or {})], feeds))


@lru_cache
def ranked(network: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Category scores and levels of all slots, [B, K] each, before any threshold."""
    model = onnx.load_from_string(plain_graph(network))
    scores = ranking_of(model)[0]
    index = next(n for n in model.graph.node if n.op_type == "TopK").output[1]
    extra = {scores: int(TensorProto.FLOAT), index: int(TensorProto.INT64)}
    values, cells = run(plain_graph(network), draw_images(), extra)[3:]
    classes = len(tiny_config().classes)
    return values, (cells // classes >= FINE_CELLS).astype(np.int64)


def compare(network: str, threshold: float) -> tuple[list[Candidates], list[list[bool]]]:
    """The candidates, identical for both graphs, and per level the canvases it ran on."""
    plain = with_threshold(plain_graph(network), threshold)
    images = draw_images()
    needs = {f"exits/need{level}": int(TensorProto.BOOL) for level in range(2)}
    expected = split_batch(*run(plain, images))
    *outputs, first, second = run(add_exits(plain, STRIDE), images, needs)
    found = split_batch(*outputs)
    for one, other in zip(expected, found, strict=True):
        assert np.array_equal(one.scores, other.scores)
        assert np.array_equal(one.labels, other.labels)
        assert np.array_equal(one.mask_probs, other.mask_probs)
    above = ranked(network)[0] > threshold
    assert outputs[0].shape[1] == max(2, above.sum(1).max())
    return expected, [first.tolist(), second.tolist()]


@pytest.mark.parametrize("network", NETWORKS)
def test_no_level_runs_if_all_are_empty(network: str) -> None:
    found, ran_on = compare(network, 2.0)
    assert ran_on == [[False] * 3] * 2
    assert [len(candidates.scores) for candidates in found] == [0, 0, 0]


@pytest.mark.parametrize("network", NETWORKS)
def test_all_levels_run_if_every_slot_and_level_is_used(network: str) -> None:
    found, ran_on = compare(network, -1.0)
    assert ran_on == [[True] * 3] * 2
    assert sum(len(candidates.scores) for candidates in found) > 30


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("slots", [1, 2, 12])
def test_a_level_runs_only_on_canvases_with_a_candidate_at_it(network: str, slots: int) -> None:
    values, levels = ranked(network)
    threshold = float(np.sort(values, axis=None)[-slots - 1])
    above = values > threshold
    _, ran_on = compare(network, threshold)
    assert ran_on == [(above & (levels == level)).any(1).tolist() for level in range(2)]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_single_canvas_of_a_batch_has_candidates(network: str) -> None:
    best = np.sort(ranked(network)[0].max(1))
    assert best[1] < best[2]
    _, ran_on = compare(network, float(best[1]))
    assert np.any(ran_on, axis=0).sum() == 1


def test_nan_scores_are_rejected_as_without_exits() -> None:
    model = onnx.load_from_string(plain_graph("decoupled"))
    name = "network.head.category_out.weight"
    weight = next(w for w in model.graph.initializer if w.name == name)
    values = np.full(tuple(weight.dims), np.nan, np.float32)
    weight.CopyFrom(numpy_helper.from_array(values, name))
    graph = bytes(model.SerializeToString())
    for broken in (graph, add_exits(graph, STRIDE)):
        with pytest.raises(BackendError, match="scores are not finite"):
            split_batch(*run(broken, draw_images()))


def test_the_same_graph_gives_the_same_bytes() -> None:
    graph = plain_graph("vanilla")
    assert add_exits(graph, STRIDE) == add_exits(graph, STRIDE)


def test_a_graph_of_an_unknown_head_is_rejected() -> None:
    with pytest.raises(GraphError, match=r"is produced by .*, expected"):
        add_exits(build_other_graph(), 2)


def test_exits_are_not_added_twice() -> None:
    with pytest.raises(GraphError, match="the ranked scores are compared 0 times, not once"):
        add_exits(add_exits(plain_graph("decoupled"), STRIDE), STRIDE)
