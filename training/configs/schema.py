"""Configuration of a SOLO model and its training; does not import torch.

Every class is a frozen keyword-only dataclass: a variant is made with `dataclasses.replace`, and a
misspelt field is an error. Defaults are the published R50 model ("SOLO: Segmenting Objects by
Locations", arXiv 1912.04488v1, and its published configuration).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict

from pipeline.model_config import (
    ClassSpec,
    InputSpec,
    KeepRatioResize,
    MatrixNms,
    PostprocessSpec,
    Task,
)

BackboneKind = Literal["resnet", "efficientnet_lite0"]
HeadKind = Literal["vanilla", "decoupled", "decoupled_light"]
MaskLoss = Literal["dice", "bce", "focal"]
PAPER_MASK_WEIGHTS: dict[MaskLoss, float] = {"dice": 3.0, "bce": 10.0, "focal": 20.0}
PUBLISHED_SCALE_RANGES = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))


class StrictFields:
    """Base of the configuration classes: pydantic refuses unknown fields when it reads one."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(StrictFields):
    """The backbone.

    Attributes:
        kind: `resnet` (v1.5: the stride is in the 3x3 convolution) or `efficientnet_lite0`.
        depth: Of a ResNet: 18, 34, 50 or 101.
        base_width: Channels of the stem; published: 64, of EfficientNet-Lite0 32. Those of the
            other layers are in proportion.
        norm: `frozen_bn` keeps batch statistics and affine parameters of an ImageNet model
            in evaluation mode as the published models do; `bn` and `gn` train from scratch.
        frozen_stages: Stages without gradients, 0 to 4 (0: none, 1: stem and stage 1, which ends
            in C2); published: 1.
        deformable_stages: Stages whose 3x3 convolutions are deformable (R-DCN and published: 2,
            3, 4, whose outputs are C3..C5); only of ResNets of depth 50 and 101.
    """

    kind: BackboneKind = "resnet"
    depth: Literal[18, 34, 50, 101] = 50
    base_width: int = 64
    norm: Literal["frozen_bn", "bn", "gn"] = "frozen_bn"
    frozen_stages: int = 1
    deformable_stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not set(self.deformable_stages) <= {1, 2, 3, 4}:
            raise ValueError(f"deformable_stages is {self.deformable_stages}, expected some of 1-4")
        if not 0 <= self.frozen_stages <= 4:
            raise ValueError(f"frozen_stages is {self.frozen_stages}, expected 0 to 4")
        if self.base_width < 1:
            raise ValueError(f"base_width is {self.base_width}, expected at least 1")
        if self.deformable_stages and (self.kind != "resnet" or self.depth < 50):
            blocks = f"depth {self.depth}" if self.kind == "resnet" else self.kind
            raise ValueError(
                f"deformable_stages is {self.deformable_stages}, but the blocks of {blocks} have "
                "no deformable form; expected a ResNet of depth 50 or 101"
            )


