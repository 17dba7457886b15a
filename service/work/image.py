"""One image from its bytes to its entry of the answer: decode, canvases, instances, encode."""

from __future__ import annotations

import base64
import itertools
import threading
import time
from collections.abc import Sequence

import numpy as np
import orjson
from numpy.typing import NDArray

from pipeline.decode import ImageHeader, decode_for, open_image, peek_hw, read_header
from pipeline.domain import check_domain, describe_exposures
from pipeline.draw import draw_instances
from pipeline.encode import encode_index_png, encode_png, instance_to_coco
from pipeline.errors import CorruptImage, WriteError
from pipeline.model_config import Canvas, InputSpec, ModelConfig, Task
from pipeline.postprocess import Collector, Detections, TileCandidates
from pipeline.preprocess import count_canvases, needed_hw, prepare
from pipeline.types import AnswerWarning, Detection, Prepared, Tile, UInt8
from pipeline.writers import FORMATS, Page
from service.errors import InvalidParameter, TooManyCanvases, describe_error, drop_frames
from service.observe.timing import Interval, attribute_time
from service.work.request import ImageFile, Outcome, RequestOptions

HW = tuple[int, int]


def peek_size(data: bytes | UInt8) -> HW | None:
    """Height and width of an image if they can be read at once, before orientation."""
    if isinstance(data, bytes):
        return peek_hw(data)
    height, width = data.shape[:2]
    return int(height), int(width)


def read_image_header(data: bytes | UInt8, max_pixels: int) -> ImageHeader:
    """Height and width from the header alone, before orientation.

    Raises:
        DecodeError: The image is refused.
    """
    if isinstance(data, bytes):
        return read_header(data, max_pixels=max_pixels)
    return ImageHeader(int(data.shape[0]), int(data.shape[1]))


def count_cost(image_hw: HW, spec: InputSpec, max_canvases: int) -> int:
    """Canvases of an image, before it is decoded.

    The orientation is not known yet, so the larger of both counts is taken.

    Raises:
        TooManyCanvases: More than `max_canvases`.
    """
    canvases = count_canvases(image_hw, spec)
    if image_hw[0] != image_hw[1]:
        canvases = max(canvases, count_canvases(image_hw[::-1], spec))
    if canvases > max_canvases:
        raise TooManyCanvases(
            f"the image of {image_hw[1]}x{image_hw[0]} px needs {canvases} canvases, the server "
            f"allows {max_canvases}; crop it, send it in parts, or, if the model has a scale, show "
            "it smaller (a larger object_size_px, a smaller um_per_px)"
        )
    return canvases


class Dropped(Exception):
    """The request was dropped while a thread was about to process a canvas."""


