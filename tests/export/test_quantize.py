from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

from export.errors import ExportError
from export.parity import Case
from export.quantize import quantize, require_disjoint, sample_calibration
from tests.support.tiny import TINY, build_tiny_data
from tests.support.typed_graph import build_graph, feeds_of
from training.data.coco import CocoDataset


def calibration() -> list[Case]:
    feeds = feeds_of((32, 64))
    return [Case("noise", feeds["images"], feeds["valid_hw"])]


@pytest.fixture(scope="module")
def quantized() -> bytes:
    return quantize(build_graph(channels=8), calibration())


def test_convolutions_are_int8_except_for_the_category_logits(quantized: bytes) -> None:
    model = onnx.load_from_string(quantized)
    types = {t.name: t.data_type for t in model.graph.initializer}
    assert types["stem_weight_quantized"] == types["mask_weight_quantized"] == TensorProto.INT8
    assert types["category_weight"] == TensorProto.FLOAT
    assert "category_weight_quantized" not in types
    signature = {o.name: o.type.tensor_type.elem_type for o in model.graph.output}
    assert signature == {
        "scores": TensorProto.FLOAT,
        "labels": TensorProto.INT64,
        "mask_probs": TensorProto.FLOAT,
    }


def test_weights_have_seven_bits_and_per_channel_scales(quantized: bytes) -> None:
    weights = {
        t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(quantized).graph.initializer
    }
    assert np.abs(weights["stem_weight_quantized"].astype(int)).max() <= 64
    assert weights["stem_weight_scale"].shape == (8,)


def test_it_runs_at_other_sizes_and_stays_near_float32(quantized: bytes) -> None:
    feeds = feeds_of((64, 32), batch=3)
    one, other = (
        ort.InferenceSession(g, providers=["CPUExecutionProvider"]).run(None, feeds)
        for g in (build_graph(channels=8), quantized)
    )
    assert [o.shape for o in one] == [o.shape for o in other]
    assert np.abs(one[0] - other[0]).mean() < 0.02


def test_the_same_canvases_give_the_same_bytes(quantized: bytes) -> None:
    assert quantize(build_graph(channels=8), calibration()) == quantized


def test_no_calibration_canvases_is_an_error() -> None:
    with pytest.raises(ExportError, match="requires calibration images"):
        quantize(build_graph(), [])


def test_canvases_of_an_invalid_shape_are_an_error() -> None:
    bad = [Case("noise", np.zeros((1, 8, 8, 4), np.uint8), np.array([[8, 8]]))]
    with pytest.raises(ExportError, match="the quantisation failed"):
        quantize(build_graph(), bad)


def test_calibration_uses_one_canvas_per_image_and_at_most_all_images(
    tmp_path: Path,
) -> None:
    data = CocoDataset(build_tiny_data(tmp_path), "train")
    assert len(sample_calibration(data, TINY.input, 2)) == 2
    cases = sample_calibration(data, TINY.input, 99)
    assert [case.images.shape for case in cases] == [(1, 64, 64, 3)] * 3
    again = sample_calibration(data, TINY.input, 99)
    assert all((a.images == b.images).all() for a, b in zip(cases, again, strict=True))


def test_calibration_and_evaluation_images_must_be_disjoint(tmp_path: Path) -> None:
    root = build_tiny_data(tmp_path)
    train, val = CocoDataset(root, "train"), CocoDataset(root, "val")
    require_disjoint(train, val)
    with pytest.raises(ExportError, match=r"3 images of val\.json are also in val\.json, .* val1"):
        require_disjoint(val, val)
