"""The published implementation's numbers: where they lie and how they are read.

A cut-down set is part of the repository; the whole one is read where it is at hand, from
`$SOLO_SHARED/fixtures/parity` or `../shared/fixtures/parity` beside the repository.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.configs.schema import BackboneConfig, HeadConfig, NetworkConfig
from training.model.solo import Solo
from training.targets import Objects
from training.weights.convert import convert_state_dict

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ROOT / "tests" / "data" / "parity" / "training"
SHARED = Path(os.environ.get("SOLO_SHARED", ROOT.parent / "shared")) / "fixtures" / "parity"
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
    """Every stored model; those of the whole set only where it is at hand."""
    found = []
    for root in (LOCAL, SHARED):
        for path in sorted(root.glob("*_*/model.pth")):
            size, head = path.parent.name.split("_")
            found.append(ParityModel(root, size, head))
    return found


def shared_file(name: str) -> Path:
    """A file of the whole set; skips the test where it is not at hand."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not at hand")
    return path


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path) as content:
        return dict(content)


@cache
def load_parity_model(which: ParityModel) -> Solo:
    """The stored weights in our network, in evaluation mode."""
    content = torch.load(which.folder / "model.pth", map_location="cpu", weights_only=True)
    published = json.loads(content["meta"]["cfg"])
    head, backbone = published["mask_head"], published["backbone"]
    strides = tuple(head["strides"])
    config = NetworkConfig(
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
    state = convert_state_dict(content["state_dict"], model.state_dict(), str(which))
    model.load_state_dict(state)
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