class ImageWork:
    """The state of one image; `open` first, then each canvas once, in any order and thread.

    Args:
        file: The image.
        image_hw: Height and width that were admitted, before orientation.
        canvases: Canvases that were admitted.
        config: The model's, as the request's options adapt it.
        options: The request's.
        scaled: A JPEG may be decoded no larger than the model needs it.
        probe: What its scale was chosen by; its costs are added.

    Attributes:
        canvases: Corrected by `open`.
        pixels: Of the decoded image, as admitted.
        outcome: None until the image is finished or has failed.
        warnings: So far.
        taken, searched, is_opening, held: State of the work queue: canvases that threads have
            taken and post-processed; whether a thread is in `open`; decoded pixels counted in the
            budget.
    """

    def __init__(
        self,
        file: ImageFile,
        image_hw: HW,
        canvases: int,
        config: ModelConfig,
        options: RequestOptions,
        *,
        scaled: bool = False,
        probe: ImageWork | None = None,
    ) -> None:
        self.canvases = canvases
        self.pixels = image_hw[0] * image_hw[1]
        self.outcome: Outcome | None = None
        self.taken = self.searched = self.held = 0
        self.is_opening = False
        self._file = file
        self._config = config
        self._options = options
        self._scaled = scaled
        self._orientation = 1
        self._um_per_px: float | None = None
        self._levels: UInt8 | None = None
        self._described: Sequence[NDArray[np.float64]] = ()
        self._prepared: Prepared | None = None
        self._picture: UInt8 | None = None
        self._collector: Collector | None = None
        self._lock = threading.Lock()
        self._created = itertools.count(1)  # counting with it is atomic
        self._decoded: list[Interval] = []
        self._calls: list[Interval] = []
        self._searches: list[Interval] = []
        self._engine_s = 0.0
        self._probed = 0
        self.warnings: list[AnswerWarning] = []
        if probe is not None:
            self.warnings += probe.warnings
            self._decoded += probe._decoded
            self._calls += probe._calls
            self._searches += probe._searches
            self._engine_s, self._probed = probe._engine_s, probe.canvases

    def open(self, canvases: Sequence[Canvas] = ()) -> None:
        """Decodes the image.

        Args:
            canvases: What its canvases are padded to, see `prepare`.

        Raises:
            DecodeError: The image is refused.
        """
        started_s = time.monotonic()
        pixels, image_hw = self._decode()
        prepared = self._cut(pixels, image_hw, canvases)
        if len(prepared.tiles) > self.canvases:
            raise CorruptImage("the image is larger than its header says")
        self.canvases = len(prepared.tiles)
        self._picture = pixels if self._options.overlay or self._options.picture else None
        self._described = describe_exposures(pixels, self._config, self._levels)
        self._collector = Collector(
            prepared.image_hw,
            self.canvases,
            self._config.postprocess,
            score_threshold=self._options.score_threshold,
            max_instances=self._options.max_instances,
            overlaps=self._options.overlaps,
            calibration=self._config.calibration,
        )
        self._prepared = prepared
        self._decoded.append((started_s, time.monotonic()))

    def _decode(self) -> tuple[UInt8, HW | None]:
        """The pixels [H, W, 3], and the size of the image if they may be fewer."""
        data, image_hw = self._file.data, None
        if isinstance(data, bytes):
            image = open_image(data, max_pixels=self.pixels, choice=self._options.planes)
            image_hw, self._orientation = image.upright_hw, image.orientation
            self._um_per_px = image.um_per_px
            is_scaled = self._scaled and not (self._options.overlay or self._options.picture)
            needed = needed_hw(image_hw, self._config.input) if is_scaled else (0, 0)
            data, spec, self._levels = decode_for(image, self._config.input, needed)
            if spec is not self._config.input:
                self._config = self._config.model_copy(update={"input": spec})
        self._file = ImageFile(self._file.file_name, b"")
        return data, image_hw

    def _cut(self, pixels: UInt8, image_hw: HW | None, canvases: Sequence[Canvas]) -> Prepared:
        return prepare(pixels, self._config.input, image_hw=image_hw, canvases=canvases)

    def make_canvas(self, index: int) -> tuple[Tile, bool]:
        """Creates one canvas from the decoded pixels.

        Returns:
            The canvas, and whether the decoded pixels have been dropped because it was the last;
            they are kept for an overlay.
        """
        prepared = self._prepared
        if prepared is None:
            raise Dropped
        started_s = time.monotonic()
        tile = prepared.tiles[index]
        self._decoded.append((started_s, time.monotonic()))
        if next(self._created) < self.canvases:
            return tile, False
        self._prepared = Prepared(prepared.image_hw, ())
        return tile, self._picture is None

    def search(
        self, index: int, tile: Tile, candidates: TileCandidates, call: Interval, share: float
    ) -> None:
        """Post-processes one canvas; after the last one `finish` is due.

        Args:
            index: The canvas.
            tile: What `make_canvas` gave.
            candidates: What the engine found.
            call: When the engine call ran.
            share: Of the call, 0..1: one over the canvases in it.
        """
        collector = self._collector
        assert collector is not None
        started_s = time.monotonic()
        found = collector.search(tile, candidates)
        with self._lock:
            collector.add(index, found)
            self._calls.append(call)
            self._engine_s += (call[1] - call[0]) * share
            self._searches.append((started_s, time.monotonic()))

    def finish(self, began_s: float) -> Outcome:
        """Merges the canvases' instances and encodes the answer.

        Args:
            began_s: When the request arrived.
        """
        collector, prepared, options = self._collector, self._prepared, self._options
        if collector is None or prepared is None:
            raise Dropped
        started_s = time.monotonic()
        detections = collector.merge()
        self.warnings += check_domain(self._described, detections.confidence, self._config)
        merged_s = time.monotonic()
        if options.format is not None:
            payload = encode_page(
                self._file.file_name,
                prepared.image_hw,
                detections,
                self._config,
                options,
                um_per_px=self._um_per_px,
            )
        elif self._picture is not None and options.overlay:
            payload = encode_overlay(self._picture, detections.instances, self._config.task)
        else:
            payload = encode_entry(
                self._file.file_name,
                prepared.image_hw,
                self._orientation,
                detections,
                self._config,
                options,
                self.canvases,
                self.warnings,
                um_per_px=self._um_per_px,
                picture=self._picture,
            )
        ended_s = time.monotonic()
        stages = {
            "decode": self._decoded,
            "infer": sorted(set(self._calls)),
            "postprocess": [*self._searches, (started_s, merged_s)],
            "encode": [(merged_s, ended_s)],
        }
        self._collector = self._picture = None
        return Outcome(
            payload,
            attribute_time((began_s, ended_s), **stages),
            canvases=self.canvases + self._probed,
            engine_s=self._engine_s,
            instances=len(detections.instances),
            warnings=tuple(warning.code for warning in self.warnings),
            stages={**stages},
            whole=(began_s, ended_s),
        )

    def fail(self, error: Exception) -> Outcome:
        """The outcome of an image that failed."""
        return fail(self._file.file_name, error)

    def drop(self) -> None:
        """Frees the file and the decoded pixels; a thread that uses them keeps them until then."""
        self._file = ImageFile(self._file.file_name, b"")
        self._prepared = self._picture = None


