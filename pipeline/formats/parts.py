"""A plane that is stored in parts (strips, tiles, chunks): a region decodes those that it touches.

Symbols: H W plane, h w region, S samples of a pixel.
"""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ImageTooLarge
from pipeline.types import Window

P = TypeVar("P", bound="PartedPlane")
Samples = NDArray[Any]
"""[h, w, S] of any number type."""

BYTES_A_PIXEL, USUAL_PART_BYTES = 16, 1 << 26
"""A part takes at most so many bytes for each pixel of the plane, or so many at all."""
_CACHED_BYTES = 1 << 28
_OPEN_PLANES = 3


class PartedPlane(ABC):
    """A plane; any number of threads may read it.

    Parts are numbered row by row; those of further samples that are stored apart follow.

    Args:
        hw: H and W.
        packed: Samples of a pixel that a part holds together.
        dtype: Of the samples.
        part_hw: Height and width of a part.
        fill: Value of the samples of a part that the file leaves out.

    Attributes:
        height, width: H and W.
        dtype: Of the samples.
        grid: Rows and columns of parts.
    """

    def __init__(
        self,
        hw: tuple[int, int],
        packed: int,
        dtype: np.dtype[Any],
        part_hw: tuple[int, int],
        fill: Any = 0,
    ) -> None:
        self.height, self.width = hw
        self.dtype = dtype
        self.part_hw = part_hw
        self.grid = -(-self.height // part_hw[0]), -(-self.width // part_hw[1])
        self._packed = packed
        self._fill = fill
        self._cache: OrderedDict[int, Samples] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def read(self, region: Window, samples: Sequence[int]) -> Samples:
        """Decodes a region.

        Args:
            region: Inside the plane.
            samples: Which samples of a pixel are wanted.

        Returns:
            [h, w, len(samples)].

        Raises:
            DecodeError: A part is damaged or outside the file.
        """
        shape = region.height, region.width, len(samples)
        out = np.full(shape, self._fill, self.dtype) if self._fill else np.zeros(shape, self.dtype)
        is_whole = region == Window(0, 0, self.height, self.width)
        decode = self.decode_part if is_whole else self._decode_cached
        wanted: dict[int, list[tuple[int, int]]] = {}
        for place, sample in enumerate(samples):
            plane, inner = divmod(sample, self._packed)
            wanted.setdefault(plane, []).append((place, inner))
        for (row, column), plane in itertools.product(self._touched(region), wanted):
            part = decode((plane * self.grid[0] + row) * self.grid[1] + column)
            if part is not None:
                y, x = row * self.part_hw[0] - region.y, column * self.part_hw[1] - region.x
                for place, inner in wanted[plane]:
                    _paste(out[..., place], part[..., inner], y, x)
        return out

    @abstractmethod
    def decode_part(self, index: int) -> Samples | None:
        """[h, w, S of a part]; None if the file leaves it out.

        Raises:
            DecodeError: It is damaged or outside the file.
        """

    def _touched(self, region: Window) -> Iterator[tuple[int, int]]:
        """Rows and columns, in the grid of parts, of those that a region touches."""
        (ph, pw), (rows, columns) = self.part_hw, self.grid
        return itertools.product(
            range(region.y // ph, min(rows, -(-(region.y + region.height) // ph))),
            range(region.x // pw, min(columns, -(-(region.x + region.width) // pw))),
        )

    def _decode_cached(self, index: int) -> Samples | None:
        with self._lock:
            if index in self._cache:
                self._cache.move_to_end(index)
                return self._cache[index]
        part = self.decode_part(index)
        if part is None:
            return None
        with self._lock:
            if index not in self._cache:
                self._cache[index] = part
                self._cached_bytes += part.nbytes
            while self._cached_bytes > _CACHED_BYTES and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return part


class OpenPlanes(Generic[P]):
    """The planes that were used last, which keep parts that they have decoded.

    Args:
        open_plane: Opens a plane by its number.
    """

    def __init__(self, open_plane: Callable[[int], P]) -> None:
        self._open_plane = open_plane
        self._planes: OrderedDict[int, P] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, index: int) -> P:
        """A plane; raises what opening it raises."""
        with self._lock:
            if index not in self._planes:
                self._planes[index] = self._open_plane(index)
                if len(self._planes) > _OPEN_PLANES:
                    self._planes.popitem(last=False)
            return self._planes[index]


def check_part_bytes(needed: int, hw: tuple[int, int], what: str) -> None:
    """Bounds the memory of a part.

    Args:
        needed: Bytes of the part.
        hw: Height and width of the plane.
        what: Names the part and its file.

    Raises:
        ImageTooLarge: It is out of proportion.
    """
    bound = max(BYTES_A_PIXEL * hw[0] * hw[1], USUAL_PART_BYTES)
    if needed > bound:
        raise ImageTooLarge(f"{what} takes {needed} bytes, more than the {bound} allowed")


def _paste(out: Samples, part: Samples, y: int, x: int) -> None:
    """Copies what of a part at y, x (may be negative) lies inside [h, w]."""
    top, left = max(0, y), max(0, x)
    part = part[top - y : out.shape[0] - y, left - x : out.shape[1] - x]
    out[top : top + part.shape[0], left : left + part.shape[1]] = part
