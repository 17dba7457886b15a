"""The steps of one image around the engine, each a plain function for a thread of a pool."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import orjson
from PIL import Image

from pipeline.decode import (
    check_size,
    decode_image,
    peek_pixels,
    read_image_hw,
    read_upright_hw,
)
from pipeline.draw import draw_instances
from pipeline.encode import encode_index_png, instance_to_coco
from pipeline.errors import DecodeError
from pipeline.merge import TileInstance
from pipeline.model_config import ModelConfig, Task
from pipeline.postprocess import TileCandidates, postprocess_tile
from pipeline.preprocess import needed_hw, prepare
from pipeline.types import Instance, Prepared, Tile, UInt8
from service.errors import describe_error
from service.http.schemas import Masks, Priority
from service.observe.timing import Interval
from service.work.tiles import merge_found

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a request asks for.

    Attributes:
        score_threshold: Least score; None takes the model's.
        max_instances: Most instances; None takes the model's.
        masks: How masks are written.
        overlay: The answer is a picture with the masks drawn on it.
        priority: Interactive work goes before batch work.
    """

    score_threshold: float | None = None
    max_instances: int | None = None
    masks: Masks = "rle"
    overlay: bool = False
    priority: Priority = "interactive"


@dataclass(frozen=True)
class Timed(Generic[T]):
    """A step's result and when it ran, on the monotonic clock."""

    result: T
    ran: Interval


def timed(step: Callable[[], T]) -> Timed[T]:
    """Runs a step and takes its time."""
    started_s = time.monotonic()
    result = step()
    return Timed(result, (started_s, time.monotonic()))


def peek(image: bytes | UInt8) -> int | None:
    """An image's pixels, if they can be told at once; see `peek_pixels`."""
    if isinstance(image, bytes):
        return peek_pixels(image)
    height, width = image.shape[:2]
    return int(height * width)


def count_pixels(images: Sequence[bytes | UInt8], max_pixels: int) -> list[int | DecodeError]:
    """Reads headers alone: each image's pixels, or why it is refused."""
    counts: list[int | DecodeError] = []
    for data in images:
        try:
            if isinstance(data, bytes):
                height, width = read_image_hw(data, max_pixels=max_pixels)
            else:
                height, width = data.shape[:2]
                check_size(height, width, max_pixels)
            counts.append(height * width)
        except DecodeError as error:
            counts.append(error)
    return counts


@dataclass(frozen=True)
class DecodedImage:
    """An image ready for the engine.

    Attributes:
        prepared: Its canvases.
        picture: [H, W, 3] uint8 RGB if it will be drawn on, else None.
    """

    prepared: Prepared
    picture: UInt8 | None


def decode(
    data: bytes | UInt8,
    config: ModelConfig,
    max_pixels: int,
    options: Options,
    *,
    scaled: bool = False,
) -> DecodedImage:
    """Stage `decode`: an image to canvases.

    Args:
        data: The image's file, or its pixels, [H, W, 3] uint8 RGB.
        config: The model's.
        max_pixels: Bound on width x height.
        options: A picture that is drawn on is always decoded as it is.
        scaled: A JPEG may be decoded no larger than the model needs it.

    Raises:
        DecodeError: The image is refused.
    """
    if options.overlay or not scaled or not isinstance(data, bytes):
        picture = decode_image(data, max_pixels=max_pixels) if isinstance(data, bytes) else data
        return DecodedImage(prepare(picture, config.input), picture if options.overlay else None)
    image_hw = read_upright_hw(data, max_pixels=max_pixels)
    least_hw = needed_hw(image_hw, config.input)
    pixels = decode_image(data, max_pixels=max_pixels, least_hw=least_hw)
    return DecodedImage(prepare(pixels, config.input, image_hw=image_hw), None)


