"""One version of a model: all that the service knows of it."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_INT = 2**31 - 1
MAX_SIDE_PX = 16_384
MAX_CANVAS_PX = 4096 * 4096
"""Largest canvas; the first layers of a network need several hundred bytes for each pixel."""
MAX_CLASSES = 10_000
"""More would hold Python for tenths of a second whenever they are read or listed."""
MAX_ZOOM = 4
"""Largest factor between the scale of a request and the model's own, either way."""
MAX_CANVASES = 16
Ordinal = Annotated[int, Field(ge=0, lt=1024, strict=True)]
PositiveInt = Annotated[int, Field(gt=0, le=MAX_INT)]
Side = Annotated[int, Field(gt=0, le=MAX_SIDE_PX)]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=255)]
Text = Annotated[str, Field(max_length=1000)]
Probability = Annotated[float, Field(ge=0, le=1)]
Canvas = tuple[Side, Side]
"""Height and width, px."""
Task = Literal["segmentation", "contour"]
"""What an instance's mask is: the object's pixels, or its outline alone."""


class Spec(BaseModel):
    """Immutable; unknown fields and numbers that are not finite are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ClassSpec(Spec):
    """A class; its position in the list is its label."""

    category_id: Annotated[int, Field(ge=0)]
    name: Annotated[str, Field(min_length=1)]


class ContrastSpec(Spec):
    """Linear stretch between two percentiles of the image's intensities.

    Attributes:
        low, high: Percentiles, 0..100, that become 0 and 255.
        min_range: Least difference between them that is stretched, in grey levels.
    """

    rule: Literal["percentile"] = "percentile"
    low: Annotated[float, Field(ge=0, le=100)]
    high: Annotated[float, Field(ge=0, le=100)]
    min_range: Annotated[float, Field(gt=0)] = 16.0

    @model_validator(mode="after")
    def _ordered(self) -> ContrastSpec:
        if self.low >= self.high:
            raise ValueError(f"low percentile {self.low} is not below high {self.high}")
        return self


def _check_canvas(height: int, width: int) -> None:
    if not 0 < height * width <= MAX_CANVAS_PX:
        raise ValueError(
            f"the canvas would have {height}x{width} px, it must have 1 to {MAX_CANVAS_PX} px"
        )


class KeepRatioResize(Spec):
    """The published rule; the canvas is the resized image padded to a multiple.

    The short side becomes `short_side` unless the long side then exceeds `long_side`.
    """

    rule: Literal["keep_ratio"] = "keep_ratio"
    short_side: Side
    long_side: Side
    pad_multiple: Side = 32

    @model_validator(mode="after")
    def _bounded(self) -> KeepRatioResize:
        _check_canvas(*self.largest_sides)
        return self

    @property
    def largest_sides(self) -> tuple[int, int]:
        """Short and long side of the largest canvas, px."""
        return self.pad(min(self.short_side, self.long_side), self.long_side)

    def pad(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the canvas of an image that is resized to a size, px."""
        multiple = self.pad_multiple
        return -(-height // multiple) * multiple, -(-width // multiple) * multiple


class TileResize(Spec):
    """Fixed scale on one fixed canvas; larger images are cut into overlapping tiles.

    Attributes:
        scale: Canvas px per image px.
        tile_hw: Tile's height and width, image px.
        overlap_px: Least overlap of neighbouring tiles, image px.
    """

    rule: Literal["tile"] = "tile"
    scale: Annotated[float, Field(gt=0, le=MAX_SIDE_PX)]
    tile_hw: tuple[Side, Side]
    overlap_px: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _fits(self) -> TileResize:
        if self.overlap_px >= min(self.tile_hw):
            raise ValueError(f"overlap_px {self.overlap_px} is not below the tile {self.tile_hw}")
        _check_canvas(*self.canvas_hw)
        return self

    @property
    def canvas_hw(self) -> tuple[int, int]:
        """Height and width of the canvas, px."""
        return round(self.tile_hw[0] * self.scale), round(self.tile_hw[1] * self.scale)

    def zoomed(self, zoom: float) -> TileResize:
        """The same canvases, on which the image is larger by a factor."""
        canvas_hw = self.canvas_hw
        tile_hw = max(1, round(self.tile_hw[0] / zoom)), max(1, round(self.tile_hw[1] / zoom))
        scale = min(canvas_hw[0] / tile_hw[0], canvas_hw[1] / tile_hw[1])
        return ZoomedTiles(
            scale=scale,
            tile_hw=tile_hw,
            overlap_px=min(round(self.overlap_px / zoom), min(tile_hw) - 1),
            zoom=scale / self.scale,
            whole_canvas_hw=canvas_hw,
        )


class ZoomedTiles(TileResize):
    """Tiles for one request; not in config.json, whose bounds they may exceed.

    Attributes:
        zoom: Size of the image on the canvas, relative to the model's own scale.
        whole_canvas_hw: The model's canvas; a tile may leave a margin of 1 px on it.
    """

    scale: Annotated[float, Field(gt=0)]
    tile_hw: tuple[PositiveInt, PositiveInt]
    zoom: float
    whole_canvas_hw: tuple[PositiveInt, PositiveInt]

    @property
    def canvas_hw(self) -> tuple[int, int]:
        """Height and width of the canvas, px."""
        return self.whole_canvas_hw


class InputSpec(Spec):
    """How an image becomes canvases."""

    resize: Annotated[KeepRatioResize | TileResize, Field(discriminator="rule")]
    contrast: ContrastSpec | None = None

    @property
    def zoom(self) -> float:
        """Scale of the image relative to the model's own; 1 unless a request changed it."""
        return self.resize.zoom if isinstance(self.resize, ZoomedTiles) else 1.0


class ModelCard(Spec):
    """What a model is for; all but the sizes is text for people.

    Attributes:
        domain: The images and objects that it was trained on.
        object_size_px: Typical diameter of an object in them.
        um_per_px: Size of their pixels, in micrometres.
        training_data: Name and extent of the data.
        licence: Of the weights and of the data.
        attribution: Whom the licence asks to name.
    """

    domain: Text = ""
    object_size_px: Annotated[float, Field(gt=0, le=MAX_SIDE_PX)] | None = None
    um_per_px: Annotated[float, Field(gt=0, le=MAX_INT)] | None = None
    training_data: Text = ""
    licence: Text = ""
    attribution: Text = ""


class MatrixNms(Spec):
    """Matrix NMS (SOLOv2, arXiv 2003.10152, section 3.3): scores decay with the overlap."""

    kind: Literal["matrix"] = "matrix"
    kernel: Literal["gaussian", "linear"] = "gaussian"
    sigma: Annotated[float, Field(gt=0)] = 2.0


class MaskNms(Spec):
    """Greedy NMS by mask IoU (paper, section 3.4)."""

    kind: Literal["mask"] = "mask"
    iou_threshold: Probability = 0.5


class PostprocessSpec(Spec):
    """From candidates to instances.

    Attributes:
        nms: How duplicates are found.
        compare: What NMS and the merging of tiles compare: the masks themselves, or the regions
            that they enclose (for masks that are contours).
        update_threshold: Score that a candidate must keep after NMS.
        mask_threshold: Probability above which a pixel belongs to the mask.
        score_threshold: Default of the responses.
        max_instances: Default bound of the responses.
    """

    nms: Annotated[MatrixNms | MaskNms, Field(discriminator="kind")]
    compare: Literal["masks", "enclosed"] = "masks"
    update_threshold: Probability = 0.05
    mask_threshold: Probability = 0.5
    score_threshold: Probability = 0.1
    max_instances: PositiveInt = 100


class Limits(Spec):
    """Bounds of the engine.

    Attributes:
        max_batch: Canvases in one call.
        instances: Calls at once; None takes the server's `engine_slots`.
        threads: Of one call on the CPU; None takes the server's.
        precision: Of the engine; None takes the server's.
        gpus: Which of the process's GPUs, by their positions in `SOLO_DEVICES`; None takes all.
    """

    max_batch: Annotated[int, Field(gt=0, le=1024)] = 8
    instances: Annotated[int, Field(gt=0, le=256)] | None = None
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None
    precision: Precision | None = None
    gpus: Annotated[tuple[Ordinal, ...], Field(min_length=1)] | None = None

    @field_validator("gpus")
    @classmethod
    def _unique_gpus(cls, gpus: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if gpus is not None and len(set(gpus)) != len(gpus):
            raise ValueError(f"{list(gpus)} names a GPU twice")
        return gpus


class Calibration(Spec):
    """An increasing map of scores, linear between its points, from 0, 0 to 1, 1.

    Attributes:
        network: Scores of the network.
        reported: Scores in answers, and of every score threshold.
    """

    network: Annotated[tuple[Probability, ...], Field(min_length=2, max_length=1000)]
    reported: Annotated[tuple[Probability, ...], Field(min_length=2, max_length=1000)]

    @model_validator(mode="after")
    def _increases(self) -> Calibration:
        if len(self.network) != len(self.reported):
            raise ValueError(f"{len(self.network)} scores are mapped to {len(self.reported)}")
        for name, values in (("network", self.network), ("reported", self.reported)):
            rises = all(a < b for a, b in pairwise(values))
            if not rises or (values[0], values[-1]) != (0, 1):
                raise ValueError(f"{name} {values} does not rise from 0 to 1")
        return self


CONFIDENCE = "confidence"
STATISTICS = (
    *("mean", "std", "low", "high", "saturation", "yellow", "detail", "direction"),
    CONFIDENCE,
)
"""Of an image, in `pipeline.domain`; models published before the last was added lack it."""


class DomainSpec(Spec):
    """Where the training images lie among all images, see `pipeline.domain`.

    Attributes:
        statistics: What is measured of an image: `STATISTICS`, or all but the last.
        spreads: Standard deviation of each in the training images.
        centres: Typical images, as these statistics.
        threshold: Greatest distance to the nearest centre that is usual, in spreads.
    """

    statistics: tuple[str, ...]
    spreads: tuple[Annotated[float, Field(gt=0)], ...]
    centres: Annotated[tuple[tuple[float, ...], ...], Field(min_length=1, max_length=1000)]
    threshold: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _fits(self) -> DomainSpec:
        if self.statistics not in (STATISTICS, STATISTICS[:-1]):
            raise ValueError(f"statistics are {self.statistics}, this version has {STATISTICS}")
        for name, values in [("spreads", self.spreads), *(("centre", c) for c in self.centres)]:
            if len(values) != len(self.statistics):
                raise ValueError(f"{name} {values} has not {len(self.statistics)} values")
        return self


class FileSpec(Spec):
    """A file of a version."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(gt=0, le=2**36)]


class ModelConfig(Spec):
    """One version of a model.

    Attributes:
        ap_cost: AP on held-out images that is lost against fp32, by precision, where measured.
        canvases: On a GPU, an image's canvas is padded to the smallest of these that holds it, so
            that images of different sizes share batches; empty: no image's canvas is changed.
    """

    name: ModelName
    version: PositiveInt
    task: Task = "segmentation"
    description: str = ""
    input: InputSpec
    classes: Annotated[tuple[ClassSpec, ...], Field(min_length=1, max_length=MAX_CLASSES)]
    card: ModelCard = ModelCard()
    candidates: PositiveInt
    mask_stride: PositiveInt
    postprocess: PostprocessSpec
    calibration: Calibration | None = None
    domain: DomainSpec | None = None
    limits: Limits = Limits()
    canvases: Annotated[tuple[Canvas, ...], Field(max_length=MAX_CANVASES)] = ()
    files: Annotated[dict[str, FileSpec], Field(min_length=1)]
    ap_cost: dict[Precision, Annotated[float, Field(ge=-1, le=1)]] = {}
    provenance: dict[str, Any] = {}

    @model_validator(mode="after")
    def _unique_categories(self) -> ModelConfig:
        ids = [c.category_id for c in self.classes]
        if len(set(ids)) != len(ids):
            raise ValueError(f"category ids are not unique: {ids}")
        return self

    @model_validator(mode="after")
    def _canvases_hold_every_image(self) -> ModelConfig:
        if not self.canvases:
            return self
        for canvas_hw in self.canvases:
            _check_canvas(*canvas_hw)
        resize = self.input.resize
        if isinstance(resize, TileResize):
            if self.canvases != (resize.canvas_hw,):
                raise ValueError(f"canvases must be {resize.canvas_hw} alone, the tiles' canvas")
            return self
        multiple = resize.pad_multiple
        for canvas_hw in self.canvases:
            if canvas_hw[0] % multiple or canvas_hw[1] % multiple:
                raise ValueError(f"canvas {canvas_hw} is not in multiples of {multiple}")
        short, long = resize.largest_sides
        for height, width in ((short, long), (long, short)):
            if not any(h >= height and w >= width for h, w in self.canvases):
                raise ValueError(f"no canvas holds the largest image, {height}x{width} px")
        return self
