"""DICOM files, as pydicom writes them."""

from __future__ import annotations

import io
from typing import Any

from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage


def build(pixels: NDArray[Any], *, frames: int | None = None, **elements: Any) -> Dataset:
    """A data set of pixels [H, W], [H, W, 3] or, with `frames`, of these behind each other."""
    shape = pixels.shape if frames is None else pixels.shape[1:]
    dataset = Dataset()
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = "1.2.3"
    dataset.PatientName = "Nobody"
    dataset.Rows, dataset.Columns = shape[:2]
    dataset.SamplesPerPixel = 3 if len(shape) == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if len(shape) == 3 else "MONOCHROME2"
    if len(shape) == 3:
        dataset.PlanarConfiguration = 0
    bits = 8 * pixels.dtype.itemsize
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    if frames is not None:
        dataset.NumberOfFrames = frames
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def save(dataset: Dataset, syntax: UID = ExplicitVRLittleEndian, *, rle: bool = False) -> bytes:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    if rle:
        dataset.compress(RLELossless, generate_instance_uid=False)
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()
