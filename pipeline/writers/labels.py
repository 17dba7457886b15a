"""Label images: the value of a pixel is the number of its instance, from 1; 0 is background."""

from __future__ import annotations

import hashlib
import io
import uuid

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.encode import decode_box
from pipeline.errors import WriteError
from pipeline.overlaps import resolve_overlaps
from pipeline.writers.page import Classes, Page


def draw_labels(page: Page) -> NDArray[np.uint16] | NDArray[np.uint32]:
    """The label image [H, W] of the instances that `overlaps=resolve` leaves, in their order."""
    instances = resolve_overlaps(page.instances)
    kind = np.uint16 if len(instances) <= np.iinfo(np.uint16).max else np.uint32
    labels = np.zeros(page.image_hw, kind)
    for number, instance in enumerate(instances, 1):
        x, y, width, height = instance.bbox_xywh
        labels[y : y + height, x : x + width][decode_box(instance) > 0] = number
    return labels


def encode_png(page: Page) -> bytes:
    """A PNG of 16 bits.

    Raises:
        WriteError: There are too many instances for it.
    """
    labels = draw_labels(page)
    if labels.dtype != np.uint16:
        raise WriteError(
            f"{labels.max()} instances do not fit into a PNG of 16 bits; the format ome-tiff "
            "has 32 bits"
        )
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def encode_ome_tiff(page: Page) -> bytes:
    """An OME-TIFF of 16 bits, or of 32 for more than 65,535 instances.

    Raises:
        ImportError: tifffile is not installed.
    """
    import tifffile

    labels = draw_labels(page)
    # tifffile's own UUID has the time and the machine's address.
    content = uuid.uuid5(uuid.NAMESPACE_OID, hashlib.sha256(labels.tobytes()).hexdigest())
    metadata: dict[str, object] = {"axes": "YX", "UUID": f"urn:uuid:{content}"}
    if page.um_per_px is not None:
        metadata |= {f"PhysicalSize{axis}": page.um_per_px for axis in "XY"}
        metadata |= {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, labels, ome=True, compression="zlib", metadata=metadata)
    return buffer.getvalue()


def list_classes(classes: Classes) -> dict[str, bytes]:
    """The class of a data set with one."""
    return {"classes.txt": f"{classes[0].name}\n".encode()} if len(classes) == 1 else {}
