"""What the rules of self-configuration need to know of a data set and a machine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ImageObjects:
    """An image's size and its objects' boxes [N, 4] (x, y, w, h), px."""

    image_hw: tuple[int, int]
    boxes_xywh: Float

    @property
    def centres_xy(self) -> Float:
        """Centres of the boxes, [N, 2] px; stand in for the centres of mass."""
        return self.boxes_xywh[:, :2] + self.boxes_xywh[:, 2:] / 2

    @property
    def sizes(self) -> Float:
        """Square roots of the box areas, [N] px."""
        return np.sqrt(self.boxes_xywh[:, 2] * self.boxes_xywh[:, 3])


@dataclass(frozen=True, kw_only=True)
class DataStatistics:
    """A data set in numbers.

    Attributes:
        num_images: Images of the training split.
        num_classes: Its classes.
        sample: Images whose objects were inspected.
        grey: Whether the inspected images have no colour.
        bits: Bits per channel of the inspected files, the largest.
        intensity_range: Median over the inspected images of the range between the percentiles 0.5
            and 99.8, grey levels 0..255.
        bright_share: Share of the inspected images whose median intensity exceeds 127.
    """

    num_images: int
    num_classes: int
    sample: tuple[ImageObjects, ...]
    grey: bool = False
    bits: int = 8
    intensity_range: float = 255.0
    bright_share: float = 0.5

    @property
    def sizes(self) -> Float:
        """Sizes of the inspected objects, [N] px."""
        return np.concatenate([np.empty(0), *(image.sizes for image in self.sample)])

    @property
    def objects_per_image(self) -> NDArray[np.int64]:
        """Objects of each inspected image."""
        return np.asarray([len(image.boxes_xywh) for image in self.sample], np.int64)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the training runs: on a GPU or on CPU cores.

    Attributes:
        efficientnet: Whether EfficientNet-Lite0's ImageNet weights are installed.
    """

    gpu: bool
    cores: int = 1
    efficientnet: bool = False
