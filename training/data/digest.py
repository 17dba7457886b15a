"""Identity of a data set, so that results are not taken for those of other data."""

from __future__ import annotations

import hashlib

from training.data.coco import CocoDataset


def data_digest(data: CocoDataset) -> str:
    """SHA-256 of the annotation file and of the names and sizes of the images, not their pixels.

    Raises:
        OSError: A file is missing.
    """
    with data.annotation_file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    for record in data.records:
        size = (data.image_folder / record.file_name).stat().st_size
        digest.update(f"\0{record.file_name}\0{size}".encode())
    return digest.hexdigest()
