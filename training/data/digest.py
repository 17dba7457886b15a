"""Identity of a data set, so that results are not taken for those of other data."""

from __future__ import annotations

import hashlib

from training.data.coco import CocoDataset
from training.data.records import Annotation


def data_digest(data: CocoDataset) -> str:
    """SHA-256 of classes and objects, and of the images' names and sizes in bytes, not pixels.

    Raises:
        OSError: A file is missing.
    """
    digest = hashlib.sha256(repr([(c.category_id, c.name) for c in data.classes]).encode())
    for record in data.records:
        size = (data.image_folder / record.file_name).stat().st_size
        digest.update(f"\0{record.image_id}\0{record.file_name}\0{size}".encode())
        for kind in (record.objects, record.crowds):
            digest.update(b"\1")
            for item in kind:
                digest.update(f"\0{item.label}\0{item.area}\0".encode())
                if isinstance(item, Annotation):
                    digest.update(repr(item.rle).encode())
                else:
                    for polygon in item.polygons:
                        digest.update(polygon.tobytes() + b"\2")
    return digest.hexdigest()
