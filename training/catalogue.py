"""What was published: SOLO v1 checkpoints and ImageNet ResNets, where they lie, what they are.

Two publishers trained the same networks: the authors (files without a hash in their names) and
mmdetection (names end in the first eight digits of the file's SHA-256). `$SOLO_MIRROR` names
another place that has the files side by side.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from training.configs import get_config
from training.configs.coco import apply_schedule
from training.configs.schema import Config

AUTHORS_URL = "https://huggingface.co/xinlongwang/SOLO/resolve/main"
MMDETECTION_URL = "https://download.openmmlab.com/mmdetection/v2.0/solo"
TORCHVISION_URL = "https://download.pytorch.org/models"
MIRROR_VARIABLE = "SOLO_MIRROR"

AUTHORS_1X_MILESTONES = (9, 11)
"""Of the authors' 1x; mmdetection divides the rate at 8 and 11. Their 3x are the same."""

Publisher = Literal["authors", "mmdetection"]
Schedule = Literal["1x", "3x"]


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A file that can be downloaded.

    Attributes:
        name: What the command line calls it.
        file_name: Its name at the publisher and in the cache.
        url: At the publisher.
        sha256: Leading hexadecimal digits of its SHA-256, "" where none are published.
    """

    name: str
    file_name: str
    url: str
    sha256: str = ""

    def location(self, mirror: str | None = None) -> str:
        """The URL to fetch: of the mirror, else of `$SOLO_MIRROR`, else of the publisher."""
        base = mirror or os.environ.get(MIRROR_VARIABLE, "")
        return f"{base.rstrip('/')}/{self.file_name}" if base else self.url


@dataclass(frozen=True, kw_only=True)
class PublishedModel(PublishedFile):
    """A SOLO v1 checkpoint trained on COCO 2017.

    Attributes:
        publisher: Whose; it decides the names of the weights.
        config_name: Our configuration of the network.
        schedule: How long it was trained.
        mask_ap: Published mask AP, percent.
    """

    publisher: Publisher
    config_name: str
    schedule: Schedule
    mask_ap: float

    def config(self) -> Config:
        """Our configuration with the epochs and milestones that this checkpoint had."""
        config = apply_schedule(get_config(self.config_name), self.schedule)
        if (self.publisher, self.schedule) == ("authors", "1x"):
            schedule = replace(config.schedule, milestones=AUTHORS_1X_MILESTONES)
            config = replace(config, schedule=schedule)
        return replace(config, description=config.description.replace("3x", self.schedule))


def _authors(name: str, config_name: str, schedule: Schedule, mask_ap: float) -> PublishedModel:
    file_name = f"{name}.pth"
    return PublishedModel(
        name=name,
        file_name=file_name,
        url=f"{AUTHORS_URL}/{file_name}?download=true",
        publisher="authors",
        config_name=config_name,
        schedule=schedule,
        mask_ap=mask_ap,
    )


def _mmdetection(
    name: str, suffix: str, config_name: str, schedule: Schedule, mask_ap: float
) -> PublishedModel:
    file_name = f"{name}_{suffix}.pth"
    return PublishedModel(
        name=name,
        file_name=file_name,
        url=f"{MMDETECTION_URL}/{name}/{file_name}",
        sha256=suffix.rpartition("-")[2],
        publisher="mmdetection",
        config_name=config_name,
        schedule=schedule,
        mask_ap=mask_ap,
    )


def _imagenet(depth: int, sha256: str) -> PublishedFile:
    file_name = f"resnet{depth}-{sha256}.pth"
    return PublishedFile(
        name=f"resnet{depth}",
        file_name=file_name,
        url=f"{TORCHVISION_URL}/{file_name}",
        sha256=sha256,
    )


SOLO_MODELS = (
    _authors("SOLO_R50_1x", "solo_r50", "1x", 32.9),
    _authors("SOLO_R50_3x", "solo_r50", "3x", 35.8),
    _authors("SOLO_R101_3x", "solo_r101", "3x", 37.1),
    _authors("DECOUPLED_SOLO_R50_1x", "decoupled_solo_r50", "1x", 33.9),
    _authors("DECOUPLED_SOLO_R50_3x", "decoupled_solo_r50", "3x", 36.4),
    _authors("DECOUPLED_SOLO_R101_3x", "decoupled_solo_r101", "3x", 37.9),
    _authors("DECOUPLED_SOLO_LIGHT_R50_3x", "decoupled_solo_light_r50", "3x", 33.0),
    _authors("DECOUPLED_SOLO_LIGHT_DCN_R50_3x", "decoupled_solo_light_dcn_r50", "3x", 35.0),
    _mmdetection("solo_r50_fpn_1x_coco", "20210821_035055-2290a6b8", "solo_r50", "1x", 33.1),
    _mmdetection("solo_r50_fpn_3x_coco", "20210901_012353-11d224d7", "solo_r50", "3x", 35.9),
    _mmdetection(
        "decoupled_solo_r50_fpn_1x_coco",
        "20210820_233348-6337c589",
        "decoupled_solo_r50",
        "1x",
        33.9,
    ),
    _mmdetection(
        "decoupled_solo_r50_fpn_3x_coco",
        "20210821_042504-7b3301ec",
        "decoupled_solo_r50",
        "3x",
        36.7,
    ),
    _mmdetection(
        "decoupled_solo_light_r50_fpn_3x_coco",
        "20210906_142703-e70e226f",
        "decoupled_solo_light_r50",
        "3x",
        32.9,
    ),
)
IMAGENET_RESNETS = {
    18: _imagenet(18, "f37072fd"),
    34: _imagenet(34, "b627a593"),
    50: _imagenet(50, "0676ba61"),
    101: _imagenet(101, "63fe2227"),
}
"""torchvision's ImageNet classifiers by depth."""


def list_models() -> list[str]:
    """Names of the published SOLO checkpoints."""
    return [model.name for model in SOLO_MODELS]


def find_model(name: str) -> PublishedModel | None:
    """The checkpoint with a name or file name, upper and lower case alike; None if unknown."""
    wanted = name.lower()
    for model in SOLO_MODELS:
        if wanted in (model.name.lower(), model.file_name.lower()):
            return model
    return None


def find_model_of_file(path: Path) -> PublishedModel | None:
    """The checkpoint that a file has the publisher's name of; None if it has another name."""
    for model in SOLO_MODELS:
        if path.name.lower() == model.file_name.lower():
            return model
    return None


def get_model(name: str) -> PublishedModel:
    """The checkpoint with a name.

    Raises:
        ValueError: Nobody published it; lists what there is.
    """
    model = find_model(name)
    if model is None:
        raise ValueError(
            f"{name!r} is neither a file nor a published checkpoint; "
            f"there are {', '.join(list_models())}"
        )
    return model


def get_imagenet(depth: int) -> PublishedFile:
    """The ImageNet weights of a depth.

    Raises:
        ValueError: None are known; names the depths that are.
    """
    if depth not in IMAGENET_RESNETS:
        known = ", ".join(map(str, sorted(IMAGENET_RESNETS)))
        raise ValueError(f"no ImageNet weights of ResNet-{depth}; there are those of {known}")
    return IMAGENET_RESNETS[depth]
