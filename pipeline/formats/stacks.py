"""Which of the formats with several planes a file has, by its first bytes."""

from __future__ import annotations

from typing import BinaryIO

from pipeline.formats.dicom import DicomStack, is_dicom
from pipeline.formats.picture import PlaneStack
from pipeline.formats.tiff_file import TiffStack, is_tiff
from pipeline.formats.zarr_stack import ZarrStack
from pipeline.formats.zarr_zip import ZipFiles, is_zip

START_BYTES = 132
"""Of a file, which tell its format."""


def is_stack(start: bytes) -> bool:
    """Whether a file that begins so may have several planes."""
    return is_tiff(start) or is_dicom(start) or is_zip(start)


def open_stack(file: BinaryIO, size: int, *, is_ndpi: bool = False) -> PlaneStack | None:
    """The planes of a file; None if it is of another format.

    Args:
        file: Stays open, and belongs to the result, which reads what is asked of it.
        size: Its bytes.
        is_ndpi: Hamamatsu's dialect of TIFF.

    Raises:
        DecodeError: The file is damaged, or of a kind that is not read.
    """
    file.seek(0)
    start = file.read(START_BYTES)
    if is_dicom(start):  # its preamble may be the start of a TIFF
        return DicomStack(file, size)
    if is_tiff(start):
        return TiffStack(file, size, is_ndpi=is_ndpi)
    return ZarrStack(ZipFiles(file)) if is_zip(start) else None
