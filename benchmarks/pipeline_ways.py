"""The stages of an image, each implemented in several ways that must give the same result.

`benchmarks pipeline` times them; the way `OURS` is the server's.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from benchmarks.candidates import SOLO_INPUT, STRIDE, draw_candidates, solo_spec
from benchmarks.harness import BenchmarkError
from benchmarks.inputs import build_jpeg
from benchmarks.ours import ONNX_FILE, load_model, open_session
from pipeline.decode import decode_image
from pipeline.nms import pairwise_iou
from pipeline.overlaps import column_runs
from pipeline.paste import paste_masks
from pipeline.postprocess import postprocess, select
from pipeline.preprocess import keep_ratio_size, prepare
from pipeline.runs import encode_edges
from pipeline.types import Bool, Candidates, Float32, Prepared, UInt8

OURS = "ours"
LEAST_IOU = 0.999
"""Of a mask pasted in two ways: pixels within rounding of the threshold may differ."""


@dataclass(frozen=True)
class PipelineStage:
    """One stage at one size.

    Attributes:
        name: Of the stage.
        image_hw: Height and width of the image.
        ways: Implementations; the first is `OURS`.
        unit: Of differences.
        measure: Difference of two results.
        tolerances: By way, how much its result may differ from ours.
    """

    name: str
    image_hw: tuple[int, int]
    ways: Mapping[str, Callable[[], Any]]
    unit: str
    measure: Callable[[Any, Any], float]
    tolerances: Mapping[str, float]

    def find_differences(self) -> dict[str, float]:
        """Runs each way once: its difference from ours.

        Raises:
            BenchmarkError: One is beyond its tolerance.
        """
        ours = self.ways[OURS]()
        differences = {}
        for name, tolerance in self.tolerances.items():
            difference = self.measure(ours, self.ways[name]())
            if not difference <= tolerance:
                raise BenchmarkError(
                    f"{self.name} at {self.image_hw}: {name} differs by {difference} "
                    f"{self.unit}, more than {tolerance}"
                )
            differences[name] = difference
        return differences


def build_stages(image_hw: tuple[int, int], counts: Sequence[int]) -> Iterator[PipelineStage]:
    """All stages but the engine at one size.

    Args:
        image_hw: Height and width.
        counts: Of instances; the stages that depend on it come once for each.
    """
    jpeg = build_jpeg(*image_hw)
    yield build_decoding(jpeg, image_hw)
    yield build_canvas(decode_image(jpeg))
    for count in counts:
        prepared, candidates = draw_candidates(image_hw, count)
        yield build_nms(candidates, image_hw)
        yield build_paste(prepared, candidates, count)
        yield build_rle(prepared, candidates, count)


def _pixel_difference(a: UInt8, b: UInt8) -> float:
    if a.shape != b.shape:
        return inf
    return float(cv2.absdiff(a, np.ascontiguousarray(b)).max())


def build_decoding(jpeg: bytes, image_hw: tuple[int, int]) -> PipelineStage:
    """A JPEG to RGB; ours also checks its header, as the server must."""
    encoded = np.frombuffer(jpeg, np.uint8)
    return PipelineStage(
        "decode JPEG",
        image_hw,
        {
            OURS: lambda: decode_image(jpeg),
            "simplejpeg": lambda: simplejpeg.decode_jpeg(jpeg, "RGB"),
            "OpenCV": lambda: cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB),
            "Pillow": lambda: np.asarray(Image.open(io.BytesIO(jpeg))),
        },
        "grey levels",
        _pixel_difference,
        {"simplejpeg": 0, "OpenCV": 1, "Pillow": 0},
    )


def build_canvas(image: UInt8) -> PipelineStage:
    """An image resized bilinearly to SOLO's 800x1333 px, padded to a multiple of 32.

    Pillow's resize smooths when it shrinks: more work, and other pixels.
    """
    image_hw = (image.shape[0], image.shape[1])
    height, width = keep_ratio_size(image_hw, 800, 1333)
    picture = Image.fromarray(image)

    def pad(resized: UInt8) -> UInt8:
        return np.pad(resized, ((0, -height % 32), (0, -width % 32), (0, 0)))

    return PipelineStage(
        "resize and pad",
        image_hw,
        {
            OURS: lambda: prepare(image, SOLO_INPUT).tiles[0].image,
            "OpenCV": lambda: pad(np.asarray(cv2.resize(image, (width, height)), np.uint8)),
            "Pillow": lambda: pad(
                np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
            ),
        },
        "grey levels",
        _pixel_difference,
        {"OpenCV": 0, "Pillow": 1 if height >= image_hw[0] else inf},
    )


def build_engine(folder: Path) -> PipelineStage:
    """A canvas of the model in `folder` through its graph, beside the bare ONNX Runtime."""
    model = load_model(folder)
    image = np.random.default_rng(0).integers(0, 256, (288, 288, 3), np.uint8)
    tiles = prepare(image, model.config.input).tiles[:1]
    feeds = {
        "images": np.stack([tile.image for tile in tiles]),
        "valid_hw": np.array([tile.valid_hw for tile in tiles], np.int64),
    }
    session = open_session(folder / f"{model.version}" / ONNX_FILE, 1)

    def measure(ours: Sequence[Candidates], theirs: Sequence[NDArray[Any]]) -> float:
        found = ours[0].mask_probs  # empty slots are left out
        return float(np.abs(found - theirs[0][0, : len(found)]).max(initial=0))

    return PipelineStage(
        "engine, one canvas",
        (tiles[0].image.shape[0], tiles[0].image.shape[1]),
        {
            OURS: lambda: model.backend.infer(tiles),
            "ONNX Runtime": lambda: session.run(["mask_probs", "scores", "labels"], feeds),
        },
        "probability",
        measure,
        {"ONNX Runtime": 0},
    )


def build_nms(candidates: Candidates, image_hw: tuple[int, int]) -> PipelineStage:
    """IoU of all pairs of candidates: what NMS costs."""
    masks = candidates.mask_probs > 0.5

    def multiply() -> Float32:
        flat = masks.reshape(len(masks), -1).astype(np.float32)
        shared = flat @ flat.T
        area = shared.diagonal()
        return np.asarray(shared / (area[:, None] + area - shared), np.float32)

    def count_runs() -> NDArray[np.float64]:
        rles = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8))
        return np.asarray(coco_mask.iou(rles, rles, [0] * len(rles)))

    return PipelineStage(
        f"NMS, {len(masks)} candidates",
        image_hw,
        {OURS: lambda: pairwise_iou(masks), "NumPy": multiply, "pycocotools": count_runs},
        "IoU",
        lambda ours, theirs: float(np.abs(ours - theirs).max()),
        {"NumPy": 0, "pycocotools": 1e-6},
    )


def _find_least_iou(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return min(float(coco_mask.iou([a], [b], [0])[0, 0]) for a, b in pairs)


def build_paste(prepared: Prepared, candidates: Candidates, count: int) -> PipelineStage:
    """Soft masks to run lengths; OpenCV's way has dense masks of the image between them."""
    spec = solo_spec(count)
    _, kept = select(candidates, spec, least_score=spec.score_threshold)
    masks = candidates.mask_probs[kept[:count]]
    (tile,) = prepared.tiles
    height, width = tile.valid_hw
    image_hw = prepared.image_hw

    def paste(probs: Float32) -> dict[str, Any]:
        canvas = cv2.resize(probs, (probs.shape[1] * STRIDE, probs.shape[0] * STRIDE))
        soft = cv2.resize(canvas[:height, :width], image_hw[::-1])
        return dict(coco_mask.encode(np.asfortranarray((soft > 0.5).astype(np.uint8))))

    return PipelineStage(
        f"paste and RLE, {count} masks",
        image_hw,
        {
            OURS: lambda: [o.rle for o in paste_masks(masks, tile, STRIDE, image_hw) if o],
            "OpenCV, pycocotools": lambda: [paste(probs) for probs in masks],
        },
        "1 - IoU",
        lambda ours, theirs: 1 - _find_least_iou(ours, theirs),
        {"OpenCV, pycocotools": 1 - LEAST_IOU},
    )


def build_rle(prepared: Prepared, candidates: Candidates, count: int) -> PipelineStage:
    """Run lengths alone: ours of edges, as pasting gives them; pycocotools' of dense masks."""
    found = postprocess(prepared, [candidates], solo_spec(count)).instances
    height, width = prepared.image_hw
    edges = [column_runs(instance).ravel() for instance in found]
    splits = np.cumsum([0, *map(len, edges)])
    joined = np.concatenate(edges)
    masks: Bool = coco_mask.decode([instance.rle for instance in found])
    return PipelineStage(
        f"RLE alone, {count} masks",
        prepared.image_hw,
        {
            OURS: lambda: [o.rle for o in encode_edges(joined, splits, (height, width)) if o],
            "pycocotools": lambda: coco_mask.encode(masks),
        },
        "masks",
        lambda ours, theirs: float(sum(a != b for a, b in zip(ours, theirs, strict=True))),
        {"pycocotools": 0},
    )
