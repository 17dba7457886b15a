"""Compiled packages against PyTorch; what compiles takes minutes and is marked slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import to_aoti
from export.errors import GraphError, ParityError
from export.onnx_graph import CandidateGraph
from export.parity import Case, build_cases
from export.to_aoti import (
    AotiOptions,
    TypedGraph,
    compare_aoti,
    compiler_options,
    describe_package,
    export_program,
    find_canvases,
    fold_batch_norms,
    package_cases,
)
from pipeline.model_config import InputSpec, KeepRatioResize, TileResize
from service.engines.aoti_package import METADATA_KEY, PackagePrecision, describe_cpu
from tests.support.tiny_solo import tiny_config, tiny_network
from training.configs.schema import BackboneConfig, HeadKind
from training.model.solo import Solo

TILES = InputSpec(resize=TileResize(scale=1.0, tile_hw=(64, 96), overlap_px=16))
ANY_CANVAS = InputSpec(resize=KeepRatioResize(short_side=96, long_side=160))
CASES = tuple(build_cases([(64, 96)], batches=(2,)))


def run_graph(graph: CandidateGraph) -> Any:
    """The graph in place of the code that is compiled from it."""

    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return graph(*inputs)  # type: ignore[no-any-return]

    return run


@pytest.mark.parametrize("kind", ["vanilla", "decoupled", "decoupled_light"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_typed_graph_finds_what_the_network_finds(
    kind: HeadKind, precision: PackagePrecision
) -> None:
    network = tiny_network(tiny_config(kind))
    graph = TypedGraph(network, precision)
    scores, labels, masks = run_graph(graph)([torch.from_numpy(a) for a in inputs_of(CASES[1])])
    assert (scores.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert masks.dtype == to_aoti.DTYPES[precision]
    options = AotiOptions(precision=precision)
    # Random networks have more near-ties than trained ones: only the pairs are judged here.
    report = compare_aoti(network, run_graph(graph), CASES, options)
    assert report["total"]["candidates_torch"] > 20
    assert report["unmatched_share"] <= (0.0 if precision == "fp32" else 0.35)


def inputs_of(case: Case) -> tuple[Any, Any]:
    return case.images, case.valid_hw


def test_the_network_stays_as_it_is() -> None:
    network = tiny_network(tiny_config())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    TypedGraph(network, "bf16")
    after = network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_an_area_beyond_half_precision_is_counted() -> None:
    """A mask that fills a canvas of 1056x1056 px has 69,696 px at stride 4; fp16 ends at 65,504."""
    network = tiny_network(tiny_config())
    probs = torch.full((1, 1, 264, 264), 0.75, dtype=torch.float16)
    maskness = network._maskness(probs, torch.zeros(1, 1, dtype=torch.int64))
    assert maskness.dtype == torch.float32
    assert maskness.item() == pytest.approx(0.75)


def test_every_batch_norm_is_folded() -> None:
    config = tiny_config()
    backbone = BackboneConfig(depth=50, base_width=8, norm="frozen_bn")
    config = replace(config, model=replace(config.model, backbone=backbone))
    network = tiny_network(config).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = network.backbone(x)
    fold_batch_norms(network.backbone)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    for ours, theirs in zip(network.backbone(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_canvases() -> None:
    tiles = InputSpec(resize=TileResize(scale=2.0, tile_hw=(144, 144), overlap_px=32))
    assert find_canvases(tiles) == ((288, 288), True)
    assert find_canvases(ANY_CANVAS) == ((160, 160), False)
    coco = InputSpec(resize=KeepRatioResize(short_side=800, long_side=1333))
    assert find_canvases(coco) == ((1344, 1344), False)


def test_a_package_describes_itself() -> None:
    config = replace(tiny_config(), input=ANY_CANVAS)
    info = describe_package(config, AotiOptions(max_batch=4), "a" * 64)
    assert (info.config, info.target, info.precision) == ("tiny", "cpu", "fp32")
    assert (info.max_canvas_hw, info.fixed_canvas, info.max_batch) == ((160, 160), False, 4)
    assert info.onnx_sha256 == "a" * 64
    assert METADATA_KEY in compiler_options(info, tune=False)["aot_inductor.metadata"]
    assert not compiler_options(info, tune=False)["freezing"]
    tiles = describe_package(replace(config, input=TILES), AotiOptions())
    assert (tiles.max_canvas_hw, tiles.fixed_canvas) == ((64, 96), True)
    assert compiler_options(tiles, tune=True)["max_autotune"]
    assert compiler_options(tiles, tune=True)["freezing"]


def test_options_that_this_torch_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 has no cpp.march: the compiler takes this CPU's, and the package says so."""
    known = to_aoti.known_options()
    old = known - {to_aoti.MARCH}
    monkeypatch.setattr(to_aoti, "known_options", lambda: old)
    info = describe_package(tiny_config(), AotiOptions())
    assert info.host_cpu == describe_cpu()
    options = compiler_options(replace(info, machine="x86_64"), tune=True)
    assert options.keys() <= old
    assert {"cpp.simdlen", "freezing", "max_autotune"} <= options.keys()
    monkeypatch.undo()
    info = describe_package(tiny_config(), AotiOptions())
    assert (info.host_cpu is None) == (to_aoti.MARCH in known)
    options = compiler_options(replace(info, machine="x86_64"), tune=False)
    assert (to_aoti.MARCH in options) == (to_aoti.MARCH in known)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (AotiOptions(max_batch=0), "max_batch is 0"),
        (AotiOptions(max_batch=-3), "max_batch is -3"),
    ],
)
def test_wrong_options_are_named(options: AotiOptions, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        describe_package(tiny_config(), options)


def test_cuda_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GraphError, match="no CUDA device"):
        describe_package(tiny_config(), AotiOptions(device="cuda"))