def find_in_tile(
    tile: Tile,
    candidates: TileCandidates,
    image_hw: tuple[int, int],
    config: ModelConfig,
    options: Options,
) -> list[TileInstance]:
    """Stage `postprocess`, the greater part: one tile's candidates to its instances."""
    return postprocess_tile(
        tile,
        candidates,
        image_hw,
        config.postprocess,
        score_threshold=options.score_threshold,
        max_instances=options.max_instances,
    )


@dataclass(frozen=True)
class Finished:
    """An image's answer.

    Attributes:
        payload: Its entry of `results` as JSON, or a PNG.
        instances: How many were found.
        merged: When its tiles were merged (stage `postprocess`).
        encoded: When the payload was written (stage `encode`).
    """

    payload: bytes
    instances: int
    merged: Interval
    encoded: Interval


def finish(
    file_name: str | None,
    image: DecodedImage,
    found: Sequence[Sequence[TileInstance]],
    config: ModelConfig,
    options: Options,
) -> Finished:
    """The rest of stage `postprocess`, and stage `encode`: the bytes of the answer."""
    merged = timed(partial(merge_found, found, config.postprocess, options.max_instances))
    if image.picture is None:
        step = partial(
            encode_entry, file_name, image.prepared.image_hw, merged.result, config, options.masks
        )
    else:
        step = partial(encode_overlay, image.picture, merged.result, config.task)
    encoded = timed(step)
    return Finished(encoded.result, len(merged.result), merged.ran, encoded.ran)


class TiledImage:
    """An image whose tiles are searched in several threads; who is last writes the answer.

    So nobody need be woken to write it.

    Args:
        file_name: In its answer.
        image: Its canvases.
        config: The model's.
        options: The request's.

    Attributes:
        tiles: Its canvases.
        searched: When each of them was, in the order of their ends.
        answer: None until the last one was.
    """

    def __init__(
        self, file_name: str | None, image: DecodedImage, config: ModelConfig, options: Options
    ) -> None:
        self.tiles = image.prepared.tiles
        self.searched: list[Interval] = []
        self.answer: Finished | None = None
        self._file_name = file_name
        self._image = image
        self._config = config
        self._options = options
        self._found: list[list[TileInstance]] = [[] for _ in self.tiles]
        self._lock = threading.Lock()

    def search(self, index: int, candidates: TileCandidates) -> bool:
        """Finds one tile's instances; to be called once for each tile, in any order.

        Returns:
            Whether it was the last one: then the answer is there.
        """
        image_hw, options = self._image.prepared.image_hw, self._options
        found = timed(
            partial(find_in_tile, self.tiles[index], candidates, image_hw, self._config, options)
        )
        self._found[index] = found.result
        with self._lock:
            self.searched.append(found.ran)
            is_last = len(self.searched) == len(self.tiles)
        if is_last:
            self.answer = finish(self._file_name, self._image, self._found, self._config, options)
        return is_last


def encode_entry(
    file_name: str | None,
    image_hw: tuple[int, int],
    instances: Sequence[Instance],
    config: ModelConfig,
    masks: Masks,
) -> bytes:
    """An entry of `results` as JSON."""
    entry: dict[str, object] = {
        "file_name": file_name,
        "width": image_hw[1],
        "height": image_hw[0],
        "instances": [instance_to_coco(i, config, masks=masks) for i in instances],
    }
    if masks == "png":
        entry["index_png"] = base64.b64encode(encode_index_png(instances, image_hw)).decode()
    return orjson.dumps(entry, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_error(file_name: str | None, error: Exception) -> bytes:
    """An entry of `results` for an image that failed, as JSON."""
    return orjson.dumps({"file_name": file_name, "error": describe_error(error)[1]})


def encode_overlay(picture: UInt8, instances: Sequence[Instance], task: Task) -> bytes:
    """The picture with its masks or contours drawn on it, as PNG."""
    buffer = io.BytesIO()
    drawn = draw_instances(picture, instances, task)
    Image.fromarray(drawn).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
