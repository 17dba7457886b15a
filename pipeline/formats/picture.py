"""One picture of the planes in a file, as RGB: a TIFF, DICOM, OME-Zarr or JPEG 2000 as an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ImageTooLarge, UnsupportedFormat
from pipeline.formats.base import EncodedImage
from pipeline.formats.convert import draw_on_black, stripes
from pipeline.formats.planes import ChosenPlanes, PlaneChoice, Stack, choose_planes
from pipeline.formats.stretch import find_limits, stretch, undo_stretch
from pipeline.model_config import ContrastSpec
from pipeline.types import UInt8, Window

MAX_PROJECTED_PIXELS = 1 << 28
"""Pixels of all planes of a maximum projection."""
_PALETTE_SCALE = 257
"""A TIFF's palette has 16 bits."""


class Plane(Protocol):
    """A plane; any number of threads may read it."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the samples."""

    def read(self, region: Window, samples: Sequence[int]) -> NDArray[Any]:
        """The samples [h, w, len(samples)] of a region; a `DecodeError` says what is wrong."""


class PlaneStack(Protocol):
    """A file that may have several planes of one size."""

    @property
    def height(self) -> int:
        """Of the planes."""

    @property
    def width(self) -> int:
        """Of the planes."""

    @property
    def stack(self) -> Stack:
        """Axes and channels."""

    @property
    def um_per_px(self) -> float | None:
        """Size of a pixel, if it is stated."""

    @property
    def orientation(self) -> int:
        """EXIF's."""

    @property
    def is_inverted(self) -> bool:
        """0 is white."""

    @property
    def palette(self) -> NDArray[Any] | None:
        """[3, N] uint16."""

    @property
    def has_alpha(self) -> bool:
        """The sample after the colours is an alpha that was not multiplied in."""

    @property
    def bits(self) -> int:
        """Of a sample that count."""

    def plane(self, index: int) -> Plane:
        """A plane; a `DecodeError` says why it cannot be read."""


@dataclass(frozen=True)
class PlanePicture(EncodedImage):
    """A picture of the planes in a file.

    Attributes:
        stack: The file.
        picture: The planes that are shown.
    """

    stack: PlaneStack = field(repr=False)
    picture: ChosenPlanes

    @property
    def is_deep(self) -> bool:
        """The samples have more than 8 bits, or are signed or floating-point numbers."""
        plane = self.stack.plane(self.picture.planes[0][0])
        return self.stack.palette is None and plane.dtype not in (np.uint8, np.bool_)

    def _decode(self, least_hw: tuple[int, int], contrast: ContrastSpec | None) -> UInt8:
        return self._decode_stretched(least_hw, contrast)[0]

    def _decode_stretched(
        self, least_hw: tuple[int, int], contrast: ContrastSpec | None
    ) -> tuple[UInt8, UInt8 | None]:
        samples = self.read(Window(0, 0, self.height, self.width))
        if not self.is_deep:
            return self.convert(samples, None), None
        limits = find_limits(samples, contrast)
        levels = undo_stretch(limits, samples.dtype)
        if self.stack.is_inverted:
            levels = 255 - levels[:, ::-1]
        return self.convert(samples, limits), levels

    def read(self, region: Window) -> NDArray[Any]:
        """The samples [h, w, S] of a region: grey, red green blue, or these with alpha."""
        samples = list(self.picture.samples)
        if len(samples) == 3 and self.stack.has_alpha and not self.is_deep:
            samples.append(3)
        if len(self.picture.planes) == 1:
            return self._project(self.picture.planes[0], samples, region)
        parts = [self._project(planes, samples[:1], region) for planes in self.picture.planes]
        return np.concatenate(parts, axis=2)

    def _project(
        self, planes: Sequence[int], samples: Sequence[int], region: Window
    ) -> NDArray[Any]:
        """The brightest values of some planes."""
        pixels = self.stack.plane(planes[0]).read(region, samples)
        for index in planes[1:]:
            np.fmax(pixels, self.stack.plane(index).read(region, samples), out=pixels)
        return pixels

    def convert(self, samples: NDArray[Any], limits: tuple[float, float] | None) -> UInt8:
        """Samples [h, w, S] as RGB.

        Args:
            samples: From `read`.
            limits: Of an image that `is_deep`, see `stretch`.
        """
        stack = self.stack
        if stack.palette is not None:
            return _look_up(samples[..., 0], stack.palette)
        if limits is not None:
            return _invert(stretch(samples, limits), stack.is_inverted)
        if samples.shape[2] == 4:
            return draw_on_black(samples)
        if stack.bits < 8:
            samples = np.asarray(samples * np.uint8(255 // (2**stack.bits - 1)), np.uint8)
        pixels = np.asarray(samples, np.uint8)
        return _invert(np.repeat(pixels, 3 // pixels.shape[2], axis=2), stack.is_inverted)


def _look_up(indices: NDArray[Any], palette: NDArray[Any]) -> UInt8:
    table = np.zeros((1 << 16, 3), np.uint8)
    table[: palette.shape[1]] = palette.T // _PALETTE_SCALE
    pixels = np.empty((*indices.shape, 3), np.uint8)
    for rows in stripes(*indices.shape):
        pixels[rows] = table[indices[rows].astype(np.uint16)]
    return pixels


def _invert(pixels: UInt8, is_inverted: bool) -> UInt8:
    return np.asarray(255 - pixels, np.uint8) if is_inverted else pixels


def open_picture(data: bytes, stack: PlaneStack, choice: PlaneChoice) -> PlanePicture:
    """The picture of a file that a choice selects.

    Args:
        data: The file; empty if the stack reads it by regions.
        stack: What is in it.
        choice: Selects the picture.

    Raises:
        PlaneError: The file has several planes and the choice does not select a picture.
        ImageTooLarge: A maximum projection reads too many pixels.
    """
    picture = choose_planes(stack.stack, choice)
    planes = sum(map(len, picture.planes))
    if max(map(len, picture.planes)) > 1 and (
        planes * stack.height * stack.width > MAX_PROJECTED_PIXELS
    ):
        raise ImageTooLarge(
            f"z=max reads {planes} planes of {stack.width}x{stack.height} px, more than the "
            f"{MAX_PROJECTED_PIXELS} px allowed"
        )
    if stack.palette is not None and stack.bits > 16:
        raise UnsupportedFormat(f"a TIFF with a palette and {stack.bits} bits is not read")
    return PlanePicture(
        data,
        stack.height,
        stack.width,
        stack.orientation,
        stack,
        picture,
        um_per_px=stack.um_per_px,
    )
