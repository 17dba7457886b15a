"""A TIFF, OME-TIFF, BigTIFF or ImageJ hyperstack as a stack of planes; tifffile parses it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeline.errors import CorruptImage, DecodeError, UnsupportedFormat
from pipeline.formats import ome, pixel_size
from pipeline.formats.parts import OpenPlanes
from pipeline.formats.planes import Stack
from pipeline.formats.tiff_guard import count_pages
from pipeline.formats.tiff_plane import TiffPlane

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage, TiffPageSeries

EXTRA = "science"
MAX_OME_CHARS = 1 << 24
_KINDS = ("ome", "imagej", "shaped", "svs", "ndpi", "uniform")
"""Of the dialects of TIFF that tifffile knows, those that are read as such."""
_PIXEL_AXES = "YXS"
_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_PHOTOMETRICS = (_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _YCBCR)


def is_tiff(data: bytes) -> bool:
    """Whether a file begins as a TIFF or BigTIFF."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class TiffStack:
    """The first series of pages of one size in a file.

    Args:
        file: The file; it stays open, and belongs to the stack.
        size: Its bytes.
        is_ndpi: Hamamatsu's dialect, whose links have 8 bytes; known by the file's suffix.

    Attributes:
        height, width: Of the planes.
        stack: Axes and channels.
        um_per_px: Size of a pixel, if it is stated.
        orientation: EXIF's, as the TIFF states it.
        is_inverted: 0 is white.
        palette: [3, N] uint16, or None.
        has_alpha: The sample after the colours is an alpha that was not multiplied in.

    Raises:
        DecodeError: The file is damaged, or of a kind that is not read.
    """

    def __init__(self, file: BinaryIO, size: int, *, is_ndpi: bool = False) -> None:
        count_pages(file, size, wide_links=is_ndpi)
        self._tiff = _open(file, is_ndpi)
        omexml = self._tiff.ome_metadata
        described = None
        if omexml is not None:
            if len(omexml) > MAX_OME_CHARS:
                raise CorruptImage(f"the OME-XML has more than {MAX_OME_CHARS} characters")
            described = ome.read_ome(omexml)
        self._series = _find_series(self._tiff)
        page = self._key = self._series.keyframe
        if int(page.photometric) not in _PHOTOMETRICS:
            name = getattr(page.photometric, "name", page.photometric)
            raise UnsupportedFormat(f"a TIFF with colours of kind {name} is not read")
        _, depth, self.height, self.width, _ = page.shaped
        samples = page.shaped[0] * page.shaped[4]
        if depth != 1:
            raise UnsupportedFormat(f"a TIFF with {depth} planes in one page is not read")
        axes = _find_axes(self._series)
        colours = int(page.photometric) in (_RGB, _YCBCR)
        self.stack = Stack(
            axes,
            samples,
            is_colour=(colours and samples >= 3) or (samples == 3 and "C" not in axes),
            channels=_name_channels(axes, samples, described, self._tiff),
        )
        self._pages = self._list_pages()
        self._planes = OpenPlanes(self._open_plane)
        self.um_per_px = self._read_um_per_px(described)
        orientation = page.tags.valueof(274, default=1)
        self.orientation = orientation if orientation in range(1, 9) else 1
        self.is_inverted = int(page.photometric) == _MINISWHITE
        self.palette = page.colormap if int(page.photometric) == _PALETTE else None
        self.has_alpha = 2 in page.extrasamples

    @property
    def bits(self) -> int:
        """Of a sample."""
        bits = self._key.bitspersample
        return int(bits) if isinstance(bits, int) else max(bits)

    def _list_pages(self) -> Sequence[Any]:
        pages = list(self._series.pages)
        if len(pages) not in (1, self.stack.planes):
            raise CorruptImage(
                f"the TIFF describes {self.stack.planes} planes, but has {len(pages)} pages of them"
            )
        return pages

    def _read_um_per_px(self, described: ome.OmeImage | None) -> float | None:
        if described is not None:
            return pixel_size.combine(*described.um_per_px)
        if self._tiff.is_svs:
            return pixel_size.read_aperio(self._key.description)
        return pixel_size.read_resolution(self._key, self._tiff.imagej_metadata)

    def plane(self, index: int) -> TiffPlane:
        """A plane; the last ones keep parts that they have decoded.

        Raises:
            DecodeError: It is missing, or cannot be read.
        """
        return self._planes.get(index)

    def _open_plane(self, index: int) -> TiffPlane:
        key: TiffPage = self._key
        if len(self._pages) == self.stack.planes:
            page = self._pages[index]
            if page is None:
                raise CorruptImage(f"the TIFF lacks plane {index}, which its description names")
            start = None
            if page is key and not key.is_tiled and _is_plain(key):
                start = key.dataoffsets[0]
            return TiffPlane(page, key, contiguous=start)
        start = self._series.dataoffset
        if start is None or not _is_plain(key):
            raise CorruptImage(
                f"the TIFF describes {self.stack.planes} planes, but has one page of them"
            )
        assert key.dtype is not None
        length = self.height * self.width * self.stack.samples * key.dtype.itemsize
        return TiffPlane(key, key, contiguous=start + index * length)


