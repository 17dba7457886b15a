"""Masks of one size of which only the pixels around each object are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, SupportsIndex, TypeVar, overload

import cv2
import numpy as np
from numpy.typing import NDArray

Pixel = TypeVar("Pixel", np.uint8, np.float32)


class CroppedMasks(Sequence[NDArray[Pixel]], Generic[Pixel]):
    """Masks of one size, of which only the pixels in their boxes are kept.

    `numpy.asarray` gives all of them as one array [N, H, W].

    Args:
        hw: Height and width of the masks, px.
        dtype: Type of the pixels.
    """

    def __init__(self, hw: tuple[int, int], dtype: type[Pixel]) -> None:
        self.hw = hw
        self.dtype: np.dtype[Pixel] = np.dtype(dtype)
        self._crops: list[tuple[int, int, NDArray[Pixel]]] = []

    def append(
        self, mask: NDArray[Pixel], top: int = 0, left: int = 0
    ) -> tuple[int, int, int, int]:
        """Adds a mask; returns its box x, y, width, height, all 0 if it has no pixel.

        Args:
            mask: [h, w], a whole mask or a part outside which the mask is 0.
            top: Row of the part's first pixel.
            left: Column of the part's first pixel.
        """
        x, y, width, height = cv2.boundingRect((mask != 0).view(np.uint8))
        pixels = mask[y : y + height, x : x + width].copy()
        if not width:
            top = left = 0
        self._crops.append((top + y, left + x, pixels))
        return left + x, top + y, width, height

    def crop(self, index: SupportsIndex) -> tuple[int, int, NDArray[Pixel]]:
        """Top, left and pixels of the part that is kept; no pixels if the mask is empty."""
        return self._crops[index]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number, height and width of the masks."""
        return len(self), *self.hw

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels that are kept."""
        return sum(pixels.nbytes for _, _, pixels in self._crops)

    def __len__(self) -> int:
        return len(self._crops)

    @overload
    def __getitem__(self, index: SupportsIndex) -> NDArray[Pixel]: ...

    @overload
    def __getitem__(self, index: slice) -> list[NDArray[Pixel]]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> NDArray[Pixel] | list[NDArray[Pixel]]:
        """A whole mask [H, W], made anew each time."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        mask: NDArray[Pixel] = np.zeros(self.hw, self.dtype)
        self._fill(mask, index)
        return mask

    def __array__(
        self, dtype: np.dtype[Any] | None = None, copy: bool | None = None
    ) -> NDArray[Any]:
        """All masks, [N, H, W].

        Raises:
            ValueError: No copy is wanted.
        """
        if copy is False:
            raise ValueError("cropped masks become an array only by a copy")
        masks: NDArray[Pixel] = np.zeros(self.shape, self.dtype)
        for index, mask in enumerate(masks):
            self._fill(mask, index)
        return masks if dtype is None else masks.astype(dtype, copy=False)

    def _fill(self, mask: NDArray[Pixel], index: SupportsIndex) -> None:
        top, left, pixels = self._crops[index]
        mask[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels


def crop_masks(masks: NDArray[np.uint8]) -> CroppedMasks[np.uint8]:
    """Masks [N, H, W] without the pixels around them."""
    cropped = CroppedMasks((masks.shape[1], masks.shape[2]), np.uint8)
    for mask in masks:
        cropped.append(mask)
    return cropped