def test_a_network_in_training_is_refused() -> None:
    network = tiny_network(tiny_config()).train()
    with pytest.raises(GraphError, match="training mode"):
        to_aoti.build_aoti(network, tiny_config(), AotiOptions())


def test_deformable_convolutions_are_refused() -> None:
    config = tiny_config()
    config = replace(
        config, model=replace(config.model, head=replace(config.model.head, deformable=True))
    )
    graph = CandidateGraph(Solo(config.model, config.num_classes).eval())
    info = describe_package(config, AotiOptions())
    with pytest.raises(GraphError, match="deformable"):
        export_program(graph, info)


def test_cases_are_of_the_sizes_that_a_package_takes() -> None:
    config = replace(tiny_config(), input=ANY_CANVAS)
    shapes = {case.images.shape[:3] for case in package_cases(config, AotiOptions(max_batch=2))}
    assert shapes == {(1, 96, 128), (2, 96, 128), (1, 64, 64), (2, 64, 64)}
    fixed = package_cases(replace(config, input=TILES), AotiOptions(max_batch=1))
    assert {case.images.shape[:3] for case in fixed} == {(1, 64, 96)}


def test_a_package_that_finds_something_else_fails() -> None:
    network = tiny_network(tiny_config())
    other = TypedGraph(tiny_network(tiny_config(), seed=1), "fp32")
    report = compare_aoti(network, run_graph(other), CASES, AotiOptions())
    assert not report["passed"]
    assert {"total", "tolerances", "runtimes", "cases"} <= report.keys()


def test_a_package_that_refuses_a_batch_is_an_error() -> None:
    def refuse(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        raise RuntimeError("wrong size")

    with pytest.raises(ParityError, match="wrong size"):
        compare_aoti(tiny_network(tiny_config()), refuse, CASES, AotiOptions())


def test_nothing_found_is_no_success() -> None:
    network = tiny_network(tiny_config())
    empty = replace(CASES[0], images=np.zeros_like(CASES[0].images))
    network.config = replace(network.config, candidate_threshold=0.999999)
    report = compare_aoti(network, run_graph(TypedGraph(network, "fp32")), [empty], AotiOptions())
    assert report["total"]["candidates_torch"] == 0 and not report["passed"]