def _is_plain(page: TiffPage) -> bool:
    """Whether the page's pixels are stored as they are, row by row."""
    return bool(
        page.is_contiguous
        and int(page.tags.valueof(259, default=1)) == 1
        and page.shaped[0] == 1
        and int(page.fillorder) == 1
        and int(page.predictor) == 1
        and not page.is_subsampled
    )


def _open(file: BinaryIO, is_ndpi: bool) -> TiffFile:
    try:
        import imagecodecs  # noqa: F401 (tifffile reads less without it)
        import tifffile
    except ImportError as error:
        raise UnsupportedFormat(
            f"TIFF files are read only with the extra '{EXTRA}' of solo-serve ({error})"
        ) from error
    # Damaged files would fill the log.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
    others = {f"is_{kind}": False for kind in tifffile.TIFF.FILE_FLAGS if kind not in _KINDS}
    others["is_ndpi"] = is_ndpi
    file.seek(0)
    try:
        return tifffile.TiffFile(file, _multifile=False, **others)
    except Exception as error:  # of any kind
        raise CorruptImage(f"the TIFF is damaged: {error}") from error


def _find_series(tiff: TiffFile) -> TiffPageSeries:
    try:
        series = tiff.series[0]
        key = series.keyframe
        if key.dtype is not None and min(key.shaped) > 0:
            return series
    except DecodeError:
        raise
    except Exception as error:  # of any kind
        raise CorruptImage(f"the TIFF is damaged: {error}") from error
    if key.dtype is None:
        raise UnsupportedFormat(
            f"a TIFF with samples of {key.bitspersample} bits in format {int(key.sampleformat)} is "
            "not read"
        )
    raise CorruptImage(f"the TIFF is {key.imagewidth}x{key.imagelength} px by its header")


def _find_axes(series: TiffPageSeries) -> dict[str, int]:
    """The axes before height and width that are longer than 1, slowest first.

    An axis of unknown meaning, such as the pages of an ordinary TIFF, counts as Z.

    Raises:
        UnsupportedFormat: There are several such axes.
    """
    letters, lengths = series.get_axes(squeeze=False), series.get_shape(squeeze=False)
    found: dict[str, int] = {}
    for letter, length in zip(letters, lengths, strict=True):
        if letter in _PIXEL_AXES or length == 1:
            continue
        axis = letter if letter in "TZC" else "Z"
        if axis in found:
            raise UnsupportedFormat(f"a TIFF with the axes {letters} of {lengths} is not read")
        found[axis] = length
    return found


def _name_channels(
    axes: dict[str, int], samples: int, described: ome.OmeImage | None, tiff: TiffFile
) -> tuple[str, ...]:
    count = axes.get("C", 1) if "C" in axes or samples == 1 else samples
    names: Sequence[Any] = ()
    if described is not None:
        names = described.channels
    elif tiff.is_imagej and math.prod(axes.values()) == count:
        names = (tiff.imagej_metadata or {}).get("Labels") or ()
    return tuple(map(str, names)) if len(names) == count else ()
