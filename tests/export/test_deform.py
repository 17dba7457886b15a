"""Exported deformable convolutions, run by ONNX Runtime and by ONNX's reference evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from export.__main__ import main
from export.errors import GraphError
from export.onnx_graph import TRANSLATIONS, build_onnx, choose_opset
from export.parity import build_cases, compare, run_torch
from service.engines.base import BackendOptions
from service.models.repository import load_version
from tests.support.tiny_solo import save_tiny_checkpoint, tiny_config, tiny_network
from training.configs.schema import Config, HeadKind
from training.model.deform import DeformConv2d
from training.model.solo import Solo

SIZES = ((64, 96), (160, 128))


def deformable_config(kind: HeadKind, stages: tuple[int, ...] = ()) -> Config:
    """A deformable head; with `stages` a narrow ResNet-50 with those stages deformable."""
    config = tiny_config(kind, name="tiny-dcn")
    backbone = config.model.backbone
    if stages:
        backbone = replace(backbone, depth=50, base_width=4, deformable_stages=stages)
    head = replace(config.model.head, deformable=True)
    return replace(config, model=replace(config.model, backbone=backbone, head=head))


@cache
def exported(kind: HeadKind) -> tuple[Solo, bytes]:
    network = tiny_network(deformable_config(kind))
    return network, build_onnx(network)


def operators(graph: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(graph).graph.node]


def test_the_offsets_of_these_networks_are_not_zero() -> None:
    network, _ = exported("decoupled_light")
    convs = [module for module in network.modules() if isinstance(module, DeformConv2d)]
    assert len(convs) == 2, "the last convolution of the category and of the mask tower"
    offsets: list[Tensor] = []
    handles = [
        conv.conv_offset.register_forward_hook(lambda _m, _i, out: offsets.append(out))
        for conv in convs
    ]
    run_torch(network, next(build_cases(SIZES, (1,))))
    for handle in handles:
        handle.remove()
    assert len(offsets) == 4, "two convolutions at two levels"
    assert all(0.2 < found.std() < 5 for found in offsets), [found.std() for found in offsets]


@pytest.mark.parametrize(
    "kind", ["decoupled_light", pytest.param("vanilla", marks=pytest.mark.slow)]
)
def test_onnx_runtime_agrees_with_pytorch_on_the_network(kind: HeadKind) -> None:
    network, graph = exported(kind)
    assert operators(graph).count("DeformConv") == 2 * len(network.config.head.num_grids)
    report = compare(network, graph, build_cases(SIZES, (1, 2), seed=1))
    assert report["passed"], report
    assert report["total"]["candidates_torch"] > 200
    assert report["total"]["max_mask_difference"] < 1e-4


class TwoConvolutions(nn.Module):
    """Two consecutive deformable convolutions, with stride 2 and with dilation 2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = DeformConv2d(3, 5, 3, stride=2, padding=1, bias=False)
        self.second = DeformConv2d(5, 4, 3, padding=2, dilation=2)
        for conv in (self.first, self.second):
            nn.init.normal_(conv.conv_offset.weight, std=0.3)
            nn.init.normal_(conv.conv_offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 4, H / 2, W / 2]."""
        out: Tensor = self.second(self.first(x))
        return out


@cache
def exported_convolutions() -> tuple[TwoConvolutions, bytes]:
    network = TwoConvolutions().eval()
    dims = {0: torch.export.Dim("b"), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w")}
    program = torch.onnx.export(
        network,
        (torch.zeros(2, 3, 6, 8),),
        dynamo=True,
        verbose=False,
        opset_version=19,
        input_names=["x"],
        dynamic_shapes=(dims,),
        custom_translation_table=TRANSLATIONS,
    )
    assert program is not None
    return network, program.model_proto.SerializeToString()


def run_onnx_runtime(graph: bytes, feed: Mapping[str, Any]) -> Any:
    return ort.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(None, feed)[0]


def run_reference(graph: bytes, feed: Mapping[str, Any]) -> Any:
    outputs = ReferenceEvaluator(onnx.load_from_string(graph)).run(None, dict(feed))
    return cast(list[Any], outputs)[0]


@pytest.mark.parametrize("run", [run_reference, run_onnx_runtime])
@pytest.mark.parametrize("shape", [(1, 3, 7, 10), (2, 3, 6, 4)])
def test_exported_convolutions_equal_pytorch(run: Any, shape: tuple[int, ...]) -> None:
    network, graph = exported_convolutions()
    assert operators(graph).count("DeformConv") == 2
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = network(x)
    found = run(graph, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)


def test_the_opset_is_the_lowest_with_all_operators() -> None:
    deformable, _ = exported("decoupled_light")
    plain = tiny_network(tiny_config())
    assert (choose_opset(plain), choose_opset(plain, 20)) == (18, 20)
    assert (choose_opset(deformable), choose_opset(deformable, 20)) == (19, 20)


def test_an_opset_without_deformable_convolution_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "opset is 18, but the network has deformable convolutions and DeformConv"
    with pytest.raises(GraphError, match=message):
        build_onnx(exported("decoupled_light")[0], opset=18)
    checkpoint, repo = tmp_path / "best.pt", tmp_path / "repo"
    save_tiny_checkpoint(checkpoint, deformable_config("decoupled_light"))
    assert main([str(checkpoint), "--out", str(repo), "--opset", "18"]) == 1
    assert message in capsys.readouterr().err
    assert not repo.exists()


@pytest.mark.slow
def test_a_deformable_backbone_is_exported_published_and_served(tmp_path: Path) -> None:
    """The published Light-DCN network, narrower: checkpoint, parity, model_repo, engine."""
    checkpoint, repo = tmp_path / "best.pt", tmp_path / "repo"
    network = save_tiny_checkpoint(checkpoint, deformable_config("decoupled_light", (2, 3, 4)))
    assert main([str(checkpoint), "--out", str(repo)]) == 0
    graph = (repo / "tiny-dcn" / "1" / "model.onnx").read_bytes()
    assert operators(graph).count("DeformConv") == 13 + 2 * 2
    loaded = load_version(repo / "tiny-dcn", None, BackendOptions(device="cpu", threads=1))
    assert loaded.config.provenance["exporter"]["opset"] == 19
    case = next(iter(build_cases([(64, 64)], (1,))))
    with torch.inference_mode():
        expected = network.candidates(
            torch.from_numpy(case.images), torch.from_numpy(case.valid_hw)
        )
    assert int((expected[0] > 0).sum()) > 5
    image = np.ascontiguousarray(case.images[0])
    assert len(loaded.segment(image)) > 0
    loaded.backend.close()
