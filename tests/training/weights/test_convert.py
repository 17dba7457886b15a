from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.parity import ParityModel, load_parity_model
from tests.support.parity_files import LOCAL
from training.weights.convert import convert_key, convert_state_dict
from training.weights.formats import CheckpointError

WHICH = ParityModel(LOCAL, "b", "light")


def published() -> dict[str, Tensor]:
    content = torch.load(WHICH.folder / "model.pth", weights_only=True)
    state: dict[str, Tensor] = content["state_dict"]
    return state


def expected() -> dict[str, Tensor]:
    return load_parity_model(WHICH).state_dict()


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("backbone.layer1.0.bn2.running_mean", "backbone.layer1.0.bn2.running_mean"),
        ("neck.lateral_convs.3.conv.bias", "neck.lateral_convs.3.bias"),
        ("neck.fpn_convs.0.conv.weight", "neck.output_convs.0.weight"),
        ("mask_head.cls_convs.6.gn.bias", "head.category_convs.6.gn.bias"),
        ("bbox_head.cate_convs.6.gn.bias", "head.category_convs.6.gn.bias"),
        ("mask_head.mask_convs.0.conv.weight", "head.mask_convs.0.conv.weight"),
        ("bbox_head.ins_convs_y.0.conv.weight", "head.mask_convs_y.0.conv.weight"),
        ("mask_head.conv_cls.bias", "head.category_out.bias"),
        ("bbox_head.solo_cate.bias", "head.category_out.bias"),
        ("bbox_head.dsolo_cate.weight", "head.category_out.weight"),
        ("mask_head.conv_mask_list.4.weight", "head.mask_out.4.weight"),
        ("mask_head.conv_mask_list_x.4.weight", "head.mask_out_x.4.weight"),
        ("bbox_head.solo_ins_list.0.bias", "head.mask_out.0.bias"),
        ("bbox_head.dsolo_ins_list_y.0.bias", "head.mask_out_y.0.bias"),
    ],
)
def test_names(key: str, ours: str) -> None:
    assert convert_key(key) == ours


@pytest.mark.parametrize(
    "key", ["fc.weight", "bbox_head.fcos_cls.weight", "neck.extra.0.weight", "mask_head.cls_convs"]
)
def test_a_foreign_name_is_refused(key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        convert_key(key)


def test_the_tensors_arrive_unchanged() -> None:
    state = published()
    ours = convert_state_dict(state, expected(), "light")
    assert len(ours) == len(state)
    for key, value in state.items():
        assert torch.equal(ours[convert_key(key)], value), key


def test_a_missing_key_is_named() -> None:
    state = published()
    del state["mask_head.conv_cls.bias"]
    with pytest.raises(CheckpointError, match=r"light.*missing keys: head\.category_out\.bias"):
        convert_state_dict(state, expected(), "light")


def test_a_key_too_many_is_named() -> None:
    state = published() | {"mask_head.cls_convs.2.conv.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"unexpected keys: mask_head\.cls_convs\.2"):
        convert_state_dict(state, expected(), "light")


def test_an_unknown_key_is_named() -> None:
    state = published() | {"fc.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"no published SOLO model has: fc\.weight"):
        convert_state_dict(state, expected(), "light")


def test_two_names_of_one_weight_are_refused() -> None:
    state = published() | {"bbox_head.dsolo_cate.bias": torch.zeros(80)}
    with pytest.raises(CheckpointError, match=r"dsolo_cate\.bias and mask_head\.conv_cls\.bias"):
        convert_state_dict(state, expected(), "light")


def test_another_shape_is_named() -> None:
    state = published() | {"mask_head.conv_cls.bias": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"conv_cls\.bias \(3,\), expected \(80,\)"):
        convert_state_dict(state, expected(), "light")


def test_many_keys_are_counted_not_listed() -> None:
    state = {k: v for k, v in published().items() if not k.startswith("backbone.")}
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        convert_state_dict(state, expected(), "light")


@pytest.mark.parametrize(
    "key",
    [
        "bbox_head.kernel_convs.0.conv.weight",
        "bbox_head.solo_kernel.weight",
        "mask_feat_head.conv_pred.0.conv.weight",
        "mask_head.conv_kernel.bias",
        "mask_head.mask_feature_head.conv_pred.conv.weight",
    ],
)
def test_solo_v2_is_refused_by_its_name(key: str) -> None:
    state = {**published(), key: torch.zeros(1)}
    with pytest.raises(CheckpointError, match="SOLOv2") as caught:
        convert_state_dict(state, expected(), "a.pth")
    assert key in str(caught.value) and "a.pth" in str(caught.value)
