"""OME-Zarr images, as the zarr library writes them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zarr
from numpy.typing import NDArray

TYPES = {"t": "time", "c": "channel"}


def describe_axes(axes: str) -> list[dict[str, str]]:
    return [
        {"name": name, "type": TYPES.get(name, "space")}
        | ({"unit": "micrometer"} if name in "yx" else {})
        for name in axes
    ]


def write(
    folder: Path,
    pixels: NDArray[Any],
    axes: str = "yx",
    *,
    version: str = "0.4",
    um_per_px: float = 0.5,
    attributes: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Writes an image of one level; `options` are those of `zarr.create_array`."""
    is_new = version == "0.5"
    group = zarr.open_group(str(folder), mode="w", zarr_format=3 if is_new else 2)
    array = group.create_array("0", shape=pixels.shape, dtype=pixels.dtype, **options)
    array[...] = pixels
    scale = [1.0] * (len(axes) - 2) + [um_per_px] * 2
    dataset = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}
    image = {"axes": describe_axes(axes), "datasets": [dataset]}
    described = {"multiscales": [image if is_new else {**image, "version": version}]}
    described |= dict(attributes or {})
    group.attrs.update({"ome": {"version": version, **described}} if is_new else described)
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    """The files of a Zarr by their paths."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pack(files: Mapping[str, bytes], kind: int = zipfile.ZIP_STORED, top: str = "") -> bytes:
    """A ZIP of files, below a folder."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", kind) as writer:
        for name, data in files.items():
            writer.writestr(top + name, data)
    return archive.getvalue()