@dataclass(frozen=True, kw_only=True)
class HeadConfig(StrictFields):
    """SOLO head; one entry of each tuple per pyramid level, finest first.

    Attributes:
        kind: `vanilla` (S^2 mask channels), `decoupled` (two towers, 2S channels) or
            `decoupled_light` (one shared mask tower, 2S channels).
        channels: Width of both towers.
        num_convs: 3x3 convolutions per tower.
        num_grids: S of every level.
        level_strides: Stride to which each pyramid level is resized before the head, px.
        mask_strides: Stride of each level's masks, px; published: half of `level_strides`.
        scale_ranges: Inclusive bounds of sqrt(box area) of the objects of each level, px.
        align: How the features of a level are resized to S x S for the category branch (paper,
            section 4.3): `interpolate` (bilinear, as published), `adaptive_max_pool`, or
            `region_grid` (the mean of bilinear samples spread over each cell).
        deformable: Whether the last convolution of every tower is deformable (published Light-DCN).
        num_coord_convs: Number of mask tower convolutions, from the first on, whose input has the
            coordinates.
        coord_octaves: Sine/cosine pairs added to each coordinate (0: the plain coordinate of
            the paper). Our own variant, measured in docs/experiments.md.
        mask_kernel: Kernel of the decoupled heads' output convolution; published: 3, paper: 1.
        category_kernel: Kernel of the category output convolution; published: 3, paper: 1.
        norm_groups: Groups of GroupNorm in the towers.
        mask_prior: Initial probability of each mask output channel; published: 0.01.
    """

    kind: HeadKind = "vanilla"
    channels: int = 256
    num_convs: int = 7
    num_grids: tuple[int, ...] = (40, 36, 24, 16, 12)
    level_strides: tuple[int, ...] = (8, 8, 16, 32, 32)
    mask_strides: tuple[int, ...] = (4, 4, 8, 16, 16)
    scale_ranges: tuple[tuple[float, float], ...] = PUBLISHED_SCALE_RANGES
    align: Literal["interpolate", "adaptive_max_pool", "region_grid"] = "interpolate"
    deformable: bool = False
    num_coord_convs: int = 1
    coord_octaves: int = 0
    mask_kernel: Literal[1, 3] = 3
    category_kernel: Literal[1, 3] = 3
    norm_groups: int = 32
    mask_prior: float = 0.01

    def __post_init__(self) -> None:
        levels = len(self.num_grids)
        for name in ("level_strides", "mask_strides", "scale_ranges"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, num_grids has {levels}"
                )
        if not 1 <= levels <= 5:
            raise ValueError(f"num_grids has {levels} levels, expected 1 to 5 (P2..P6)")
        if not 0 <= self.num_coord_convs <= self.num_convs:
            raise ValueError(
                f"num_coord_convs is {self.num_coord_convs}, expected 0 to {self.num_convs}"
            )


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(StrictFields):
    """The network and what its graph computes.

    Attributes:
        neck: `fpn` (P2..P6), or `single`: C3..C5 merged at stride 8, for heads of one level
            (the paper's single-level ablation).
        neck_channels: Width of the neck's features.
        recipe: `published` selects candidates as the authors' code does (points NMS, area
            filter, maskness); `paper` ranks by the category score alone.
        candidate_threshold: Category probability a candidate must exceed (paper: 0.1).
        candidates: K, the ranked candidates that leave the graph (paper: top 500).
        mask_threshold: Probability above which a pixel counts for maskness and for the area
            filter of the `published` recipe (0.5).
    """

    backbone: BackboneConfig = BackboneConfig()
    neck: Literal["fpn", "single"] = "fpn"
    neck_channels: int = 256
    head: HeadConfig = HeadConfig()
    recipe: Literal["paper", "published"] = "published"
    candidate_threshold: float = 0.1
    candidates: int = 500
    mask_threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.neck == "single" and self.head.level_strides != (8,):
            raise ValueError(
                f"level_strides is {self.head.level_strides}, the single neck has one level: (8,)"
            )

    @property
    def stride_divisor(self) -> int:
        """Divisor of the sides of a canvas, px: the stride of C5."""
        return 32


@dataclass(frozen=True, kw_only=True)
class TargetConfig(StrictFields):
    """Target assignment (paper, section 3.3).

    Attributes:
        recipe: `published`: the centre region covers at most one cell on each side of the centre's
            cell; `paper`: it has no such limit. It is scaled from the extent of the mask in both:
            training computes boxes from the masks, and published code uses those of the file.
            For contours, see `masks`.
        centre_scale: Size of the centre region relative to the object (paper: 0.2).
        mask_resize: `bilinear` as published (uint8, so still binary) or `area` (the covered
            fraction of each mask pixel; preserves the contour of objects of a few pixels).
        masks: Target of the mask branch: the object's `region`, or only its `contour` (instance
            contour detection; paper, section 6). With recipe `paper` the contour is found on the
            canvas and then resized, otherwise it is found on the resized mask.
    """

    recipe: Literal["paper", "published"] = "published"
    centre_scale: float = 0.2
    mask_resize: Literal["bilinear", "area"] = "bilinear"
    masks: Literal["region", "contour"] = "region"


