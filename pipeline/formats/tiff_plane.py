"""One plane of a TIFF, read by regions: only the strips or tiles that a region touches are decoded.

Symbols: H W plane, h w region, S samples of a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pipeline.errors import CorruptImage, DecodeError, UnsupportedFormat
from pipeline.formats import jpeg, jpeg2000, libtiff
from pipeline.formats.parts import PartedPlane, Samples, check_part_bytes
from pipeline.types import Window

if TYPE_CHECKING:
    from tifffile import TiffFrame, TiffPage

_JPEG = 7
_COMPRESSIONS = {1: "none", 5: "LZW", _JPEG: "JPEG", 8: "Deflate", 32946: "Deflate"} | {
    32773: "PackBits",
    34925: "LZMA",
    50000: "Zstandard",
    33003: "JPEG 2000",
    33005: "JPEG 2000",
    34712: "JPEG 2000",
}
"""Codes of the compressions that are read: decoders that are told how large a result may be."""
_JPEG_2000 = (33003, 33005, 34712)
_JPEG_2000_YCBCR = 33003
"""Aperio's, whose codestreams do not say that their colours are luma and chroma."""
_MAX_SAMPLES = 1024


class TiffPlane(PartedPlane):
    """A plane of a series of pages; any number of threads may read it.

    Args:
        page: The page.
        keyframe: The page that describes it; the same one, or the first of its series.
        contiguous: Where the plane begins, if it has no page of its own and is not compressed.

    Attributes:
        height, width, samples: H, W and S.
        dtype: Of the samples.

    Raises:
        UnsupportedFormat: Samples or compression are of a kind that is not read.
        ImageTooLarge: One strip or tile would need too much memory.
        CorruptImage: The page's fields contradict each other.
    """

    def __init__(
        self,
        page: TiffPage | TiffFrame,
        keyframe: TiffPage,
        *,
        contiguous: int | None = None,
    ) -> None:
        self._page, self._keyframe = page, keyframe
        separate, depth, height, width, packed = keyframe.shaped
        self.samples = separate * packed
        self._compression = int(keyframe.tags.valueof(259, default=1))
        self._check_kind(depth)
        if self._compression in (libtiff.LZW, libtiff.PACKBITS):
            keyframe.compression = 1  # tifffile is given what is decompressed here
        assert keyframe.dtype is not None
        super().__init__((height, width), packed, keyframe.dtype, self._find_part_hw())
        if contiguous is None:
            needed = math.prod(self.part_hw) * packed * self.dtype.itemsize
            check_part_bytes(needed, (height, width), "a strip or tile of the TIFF")
        self._file = keyframe.parent.filehandle
        self._contiguous = contiguous

    def _check_kind(self, depth: int) -> None:
        page = self._keyframe
        if page.dtype is None or page.dtype.kind not in "buif" or page.dtype.itemsize > 8:
            raise UnsupportedFormat(
                f"a TIFF with samples of {page.bitspersample} bits in format "
                f"{int(page.sampleformat)} ({page.dtype}) is not read"
            )
        if depth != 1 or self.samples > _MAX_SAMPLES:
            raise UnsupportedFormat(
                f"a TIFF with {depth} planes and {self.samples} samples in one page is not read"
            )
        if self._compression in (libtiff.LZW, libtiff.PACKBITS) and int(page.fillorder) != 1:
            raise UnsupportedFormat("a TIFF with LZW or PackBits in reversed bits is not read")
        if self._compression not in _COMPRESSIONS:
            known = ", ".join(dict.fromkeys(_COMPRESSIONS.values()))
            name = getattr(page.compression, "name", page.compression)
            raise UnsupportedFormat(f"a TIFF with compression {name} is not read; {known} are")
        if page.is_subsampled and self._compression not in (_JPEG, *_JPEG_2000):
            raise UnsupportedFormat("a TIFF with subsampled colour outside JPEG is not read")

    def _find_part_hw(self) -> tuple[int, int]:
        """Height and width of a tile or strip."""
        page = self._keyframe
        if page.is_tiled:
            part_hw, depth = (page.tilelength, page.tilewidth), page.tiledepth
        else:
            part_hw, depth = (page.rowsperstrip, page.imagewidth), 1
        if depth != 1 or not all(isinstance(side, int) and side > 0 for side in part_hw):
            raise CorruptImage(f"the TIFF has tiles or strips of {part_hw} px (height, width)")
        return part_hw

    def read(self, region: Window, samples: Sequence[int]) -> Samples:
        """Decodes a region.

        Args:
            region: Inside the plane.
            samples: Which samples of a pixel are wanted.

        Returns:
            [h, w, len(samples)]; parts that the file leaves out are 0.

        Raises:
            DecodeError: A strip or tile is damaged or outside the file.
        """
        if self._contiguous is not None:
            return self._read_rows(self._contiguous, region, samples)
        return super().read(region, samples)

    def decode_part(self, index: int) -> Samples | None:
        """As `PartedPlane.decode_part`."""
        page, keyframe = self._page, self._keyframe
        if index >= min(len(page.dataoffsets), len(page.databytecounts)):
            raise CorruptImage(
                f"the TIFF has no strip or tile {index}, only {len(page.dataoffsets)}"
            )
        offset, length = page.dataoffsets[index], page.databytecounts[index]
        if not length:
            return None
        data = self._read_bytes(offset, length, f"strip or tile {index}")
        if self._compression in _JPEG_2000:
            return self._decode_jpeg2000(data)
        if self._compression == _JPEG:
            self._check_jpeg(data)
        # tifffile and its codecs raise what they like on damaged data.
        try:
            if self._compression in (libtiff.LZW, libtiff.PACKBITS):
                data = libtiff.decompress(data, self._compression, self._count_bytes(index))
            decoded, _, shape = keyframe.decode(
                data, index, jpegtables=keyframe.jpegtables, jpegheader=keyframe.jpegheader
            )
        except (DecodeError, MemoryError):
            raise
        except Exception as error:
            raise CorruptImage(f"strip or tile {index} of the TIFF is damaged: {error}") from error
        return None if decoded is None else np.asarray(decoded).reshape(-1, *shape[2:])

    def _count_bytes(self, index: int) -> int:
        """Of a strip or tile that is not compressed."""
        (rows, width), keyframe = self.part_hw, self._keyframe
        if not keyframe.is_tiled:
            rows = min(rows, self.height - index % self.grid[0] * rows)
        stated = keyframe.bitspersample
        bits = stated if isinstance(stated, int) else max(stated)
        return int(rows * -(-width * self._packed * bits // 8))

    def _read_bytes(self, offset: int, length: int, what: str) -> bytes:
        size = self._file.size
        if offset + length > size:
            raise CorruptImage(
                f"{what} of the TIFF is outside the file: {length} bytes at {offset} of {size}"
            )
        with self._file.lock:
            self._file.seek(offset)
            data: bytes = self._file.read(length)
        return data

    def _check_jpeg(self, data: bytes) -> None:
        """The decoder allocates memory for the size inside, not for that of the strip or tile."""
        height, width = jpeg.read_hw(data)
        if height > self.part_hw[0] or width > self.part_hw[1]:
            raise CorruptImage(
                f"a JPEG of {width}x{height} px is in a strip or tile of "
                f"{self.part_hw[1]}x{self.part_hw[0]} px"
            )

    def _decode_jpeg2000(self, data: bytes) -> Samples:
        found = jpeg2000.read_jp2(data).codestream
        kind = found.height, found.width, found.components, found.dtype
        hw, expected = self.part_hw, (self._packed, self.dtype.newbyteorder("="))
        if kind[0] > hw[0] or kind[1] > hw[1] or kind[2:] != expected:
            raise CorruptImage(
                f"a JPEG 2000 of {found.width}x{found.height} px with {found.components} samples "
                f"of type {found.dtype} is in a strip or tile of {hw[1]}x{hw[0]} px with "
                f"{expected[0]} of type {expected[1]}"
            )
        pixels = jpeg2000.decode(data, found)
        if self._compression == _JPEG_2000_YCBCR and pixels.shape[2] == 3:
            return np.asarray(cv2.cvtColor(pixels[..., [0, 2, 1]], cv2.COLOR_YCrCb2RGB))
        return pixels

    def _read_rows(self, start: int, region: Window, samples: Sequence[int]) -> Samples:
        """A region of a plane that is stored as plain rows."""
        dtype = self.dtype.newbyteorder(self._keyframe.parent.byteorder)
        pixel_bytes = self.samples * dtype.itemsize
        row_bytes, used_bytes = self.width * pixel_bytes, region.width * pixel_bytes
        first = start + region.y * row_bytes + region.x * pixel_bytes
        last = first + (region.height - 1) * row_bytes
        data = b"".join(
            self._read_bytes(position, used_bytes, "a plane")
            for position in range(first, last + 1, row_bytes)
        )
        rows = np.frombuffer(data, dtype).reshape(region.height, region.width, self.samples)
        return np.ascontiguousarray(rows[..., list(samples)].astype(self.dtype))
