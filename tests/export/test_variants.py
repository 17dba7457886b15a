from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from export import variants
from export.config_json import describe_file
from export.errors import ExportError, ParityError
from export.measure import measure_ap
from export.precision import LowPrecision, lower_precision
from export.quantize import quantize
from export.variants import VariantInputs, build_variants
from tests.support.tiny import build_tiny_data
from tests.support.typed_graph import build_config, build_graph
from training.data.coco import CocoDataset


def build_inputs(root: Path | None = None, calibration: str = "train") -> VariantInputs:
    graph = build_graph()
    return VariantInputs(
        model=build_config(graph),
        graph=graph,
        evaluation=CocoDataset(root, "val") if root else None,
        calibration=CocoDataset(root, calibration) if root else None,
        calibration_images=3,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_data(tmp_path_factory.mktemp("data"))


def with_scaled(graph: bytes, weight: str, factor: float) -> bytes:
    """A graph with one weight scaled."""
    model = onnx.load_from_string(graph)
    tensor = next(t for t in model.graph.initializer if t.name == weight)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((values * factor).astype(values.dtype), weight))
    return bytes(model.SerializeToString())


def test_typed_variants_pass_and_their_reports_name_the_emulation() -> None:
    built = build_variants(
        ["fp16", "bf16"], build_inputs(), provenance={"commit": "abc"}, accept_unrun=True
    )
    assert [(a.name, a.parity_name) for a in built] == [
        ("model.fp16.onnx", "parity.fp16.json"),
        ("model.bf16.onnx", "parity.bf16.json"),
    ]
    for artefact in built:
        report = artefact.parity
        assert report["passed"] is True and report["failures"] == []
        assert report["graph"] == describe_file(artefact.data)
        assert report["reference"] == describe_file(build_graph())
        assert report["checked"].startswith("emulated") and report["commit"] == "abc"
        assert report["comparison"]["canvases"] == 16 and report["AP"] is None
    assert built[0].parity["file_run"] is True
    assert built[1].parity["file_run"].startswith("not run: ")


def test_a_variant_that_cannot_run_here_needs_accept_unrun() -> None:
    with pytest.raises(ParityError, match=r"bf16 cannot be run on this .*--accept-unrun"):
        build_variants(["bf16"], build_inputs())


def test_int8_is_calibrated_run_and_measured_against_one_ap_of_float32(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[bytes] = []

    def counting(model: Any, graph: bytes, data: Any) -> dict[str, float]:
        measured.append(graph)
        return measure_ap(model, graph, data)

    monkeypatch.setattr(variants, "measure_ap", counting)
    built = build_variants(["int8", "fp16", "int8"], build_inputs(root))
    assert [artefact.name for artefact in built] == ["model.int8.onnx", "model.fp16.onnx"]
    assert len(measured) == 3 and measured[0] == build_graph() and measured[1] == built[0].data
    report = built[0].parity
    assert report["file_run"] is True
    assert report["calibration"] == {"split": "train", "canvases": 3, "method": "minmax"}
    assert report["AP"]["split"] == "val" and report["AP"]["images"] == 3
    assert report["comparison"]["content"] == ["data"]


@pytest.mark.parametrize("weight", ["mask_weight_low", "gamma_low"])
def test_a_typed_graph_with_a_wrong_weight_is_rejected(
    weight: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: bytes, precision: LowPrecision) -> bytes:
        return with_scaled(lower_precision(graph, precision), weight, -1.5)

    monkeypatch.setattr(variants, "lower_precision", broken)
    with pytest.raises(ParityError, match=r"fp16 deviates too much from fp32: .*must be"):
        build_variants(["fp16"], build_inputs())


def test_an_int8_graph_with_a_wrong_scale_is_rejected(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: bytes, cases: Any) -> bytes:
        return with_scaled(quantize(graph, cases), "features_scale", 0.2)

    monkeypatch.setattr(variants, "quantize", broken)
    with pytest.raises(ParityError, match=r"int8 deviates too much from fp32: .*must be"):
        build_variants(["int8"], build_inputs(root))


def test_a_loss_of_ap_is_rejected_though_the_candidates_agree(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losing(model: Any, graph: bytes, data: Any) -> dict[str, float]:
        return {"AP": 0.485 if graph == build_graph() else 0.4825}

    monkeypatch.setattr(variants, "measure_ap", losing)
    with pytest.raises(
        ParityError, match=r"fp16 deviates too much .*: AP loss 0\.0025, must be <= 0\.002"
    ):
        build_variants(["fp16"], build_inputs(root))


def test_int8_requires_calibration_images_that_are_not_evaluated(root: Path) -> None:
    with pytest.raises(ExportError, match="int8 requires --data"):
        build_variants(["int8"], build_inputs())
    with pytest.raises(ExportError, match="must not be calibrated on evaluation images"):
        build_variants(["int8"], build_inputs(root, calibration="val"))
