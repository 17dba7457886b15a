"""DICOM files, as pydicom writes them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    RLELossless,
    SecondaryCaptureImageStorage,
    VLWholeSlideMicroscopyImageStorage,
)


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


def build_slide(
    pixels: NDArray[Any], tile_hw: tuple[int, int], um_per_px: float = 0.5, **elements: Any
) -> Dataset:
    """A slide [H, W] or [H, W, 3] in tiles, complete and in the order of rows."""
    height, width = tile_hw
    rest = [(0, -side % part) for side, part in zip(pixels.shape, tile_hw, strict=False)]
    padded = np.pad(pixels, [*rest, *[(0, 0)] * (pixels.ndim - 2)])
    tiles = [
        padded[y : y + height, x : x + width]
        for y in range(0, padded.shape[0], height)
        for x in range(0, padded.shape[1], width)
    ]
    measures, groups = Dataset(), Dataset()
    measures.PixelSpacing = [um_per_px / 1000] * 2
    groups.PixelMeasuresSequence = Sequence([measures])
    described = {
        "SOPClassUID": VLWholeSlideMicroscopyImageStorage,
        "TotalPixelMatrixRows": pixels.shape[0],
        "TotalPixelMatrixColumns": pixels.shape[1],
        "DimensionOrganizationType": "TILED_FULL",
        "NumberOfOpticalPaths": 1,
        "TotalPixelMatrixFocalPlanes": 1,
        "SharedFunctionalGroupsSequence": Sequence([groups]),
    }
    return build(np.stack(tiles), frames=len(tiles), **{**described, **elements})


def save_encoded(
    dataset: Dataset, encode: Callable[[NDArray[Any]], bytes], syntax: UID, photometric: str
) -> bytes:
    """The file with each frame encoded."""
    shape = (dataset.Rows, dataset.Columns, 3)[: 3 if dataset.SamplesPerPixel == 3 else 2]
    dtype = np.dtype(f"{'i' if dataset.PixelRepresentation else 'u'}{dataset.BitsAllocated // 8}")
    pixels = np.frombuffer(dataset.PixelData, dtype).reshape(-1, *shape)
    dataset.PixelData = encapsulate([encode(frame) for frame in pixels])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.PhotometricInterpretation = photometric
    return save(dataset, syntax)


def save(dataset: Dataset, syntax: UID = ExplicitVRLittleEndian, *, rle: bool = False) -> bytes:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    if rle:
        dataset.compress(RLELossless, generate_instance_uid=False)
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()