def encode_entry(
    file_name: str | None,
    image_hw: HW,
    orientation: int,
    detections: Detections,
    config: ModelConfig,
    options: RequestOptions,
    canvases: int,
    warnings: Sequence[AnswerWarning] = (),
    *,
    um_per_px: float | None = None,
    picture: UInt8 | None = None,
) -> bytes:
    """An entry of `results` as JSON."""
    instances = detections.instances
    entry: dict[str, object] = {
        "file_name": file_name,
        "width": image_hw[1],
        "height": image_hw[0],
        "orientation": orientation,
        "scale": round(config.input.zoom, 4),
        "canvases": canvases,
        "instances_found": detections.found,
        "truncated": detections.found > len(instances),
        "warnings": [vars(warning) for warning in warnings],
        "instances": [instance_to_coco(i, config, masks=options.masks) for i in instances],
    }
    if um_per_px is not None:
        entry["um_per_px"] = um_per_px
    if picture is not None:
        entry["picture_png"] = base64.b64encode(encode_png(picture)).decode()
    if options.masks == "png":
        entry["index_png"] = base64.b64encode(encode_index_png(instances, image_hw)).decode()
    return orjson.dumps(entry, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_page(
    file_name: str | None,
    image_hw: HW,
    detections: Detections,
    config: ModelConfig,
    options: RequestOptions,
    *,
    um_per_px: float | None = None,
) -> bytes:
    """An image as the writer of the format gives it.

    Raises:
        InvalidParameter: The format cannot hold it.
    """
    assert options.format is not None
    page = Page(
        name=file_name or "image",
        image_hw=image_hw,
        instances=detections.instances,
        classes=config.classes,
        simplify_px=options.simplify_px,
        um_per_px=options.um_per_px or um_per_px,
    )
    try:
        return FORMATS[options.format].encode(page)
    except WriteError as error:
        raise InvalidParameter(f"format: {error}") from error


def encode_overlay(picture: UInt8, instances: Sequence[Detection], task: Task) -> bytes:
    """The image [H, W, 3] with its masks or contours drawn on it, as PNG."""
    return encode_png(draw_instances(picture, instances, task))


def fail(file_name: str | None, error: Exception) -> Outcome:
    """The outcome of an image that failed; an error that is to be logged keeps its frames."""
    _, detail = describe_error(error)
    if detail["code"] != "internal_error":
        drop_frames(error)
    return Outcome(orjson.dumps({"file_name": file_name, "error": detail}), error=error)