@dataclass(frozen=True, kw_only=True)
class LossConfig(StrictFields):
    """Losses and their weights (paper, section 3.3; focal loss as RetinaNet).

    Attributes:
        mask_loss: `dice`, `bce` or `focal`; the last two are the paper's ablation.
        mask_weight: Factor of the mask loss; None: the paper's for this loss (3, 10, 20).
        bce_positive_weight: Factor of the object's pixels in `bce` (paper: 2).
        dice_eps: Added to both sums of squares; the paper has 0, the published code 1e-3.
    """

    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    category_weight: float = 1.0
    mask_loss: MaskLoss = "dice"
    mask_weight: float | None = None
    bce_positive_weight: float = 2.0
    dice_eps: float = 1e-3

    @property
    def effective_mask_weight(self) -> float:
        """Factor of the mask loss, `mask_weight` or its default."""
        return PAPER_MASK_WEIGHTS[self.mask_loss] if self.mask_weight is None else self.mask_weight


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(StrictFields):
    """Random augmentation of a training image.

    Attributes:
        short_sides: Keep-ratio rule: bounds of the random short side, px (paper: 640-800).
        scale_jitter: Tile rule: bounds of the factor on the serving scale.
        flip: Probability of a horizontal flip.
        dihedral: Also flips vertically and rotates by multiples of 90 degrees (microscopy images
            have no upright orientation).
        brightness, contrast, gamma: Half-widths of the ranges of the photometric changes.
        invert: Probability of inverting the intensities.
        stain: Half-width of the range of the change of gamma of each channel of colour images.
        levels: Half of the images are reduced to at least this many grey levels, as dim images have
            after their contrast was stretched; 256: none.
        blur: Largest standard deviation of a Gaussian blur, px of the image; on half of the images.
        noise: Largest standard deviation of Gaussian noise, share of the full range; on half of the
            images.
    """

    short_sides: tuple[int, int] = (640, 800)
    scale_jitter: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.5
    dihedral: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    gamma: float = 0.0
    invert: float = 0.0
    stain: float = 0.0
    levels: int = 256
    blur: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= 256:
            raise ValueError(f"augment.levels is {self.levels}, expected 2 to 256")
        for name in ("stain", "blur", "noise"):
            value: float = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"augment.{name} is {value}, expected a number from 0")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(StrictFields):
    """Optimisation.

    Attributes:
        optimizer: `sgd` (paper) or `adamw`.
        schedule: `step` divides the rate by ten at `milestones`; `cosine` decays it to zero.
        batch_size: Images per step, over all processes.
        images_per_canvas: Keep-ratio rule: number of consecutive images of a batch that share a
            canvas, all landscape or all portrait; published: 2, those of one GPU. If it does not
            divide the batch size, their greatest common divisor is used.
        epochs: Passes over the data; `milestones` are epochs too.
        warmup_steps: Steps of linear warm-up from `warmup_ratio` of the rate.
        clip_norm: Maximum norm of the gradients; the authors use 35, None: no clipping.
        frozen_backbone_epochs: First epochs in which the backbone keeps its trained weights; 0: it
            is trained from the start.
        skip_empty_images: Leave images without objects out of training, as mmdetection does.
        repeat_below: Images with a class that less than this share f of the images has are repeated
            sqrt(f / its share) times, rounded (LVIS, arXiv 1908.03195); 0: none.
        ema_decay: Decay of the moving average of the weights used for evaluation (0: no average).
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["step", "cosine"] = "step"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: int = 16
    images_per_canvas: int = 2
    epochs: int = 36
    milestones: tuple[int, ...] = (27, 33)
    warmup_steps: int = 500
    warmup_ratio: float = 1e-3
    clip_norm: float | None = 35.0
    frozen_backbone_epochs: int = 0
    skip_empty_images: bool = False
    repeat_below: float = 0.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "images_per_canvas", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.frozen_backbone_epochs < 0:
            raise ValueError(
                f"frozen_backbone_epochs is {self.frozen_backbone_epochs}, expected at least 0"
            )
        if not 0 <= self.repeat_below <= 1:
            raise ValueError(f"repeat_below is {self.repeat_below}, expected 0 to 1")

    @property
    def canvas_group(self) -> int:
        """Images that share a canvas: the gcd of the batch size and `images_per_canvas`."""
        return math.gcd(self.batch_size, self.images_per_canvas)


@dataclass(frozen=True, kw_only=True)
class Config(StrictFields):
    """One model of the zoo; `classes` is empty until it is set from a data set."""

    name: str
    description: str = ""
    model: NetworkConfig = NetworkConfig()
    targets: TargetConfig = TargetConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    input: InputSpec = field(
        default_factory=lambda: InputSpec(resize=KeepRatioResize(short_side=800, long_side=1333))
    )
    postprocess: PostprocessSpec = field(
        default_factory=lambda: PostprocessSpec(nms=MatrixNms(), score_threshold=0.05)
    )
    num_classes: int = 80
    classes: tuple[ClassSpec, ...] = ()

    @property
    def task(self) -> Task:
        """Task of the served model."""
        return "contour" if self.targets.masks == "contour" else "segmentation"
