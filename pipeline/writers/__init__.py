"""Output formats: what was found in images, as the files of other programs."""

from __future__ import annotations

import importlib.util
from typing import Literal

from pipeline.errors import WriteError
from pipeline.writers import coco, cvat, geojson, labelme, labels, ome_zarr, table, yolo
from pipeline.writers.page import Classes, OutputFormat, Page, at_once, name_files

__all__ = [
    "FORMATS",
    "Classes",
    "FormatName",
    "OutputFormat",
    "Page",
    "choose_writer",
    "name_files",
]

FormatName = Literal[
    "coco",
    "coco-polygons",
    "geojson",
    "labels",
    "ome-tiff",
    "ome-zarr",
    "yolo",
    "labelme",
    "cvat",
    "csv",
]
_JSON = "application/json"
_ALL = (
    OutputFormat(
        name="coco",
        suffix=".coco.json",
        media_type=_JSON,
        write=at_once(coco.encode_rles),
        join=coco.join,
    ),
    OutputFormat(
        name="coco-polygons",
        suffix=".coco.json",
        media_type=_JSON,
        write=at_once(coco.encode_polygons),
        join=coco.join,
        has_outlines=True,
    ),
    OutputFormat(
        name="geojson",
        suffix=".geojson",
        media_type="application/geo+json",
        write=at_once(geojson.encode),
        has_outlines=True,
    ),
    OutputFormat(
        name="labels",
        suffix=".png",
        media_type="image/png",
        write=labels.write_png,
        folder="masks",
        add_files=labels.list_classes,
    ),
    OutputFormat(
        name="ome-tiff",
        suffix=".ome.tif",
        media_type="image/tiff",
        write=labels.write_ome_tiff,
        folder="masks",
        add_files=labels.list_classes,
        needs="tifffile",
    ),
    OutputFormat(
        name="ome-zarr",
        suffix=".ome.zarr.zip",
        media_type="application/zip",
        write=ome_zarr.write_ome_zarr,
        folder="masks",
    ),
    OutputFormat(
        name="yolo",
        suffix=".txt",
        media_type="text/plain",
        write=at_once(yolo.encode),
        folder="labels",
        add_files=yolo.describe,
        has_outlines=True,
    ),
    OutputFormat(
        name="labelme",
        suffix=".json",
        media_type=_JSON,
        write=at_once(labelme.encode),
        folder="images",
        has_outlines=True,
    ),
    OutputFormat(
        name="cvat",
        suffix=".xml",
        media_type="application/xml",
        write=at_once(cvat.encode),
        join=cvat.join,
        has_outlines=True,
    ),
    OutputFormat(
        name="csv",
        suffix=".csv",
        media_type="text/csv",
        write=at_once(table.encode),
        join=table.join,
    ),
)
FORMATS = {format.name: format for format in _ALL}


def choose_writer(name: str, simplify_px: float = 0.0) -> OutputFormat:
    """The format of a name.

    Raises:
        WriteError: It is not known, a package that it needs is missing, or it has no outlines to
            simplify.
    """
    if name not in FORMATS:
        raise WriteError(f"the format {name!r} is not one of {', '.join(FORMATS)}")
    chosen = FORMATS[name]
    if simplify_px and not chosen.has_outlines:
        raise WriteError(f"the format {name} has no outlines that could be simplified")
    if chosen.needs is not None and importlib.util.find_spec(chosen.needs) is None:
        raise WriteError(
            f"the format {name} needs the package {chosen.needs}, in the extra 'science' of "
            "solo-serve"
        )
    return chosen
