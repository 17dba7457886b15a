"""Results: the instances of an image, as numpy arrays, COCO results or supervision detections.

Symbols: n instances, H W image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from solo_client.rle import decode_rle


@dataclass(frozen=True)
class Instance:
    """One instance.

    Attributes:
        category_id: COCO category id.
        category: Name of the category.
        score: In 0..1.
        bbox_xywh: Box of the mask, px.
        area: Number of mask pixels.
        rle: COCO compressed run-length encoding, {"size": [H, W], "counts": text}; None if the
            request said masks=False.
    """

    category_id: int
    category: str
    score: float
    bbox_xywh: tuple[float, float, float, float]
    area: int
    rle: Mapping[str, Any] | None

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """[H, W] bool, of the whole image; decoded at the first access.

        Raises:
            ValueError: The request said masks=False, or the RLE is damaged.
        """
        if self.rle is None:
            raise ValueError("no mask: the request said masks=False")
        return decode_rle(self.rle)

    def to_coco(self, image_id: int) -> dict[str, Any]:
        """A COCO result; `pycocotools` loads a list of them."""
        result = {
            "image_id": image_id,
            "category_id": self.category_id,
            "category": self.category,
            "score": self.score,
            "bbox": list(self.bbox_xywh),
            "area": self.area,
        }
        return result if self.rle is None else {**result, "segmentation": dict(self.rle)}


@dataclass(frozen=True)
class ResultFile:
    """What was found, as a file of another program.

    Attributes:
        name: File name that the server proposes.
        media_type: E.g. "application/geo+json".
        data: The content.
    """

    name: str
    media_type: str
    data: bytes


@dataclass(frozen=True)
class ResultWarning:
    """Why a result may be worthless although nothing failed.

    Attributes:
        code: `unusual_image`: unlike the images that the model was trained on; `image_not_judged`:
            it cannot be told; `scale_uncertain`: object_size_px="auto" had too little to go by.
        message: For people.
    """

    code: str
    message: str


@dataclass(frozen=True)
class Result:
    """The instances of an image, by decreasing score.

    Attributes:
        file_name: File name of the path or open file that was sent; None for any other input.
        height, width: Size of the upright image, px.
        instances: The instances.
        model, version: Model and version that were used.
        task: "segmentation", or "contour" (the masks are outlines).
        timing_ms: Time in the server by stage; with several images, of the last one.
        canvases: Model inputs that the image was cut into; None from an older server.
        instances_found: Instances before max_instances was applied; None from an older server.
        truncated: Whether max_instances cut the list; an older server does not report it.
        scale: At which the model saw the image, relative to its usual one; None from an older
            server.
        warnings: Why the result may be worthless.
    """

    file_name: str | None
    height: int
    width: int
    instances: tuple[Instance, ...]
    model: str
    version: int
    task: str
    timing_ms: Mapping[str, float]
    canvases: int | None = None
    instances_found: int | None = None
    truncated: bool = False
    scale: float | None = None
    warnings: tuple[ResultWarning, ...] = ()

    @property
    def scores(self) -> NDArray[np.float32]:
        """[n] float32, in 0..1."""
        return np.array([i.score for i in self.instances], np.float32)

    @property
    def category_ids(self) -> NDArray[np.int64]:
        """[n] int64."""
        return np.array([i.category_id for i in self.instances], np.int64)

    @property
    def boxes_xyxy(self) -> NDArray[np.float32]:
        """[n, 4] float32: left, top, right, bottom, px."""
        boxes = np.array([i.bbox_xywh for i in self.instances], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes

    @property
    def masks(self) -> NDArray[np.bool_]:
        """[n, H, W] bool; for large images use `instance.mask`, which decodes one at a time."""
        if not self.instances:
            return np.zeros((0, self.height, self.width), bool)
        return np.stack([instance.mask for instance in self.instances])

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """A COCO result for each instance."""
        return [instance.to_coco(image_id) for instance in self.instances]

    def to_supervision(self) -> Any:
        """`supervision.Detections`, with the category names as `class_name`.

        Raises:
            ImportError: The package is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError(
                "to_supervision() needs the package 'supervision': pip install supervision"
            ) from error
        has_masks = all(instance.rle is not None for instance in self.instances)
        return supervision.Detections(
            xyxy=self.boxes_xyxy,
            mask=self.masks if has_masks else None,
            confidence=self.scores,
            class_id=self.category_ids.astype(int),
            data={"class_name": np.array([i.category for i in self.instances], str)},
        )
