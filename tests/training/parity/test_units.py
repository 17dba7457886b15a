"""Single operations against the published implementation's numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.parity import read_npz, shared_file
from tests.support.parity_files import LOCAL, ROOT
from training.coco_metrics import mask_ap
from training.configs import get_config
from training.losses import dice_loss, focal_loss
from training.model.fpn import FPN
from training.model.head import SoloHead, coordinate_channels
from training.model.solo import Solo, points_nms
from training.targets import centre_of_mass, grid_cell, resize_mask
from training.weights.convert import convert_key, convert_state_dict
from training.weights.formats import CheckpointError

UNITS = LOCAL / "units"
FULL_SIZE = {
    "solo_r50_fpn_1x_coco": "solo_r50",
    "solo_r50_fpn_3x_coco": "solo_r50",
    "solo_r101_fpn_3x_coco": "solo_r101",
    "decoupled-solo_r50_fpn_1x_coco": "decoupled_solo_r50",
    "decoupled-solo_r50_fpn_3x_coco": "decoupled_solo_r50",
    "decoupled-solo_r101_fpn_3x_coco": "decoupled_solo_r101",
    "decoupled-solo-light_r50_fpn_3x_coco": "decoupled_solo_light_r50",
    "decoupled-solo-light-dcn_r50_fpn_3x_coco": "decoupled_solo_light_dcn_r50",
}
DEFORMABLE = "decoupled-solo-light-dcn_r50_fpn_3x_coco"


def test_grid_cell_of_thousands_of_centres() -> None:
    stored = read_npz(UNITS / "grid_cell.npz")
    found = [
        grid_cell(float(centre), int(size), int(grid))
        for centre, size, grid in zip(stored["center"], stored["size"], stored["grid"], strict=True)
    ]
    np.testing.assert_array_equal(found, stored["cell"])


def test_centre_of_mass() -> None:
    stored = read_npz(UNITS / "center_and_coord.npz")
    for name in ("mask0", "mask1"):
        found = np.array(centre_of_mass(stored[name]), np.float32)
        np.testing.assert_array_equal(found, stored[f"{name}_center_yx"])


@pytest.mark.parametrize("name", ["coord_1x_5_7", "coord_1x_1_4"])
def test_coordinate_channels(name: str) -> None:
    expected = read_npz(UNITS / "center_and_coord.npz")[name]
    x, y = coordinate_channels(torch.zeros(expected.shape[0], 3, *expected.shape[2:]))
    found = torch.cat([x, y], dim=1).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7)


def test_points_nms() -> None:
    stored = read_npz(LOCAL.parent / "points_nms.npz")
    found = points_nms(torch.from_numpy(stored["x"])).numpy()
    np.testing.assert_array_equal(found, stored["y"])


def test_dice_of_each_mask() -> None:
    stored = read_npz(UNITS / "losses.npz")
    probs = torch.from_numpy(stored["dice_pred"]).sigmoid()
    found = 3 * dice_loss(probs, torch.from_numpy(stored["dice_target"]))
    np.testing.assert_allclose(found.numpy(), stored["dice_each"], rtol=1e-6)


def test_focal_loss() -> None:
    stored = read_npz(UNITS / "losses.npz")
    logits, labels = (
        torch.from_numpy(stored["focal_pred"]),
        torch.from_numpy(stored["focal_target"]),
    )
    total = focal_loss(logits, labels)
    assert (total / 8).item() == pytest.approx(float(stored["focal_avg_factor_8"]), rel=1e-6)
    rows = [focal_loss(logits[i : i + 1], labels[i : i + 1]).item() for i in range(len(logits))]
    np.testing.assert_allclose(rows, stored["focal_each"].sum(axis=1), rtol=1e-5)


def test_mask_resize() -> None:
    stored = read_npz(UNITS / "mask_imrescale.npz")
    results = {key: expected for key, expected in stored.items() if "_div" in key}
    assert results
    for key, expected in results.items():
        name, stride = key.split("_div")
        np.testing.assert_array_equal(resize_mask(stored[name], int(stride)), expected)


def test_mask_resize_of_every_centre_pattern() -> None:
    stored = read_npz(UNITS / "mask_imrescale_patterns.npz")
    assert len(stored["patterns"])
    for pattern, expected in zip(stored["patterns"], stored["result"], strict=True):
        np.testing.assert_array_equal(resize_mask(pattern, 4), expected)


INIT = json.loads((UNITS / "init_stats.json").read_text())


@pytest.mark.parametrize("published", sorted(INIT))
def test_initial_weights_are_drawn_alike(published: str) -> None:
    config = get_config(FULL_SIZE[published]).model
    torch.manual_seed(0)
    state = {
        f"neck.{k}": v
        for k, v in FPN((256, 512, 1024, 2048), config.neck_channels).state_dict().items()
    } | {
        f"head.{k}": v
        for k, v in SoloHead(config.head, config.neck_channels, 80).state_dict().items()
    }
    compared = set()
    for key, expected in INIT[published].items():
        room = "neck" if key.startswith(("fpn_convs", "lateral_convs")) else "mask_head"
        name = convert_key(f"{room}.{key}")
        compared.add(name)
        weight = state[name]
        chance = 6 * expected["std"] / weight.numel() ** 0.5 + 2e-5  # two independent draws
        assert weight.mean().item() == pytest.approx(expected["mean"], abs=chance), key
        assert weight.std(correction=0).item() == pytest.approx(expected["std"], abs=chance), key
        if expected["std"] == 0:
            assert weight.abs().max().item() == pytest.approx(expected["absmax"], abs=1e-5), key
    assert compared == set(state)


def full_size_keys(published: str) -> dict[str, dict[str, object]]:
    content = json.loads(shared_file("state_keys.json").read_text())
    entry = content[published]
    keys: dict[str, dict[str, object]] = content[entry.get("same_as", published)]["keys"]
    return keys


@pytest.mark.parametrize("names", ["authors", "mmdetection"])
@pytest.mark.parametrize("published", sorted(FULL_SIZE))
def test_full_size_models_leave_no_key_over(published: str, names: str) -> None:
    keys = full_size_keys(published)
    config = get_config(FULL_SIZE[published])
    with torch.device("meta"):
        expected = Solo(config.model, 80).state_dict()
        state = {
            str(entry["authors"] if names == "authors" else key): torch.empty(entry["shape"])  # type: ignore[call-overload]
            for key, entry in keys.items()
        }
    assert len(state) == len(keys)
    found = convert_state_dict(state, expected, published)
    assert found.keys() == expected.keys()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}


def test_every_full_size_model_is_compared() -> None:
    assert set(FULL_SIZE) == set(json.loads(shared_file("state_keys.json").read_text()))


@pytest.mark.parametrize(
    ("stages", "in_head", "message"),
    [
        ((), True, r"unexpected keys \(of deformable.*: backbone\.layer2\.0\.conv2\.conv_offset"),
        ((3, 4), True, r"unexpected keys \(of deformable.*: backbone\.layer2\.0\.conv2\.conv_off"),
        ((2, 3, 4), False, r"unexpected keys \(of deformable.*: mask_head\.cls_convs\.3\.conv\."),
        ((1, 2, 3, 4), True, r"missing keys \(of deformable.*: backbone\.layer1\.0\.conv2\.conv_"),
    ],
)
def test_deformable_convolutions_elsewhere_are_named(
    stages: tuple[int, ...], in_head: bool, message: str
) -> None:
    keys = full_size_keys(DEFORMABLE)
    model = get_config("decoupled_solo_light_dcn_r50").model
    model = replace(
        model,
        backbone=replace(model.backbone, deformable_stages=stages),
        head=replace(model.head, deformable=in_head),
    )
    with torch.device("meta"):
        expected = Solo(model, 80).state_dict()
        state = {key: torch.empty(entry["shape"]) for key, entry in keys.items()}  # type: ignore[call-overload]
    with pytest.raises(CheckpointError, match=message):
        convert_state_dict(state, expected, DEFORMABLE)


def test_coco_average_precision() -> None:
    stored = json.loads((LOCAL / "rle" / "cocoeval.json").read_text())
    found = mask_ap(stored["gt"], stored["dt"], max_dets=100)
    expected = dict(zip(stored["stats_names"], stored["stats"], strict=True))
    expected["AR"] = expected["AR100"]
    for name, value in found.items():
        assert value == pytest.approx(expected[name], abs=1e-12), name


def test_the_cut_down_set_is_that_of_the_whole_one() -> None:
    for name in ("units/grid_cell.npz", "units/losses.npz", "b_light/loss_one.npz"):
        assert (LOCAL / name).read_bytes() == shared_file(name).read_bytes()
    assert sum(p.stat().st_size for p in LOCAL.rglob("*") if p.is_file()) < 1.5e6
    assert LOCAL.is_relative_to(ROOT)
