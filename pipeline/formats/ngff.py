"""OME-Zarr (NGFF 0.4 and 0.5): what the metadata of a group say of the image in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import CorruptImage, UnsupportedFormat
from pipeline.formats.pixel_size import combine
from pipeline.formats.zarr_zip import ZarrFiles
from pipeline.strict_json import parse_json

MAX_JSON_BYTES = 1 << 24
_WHOLE = slice(None)
_LAYOUT = "bioformats2raw.layout"
"""An attribute of a group whose images are in groups 0, 1, ..."""
_UM = {"picometer": 1e-6, "angstrom": 1e-4, "nanometer": 1e-3, "micrometer": 1.0}
_UM |= {"millimeter": 1e3, "centimeter": 1e4, "meter": 1e6, "inch": 25400.0}
_AXIS_OF_TYPE = {"time": "T", "channel": "C"}
_PART = re.compile(r"[^/\\\0]+")


@dataclass(frozen=True)
class NgffImage:
    """An image.

    Attributes:
        path: Of the array of full size, in the Zarr.
        axes: A letter for each of its axes, in order; the last two are YX.
        um_per_px: Size of a pixel, if it is stated.
        channels: Names of the channels; empty if there are none.
    """

    path: str
    axes: str
    um_per_px: float | None
    channels: Sequence[str]


def read_json(files: ZarrFiles, key: str) -> dict[str, Any] | None:
    """An object of JSON in a Zarr; None if there is no such file.

    Raises:
        CorruptImage: It is none.
    """
    data = files.read(key, _WHOLE, MAX_JSON_BYTES)
    if data is None:
        return None
    try:
        content = parse_json(data)
    except ValueError as error:
        raise CorruptImage(f"{key} of the Zarr is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CorruptImage(f"{key} of the Zarr is damaged: it is no JSON object")
    return content


def read_ngff(files: ZarrFiles) -> NgffImage:
    """The first image of a Zarr.

    Raises:
        CorruptImage: The metadata are damaged.
        UnsupportedFormat: There is no image, or one of a kind that is not read.
    """
    attributes, folder = _read_attributes(files, ""), ""
    if _LAYOUT in attributes:
        attributes, folder = _read_attributes(files, "0/"), "0/"
    for kind in ("plate", "well"):
        if kind in attributes:
            raise UnsupportedFormat(
                f"an OME-Zarr {kind} is not read, but the images in it are: they are its subfolders"
            )
    multiscales = attributes.get("multiscales")
    if multiscales is None:
        raise UnsupportedFormat("a Zarr without an OME-Zarr image (multiscales) is not read")
    try:
        return _read_image(multiscales[0], attributes, folder)
    except (TypeError, LookupError, ValueError, OverflowError, AttributeError) as error:
        if isinstance(error, (CorruptImage, UnsupportedFormat)):
            raise
        raise CorruptImage(f"the metadata of the OME-Zarr are damaged: {error!r}") from error


def _read_attributes(files: ZarrFiles, folder: str) -> Mapping[str, Any]:
    """Of a group, in either version of Zarr."""
    group = read_json(files, f"{folder}zarr.json")
    if group is None:
        return read_json(files, f"{folder}.zattrs") or {}
    attributes = group.get("attributes")
    if not isinstance(attributes, dict):
        return {}
    described = attributes.get("ome", attributes)
    return described if isinstance(described, dict) else {}


def _read_image(image: Any, attributes: Mapping[str, Any], folder: str) -> NgffImage:
    if "axes" not in image or any(isinstance(axis, str) for axis in image["axes"]):
        raise UnsupportedFormat(
            f"an OME-Zarr of version {image.get('version')!r} is not read; 0.4 and 0.5 are"
        )
    first = image["datasets"][0]
    parts = str(first["path"]).split("/")
    if any(part in (".", "..") or not _PART.fullmatch(part) for part in parts):
        raise CorruptImage(f"the OME-Zarr has its array at {first['path']!r}, not below its folder")
    axes = image["axes"]
    channels = [
        str(channel.get("label", "")) for channel in attributes.get("omero", {}).get("channels", ())
    ]
    return NgffImage(
        path=folder + "/".join(parts),
        axes=_name_axes(axes),
        um_per_px=_read_um_per_px(image, first, axes),
        channels=channels if all(channels) else (),
    )


def _name_axes(axes: Sequence[Mapping[str, Any]]) -> str:
    """A letter for each axis: T, C, and the last three in space as Z, Y, X.

    Raises:
        UnsupportedFormat: They are others, or in another order.
    """
    names = [str(axis.get("name", "")) for axis in axes]
    others = [
        _AXIS_OF_TYPE.get(str(axis.get("type")), name.upper())
        for axis, name in zip(axes, names, strict=True)
        if axis.get("type") != "space"
    ]
    in_space = len(axes) - len(others)
    letters = "".join(others) + "ZYX"[-in_space:]
    is_ordered = all(axis.get("type") == "space" for axis in axes[len(others) :])
    is_known = in_space in (2, 3) and set(others) <= {"T", "C"}
    if not is_ordered or not is_known or len(set(letters)) < len(letters):
        raise UnsupportedFormat(f"an OME-Zarr with the axes {', '.join(names)} is not read")
    return letters


def _read_um_per_px(
    image: Mapping[str, Any], dataset: Mapping[str, Any], axes: Sequence[Mapping[str, Any]]
) -> float | None:
    """By the units of y and x and the scales of the first array and of the whole."""
    sides = [_UM.get(str(axis.get("unit"))) for axis in axes[-2:]]
    for source in (image, dataset):
        for transformation in source.get("coordinateTransformations") or ():
            if transformation.get("type") == "scale":
                scale = [float(number) for number in transformation["scale"]]
                if len(scale) != len(axes):
                    raise CorruptImage(
                        f"the OME-Zarr has {len(axes)} axes, but scales of {len(scale)}"
                    )
                sides = [
                    side and side * factor for side, factor in zip(sides, scale[-2:], strict=True)
                ]
    y_um, x_um = sides
    return combine(x_um, y_um)
