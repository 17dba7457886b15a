"""What a request asks for, and what becomes of each of its images."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.formats.planes import PlaneChoice
from pipeline.model_config import ModelConfig
from pipeline.postprocess import Overlaps
from pipeline.scale import Scale, ScaleError, fit_scale, fit_stated
from pipeline.types import UInt8
from pipeline.writers import FormatName
from service.errors import InvalidParameter
from service.observe.timing import Interval, Timing

Masks = Literal["rle", "polygon", "png", "none"]
Priority = Literal["interactive", "batch"]
Rank = Priority | Literal["background"]
"""`background` is the work that nobody waits for: it yields to that of all clients."""


@dataclass(frozen=True)
class ImageFile:
    """An image of a request.

    Attributes:
        file_name: The client's name for it.
        data: The encoded file, or pixels, [H, W, 3] uint8 RGB.
    """

    file_name: str | None
    data: bytes | UInt8


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """Parameters of a request.

    Attributes:
        score_threshold: Least score; None uses the model's.
        max_instances: Most instances of an image; None uses the model's.
        overlaps: `resolve` gives pixels of several masks to the best one.
        object_size_px: Typical diameter of the objects; None: as the model expects it.
        um_per_px: Size of a pixel, in micrometres; None: as the file states it, or else as the
            model expects it.
        scale: `auto` finds the scale from the objects of the image.
        channel, z, t: Which planes of a file with several are taken, see `PlaneChoice`.
        masks: Mask encoding.
        overlay: The answer is a PNG with the masks drawn on the image.
        picture: The answer has the decoded image.
        format: Output format of the answer; None: JSON of this service.
        simplify_px: Outlines of the format may be off so far.
        priority: Interactive requests of a client are scheduled before its batch requests, and
            background work after both of all clients.
    """

    score_threshold: float | None = None
    max_instances: int | None = None
    overlaps: Overlaps = "keep"
    object_size_px: float | None = None
    um_per_px: float | None = None
    scale: Scale = "own"
    channel: str | None = None
    z: int | Literal["max"] | None = None
    t: int | None = None
    masks: Masks = "rle"
    overlay: bool = False
    picture: bool = False
    format: FormatName | None = None
    simplify_px: float = 0.0
    priority: Rank = "interactive"

    @property
    def planes(self) -> PlaneChoice:
        """Which planes are taken."""
        return PlaneChoice(self.channel, self.z, self.t)

    def adapt_to(self, config: ModelConfig, stated_um_per_px: float | None) -> ModelConfig:
        """An adapted configuration for an image whose file states the size of its pixels.

        Raises:
            PixelSizeError: The stated size counts, and is too far from the model's.
        """
        is_asked = self.object_size_px is not None or self.um_per_px is not None
        return config if is_asked or self.scale == "auto" else fit_stated(config, stated_um_per_px)

    def adapt(self, config: ModelConfig) -> ModelConfig:
        """A model's configuration for this request.

        Raises:
            InvalidParameter: The model cannot do what is asked for.
        """
        if self.overlaps == "resolve" and config.task == "contour":
            raise InvalidParameter(
                f"overlaps: model {config.name!r} finds contours, which are thin lines; only "
                "'keep' is possible"
            )
        try:
            return fit_scale(
                config,
                object_size_px=self.object_size_px,
                um_per_px=self.um_per_px,
                scale=self.scale,
            )
        except ScaleError as error:
            raise InvalidParameter(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class ClientProfile:
    """Client of a request: an API key, or else a peer address.

    Attributes:
        name: Unique among the clients of a server.
        weight: Share of the server relative to other clients that have work waiting.
        max_canvases: Canvases in flight; None: no bound of its own.
        canvases_per_minute: Mean rate; one minute's worth may come at once. None: no bound.
    """

    name: str = ""
    weight: float = 1.0
    max_canvases: int | None = None
    canvases_per_minute: float | None = None


@dataclass(eq=False)
class RequestProgress:
    """How much of a request is done; written by worker threads, read by the event loop.

    Attributes:
        canvases: Of all images that were admitted; 0 before admission.
        done: Canvases that have been post-processed.
        began_s: When the request arrived, `time.monotonic`.
        admitted: Set after admission, in the event loop.
    """

    canvases: int = 0
    done: int = 0
    began_s: float = field(default_factory=time.monotonic)
    admitted: asyncio.Event = field(default_factory=asyncio.Event)

    def admit(self, canvases: int) -> None:
        """Images have been admitted, in one of the passes of the request."""
        self.canvases += canvases
        self.admitted.set()


@dataclass(frozen=True)
class Outcome:
    """What became of one image.

    Attributes:
        payload: Its entry of `results` as JSON; if nothing failed, and an overlay or a format was
            asked for, a PNG or what the format's writer gives for a page.
        timing: None if it failed.
        error: Why it failed.
        canvases: Canvases that the engine processed.
        engine_s: Engine time of these canvases; calls that were shared count by their share.
        instances: Instances in the answer.
        warnings: Codes, for answers that are no JSON.
        stages: For tracing: when the image was in each stage.
        whole: For tracing: from the start of the request to the end of the image.
    """

    payload: bytes
    timing: Timing | None = None
    error: Exception | None = None
    canvases: int = 0
    engine_s: float = 0.0
    instances: int = 0
    warnings: tuple[str, ...] = ()
    stages: dict[str, Sequence[Interval]] = field(default_factory=dict)
    whole: Interval = (0.0, 0.0)
