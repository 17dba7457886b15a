from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.published import small_config
from training.configs import get_config
from training.configs.schema import HeadKind, NetworkConfig
from training.model.solo import Solo
from training.weights.convert import Shapes, count_classes, infer_config
from training.weights.formats import CheckpointError


def shapes(model: NetworkConfig, num_classes: int = 80) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in Solo(model, num_classes).state_dict().items()}


def head(config: str, **changes: Any) -> NetworkConfig:
    model = get_config(config).model
    return replace(model, head=replace(model.head, **changes))


def backbone(config: str, **changes: Any) -> NetworkConfig:
    model = get_config(config).model
    return replace(model, backbone=replace(model.backbone, **changes))


@pytest.mark.parametrize("num_classes", [1, 3, 80])
def test_the_number_of_classes_changes_nothing_else(num_classes: int) -> None:
    found = shapes(get_config("solo_r50").model, num_classes)
    assert count_classes(found) == num_classes
    assert infer_config(found) == (get_config("solo_r50"), [])


@pytest.mark.parametrize(
    ("model", "name", "changes"),
    [
        (
            head("decoupled_solo_light_r50", num_grids=(80, 64, 32, 16, 8)),
            "decoupled_solo_light_r50_custom",
            ["head.num_grids is (80, 64, 32, 16, 8), not (40, 36, 24, 16, 12)"],
        ),
        (
            head("solo_r50", num_grids=(30, 20, 10, 5, 2)),
            "solo_r50_custom",
            ["head.num_grids is (30, 20, 10, 5, 2), not (40, 36, 24, 16, 12)"],
        ),
        (
            head("solo_r101", num_coord_convs=2, num_convs=5),
            "solo_r101_custom",
            ["head.num_convs is 5, not 7", "head.num_coord_convs is 2, not 1"],
        ),
        (
            head("solo_r50", category_kernel=1),
            "solo_r50_custom",
            ["head.category_kernel is 1, not 3"],
        ),
        (
            head("decoupled_solo_r50", num_coord_convs=0, mask_kernel=1),
            "decoupled_solo_r50_custom",
            ["head.num_coord_convs is 0, not 1", "head.mask_kernel is 1, not 3"],
        ),
        (
            backbone("solo_r101", deformable_stages=(3, 4)),
            "solo_r101_custom",
            ["backbone.deformable_stages is (3, 4), not ()"],
        ),
        (
            backbone("solo_r50", depth=34),
            "solo_r50_custom",
            ["backbone.depth is 34, not 50"],
        ),
    ],
)
def test_a_changed_network_is_told_from_its_shapes(
    model: NetworkConfig, name: str, changes: list[str]
) -> None:
    config, found = infer_config(shapes(model))
    assert (config.name, config.model) == (name, model)
    assert found == changes
    assert config.description.endswith("network inferred from its weights")


@pytest.mark.parametrize("name", ["decoupled_solo_light_r50", "decoupled_solo_light_dcn_r50"])
def test_deformable_convolutions_are_inferred(name: str) -> None:
    assert infer_config(shapes(get_config(name).model)) == (get_config(name), [])


@pytest.mark.parametrize("kind", ["vanilla", "decoupled", "decoupled_light"])
def test_a_narrow_network(kind: HeadKind) -> None:
    wanted = shapes(small_config(kind).model)
    assert shapes(infer_config(wanted)[0].model) == wanted


def without(found: Shapes, part: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in found.items() if part not in name}


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("backbone.conv1", "no backbone.conv1.weight"),
        ("backbone.layer3.4", r"\(3, 4, 5, 3\) bottleneck blocks .* ResNet-18, 34, 50, 101"),
        ("neck.output_convs.0", "no neck.output_convs.0.weight"),
        ("head.mask_convs_x.0.conv", "no head.mask_convs.0.conv.weight"),
        ("head.mask_out_x.4", "level_strides has 5 entries, num_grids has 4; name it with"),
        ("head.mask_out_x", "no head.mask_out_x.0.weight"),
    ],
)
def test_what_is_no_solo_network_is_refused(missing: str, message: str) -> None:
    found = without(shapes(get_config("decoupled_solo_r50").model), missing)
    with pytest.raises(CheckpointError, match=message):
        infer_config(found)


def test_no_category_output() -> None:
    with pytest.raises(CheckpointError, match=r"no head\.category_out\.weight"):
        count_classes({"head.mask_out.0.weight": (1,)})
