"""A narrow EfficientNet-Lite0 exported: its padding is asymmetric, its pixels scaled otherwise."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import onnx
import pytest
import torch

from export.onnx_graph import build_onnx
from export.parity import build_cases, compare
from export.to_aoti import fold_batch_norms
from tests.support.tiny_solo import tiny_config, tiny_network
from training.configs.schema import BackboneConfig
from training.model.solo import Solo

SIZES = ((64, 96), (160, 128))


@cache
def narrow() -> Solo:
    config = tiny_config()
    backbone = BackboneConfig(kind="efficientnet_lite0", base_width=8, frozen_stages=0)
    return tiny_network(replace(config, model=replace(config.model, backbone=backbone)))


@pytest.mark.slow
def test_onnx_runtime_agrees_with_pytorch() -> None:
    network = narrow()
    graph = build_onnx(network)
    report = compare(network, graph, build_cases(SIZES, (1, 2), seed=1))
    assert report["passed"], report
    assert report["total"]["candidates_torch"] > 50
    assert report["total"]["max_mask_difference"] < 1e-4
    operators = [node.op_type for node in onnx.load_from_string(graph).graph.node]
    assert operators.count("Clip") >= 32 and "BatchNormalization" not in operators


def test_every_batch_norm_can_be_folded() -> None:
    network = narrow()
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = [feature.clone() for feature in network.backbone(x)]
        folded = Solo(network.config, network.num_classes).eval()
        folded.load_state_dict(network.state_dict())
        fold_batch_norms(folded.backbone)
        found = folded.backbone(x)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.backbone.modules())
    for feature, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(feature, wanted, rtol=1e-4, atol=1e-4)
