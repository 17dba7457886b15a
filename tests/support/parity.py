"""Outputs of the published implementation: reading them and comparing with them.

A part of them is in the repository. The complete set is optional (`tests.support.parity_files`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tests.support.parity_files import LOCAL, SHARED, WITHOUT_SHARED, has_shared
from training.configs.schema import BackboneConfig, HeadConfig, ModelConfig
from training.convert import load_published
from training.model.solo import Solo
from training.targets import Objects

TIE = 1e-6
"""Difference of two neighbouring probabilities below which rounding decides the points NMS.

Rounding depends on the instruction set: the same network differs by up to 1e-7 between AVX2 and
AVX-512.
"""
KINDS = {"solo": "vanilla", "decoupled": "decoupled", "light": "decoupled_light"}


@dataclass(frozen=True)
class ParityModel:
    """One head of one set, e.g. set b with the light head."""

    root: Path
    size: str
    head: str

    def __str__(self) -> str:
        return f"{'shared' if self.root == SHARED else 'local'}-{self.size}-{self.head}"

    @property
    def folder(self) -> Path:
        return self.root / f"{self.size}_{self.head}"

    def cases(self) -> list[str]:
        """Inputs whose outputs are stored: b_single, b_batch, ..."""
        return sorted(p.stem for p in self.folder.glob(f"{self.size}_*.npz"))

    def scenes(self) -> list[str]:
        """Ground truths whose losses are stored: one, two, ..."""
        return sorted(p.stem.removeprefix("loss_") for p in self.folder.glob("loss_*.npz"))


def parity_models() -> list[ParityModel]:
    """The stored models of the repository, and of the complete set if it is present."""
    found = []
    for root in (LOCAL, SHARED):
        for path in sorted(root.glob("*_*/model.pth")):
            size, head = path.parent.name.split("_")
            found.append(ParityModel(root, size, head))
    return found


def each(names: str, cases: Sequence[tuple[object, ...]]) -> pytest.MarkDecorator:
    """Parametrises a test; without the complete set one more case says what is left out.

    Args:
        names: Of the parameters, separated by commas.
        cases: Values of the parameters.
    """
    params = [pytest.param(*case, id="-".join(map(str, case))) for case in cases]
    if not has_shared():
        absent = [None] * len(names.split(","))
        params.append(
            pytest.param(*absent, id="shared", marks=pytest.mark.skip(reason=WITHOUT_SHARED))
        )
    return pytest.mark.parametrize(names, params)


def shared_file(name: str) -> Path:
    """A file of the complete set; skips the test without that set."""
    if not has_shared():
        pytest.skip(WITHOUT_SHARED)
    return SHARED / name


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path) as content:
        return dict(content)


@cache
def load_parity_model(which: ParityModel) -> Solo:
    """Our network with the stored weights, in evaluation mode."""
    content = torch.load(which.folder / "model.pth", map_location="cpu", weights_only=True)
    published = json.loads(content["meta"]["cfg"])
    head, backbone = published["mask_head"], published["backbone"]
    strides = tuple(head["strides"])
    config = ModelConfig(
        backbone=BackboneConfig(
            depth=backbone["depth"],
            base_width=backbone.get("base_channels", 64),
            frozen_stages=backbone["frozen_stages"],
        ),
        neck_channels=published["neck"]["out_channels"],
        head=HeadConfig(
            kind=KINDS[which.head],  # type: ignore[arg-type]
            channels=head["feat_channels"],
            num_convs=head["stacked_convs"],
            num_grids=tuple(head["num_grids"]),
            level_strides=strides,
            mask_strides=tuple(stride // 2 for stride in strides),
            scale_ranges=tuple((low, high) for low, high in head["scale_ranges"]),
            norm_groups=head["norm_cfg"]["num_groups"],
        ),
    )
    model = Solo(config, head["num_classes"])
    load_published(model, content["state_dict"], str(which))
    return model.eval()


@cache
def _inputs(root: Path) -> dict[str, NDArray[Any]]:
    return read_npz(root / "inputs.npz")


def load_input(which: ParityModel, case: str) -> Tensor:
    """Normalised, padded images [N, 3, H, W]."""
    return torch.from_numpy(_inputs(which.root)[case])


def load_metas(which: ParityModel, case: str) -> list[dict[str, Any]]:
    """img_shape, ori_shape, ... of each image of a case."""
    content: dict[str, list[dict[str, Any]]] = json.loads((which.root / "metas.json").read_text())
    return content[case]


def load_objects(which: ParityModel, scene: str) -> list[Objects]:
    """Ground truth of every image of a scene."""
    stored = read_npz(which.root / "gt" / f"{which.size}_{scene}.npz")
    images = sorted({key.split("_")[0] for key in stored})
    return [
        Objects(stored[f"{i}_masks"], stored[f"{i}_bboxes"], stored[f"{i}_labels"]) for i in images
    ]


def close(found: NDArray[Any], stored: NDArray[Any], tolerance: float) -> None:
    """Asserts that no element differs by more than `tolerance`."""
    np.testing.assert_allclose(found, stored, rtol=0, atol=tolerance)


def check_points_nms(
    probs: Tensor, kept: Tensor, stored: NDArray[np.float32], tolerance: float
) -> NDArray[np.bool_]:
    """Asserts that our points NMS suppresses the same entries as the stored one, except for ties.

    An entry is tied if it differs from its greatest neighbour above or left by less than `TIE`.

    Args:
        probs: [B, C, S, S] our probabilities.
        kept: [B, C, S, S] the same after our points NMS.
        stored: [B, C, S, S] the published probabilities after points NMS.
        tolerance: Of a probability.

    Returns:
        [B, C, S, S] the tied entries that only one of the two keeps.
    """
    padded = F.pad(probs, (1, 0, 1, 0), value=-1.0)
    neighbours = padded[..., :-1, :-1], padded[..., :-1, 1:], padded[..., 1:, :-1]
    tied = (probs - torch.stack(neighbours).amax(0)).abs() < TIE
    differs: NDArray[np.bool_] = (kept.numpy() > 0) != (stored > 0)
    wrong = np.argwhere(differs & ~tied.numpy())
    assert not len(wrong), f"not tied, but suppressed by one of the two: {wrong.tolist()}"
    found = np.where(differs, probs.numpy(), kept.numpy())
    close(found, np.where(differs & (stored == 0), found, stored), tolerance)
    return differs
