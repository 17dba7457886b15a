"""A model on images that are smaller, larger, noisy, blurred or dark: AP and F1 of each.

Smaller and larger images are also segmented with `object_size_px` and with `scale=auto`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import ROOT, Report, Row
from benchmarks.inputs import NUCLEI
from pipeline.decode import decode_image
from service.models.loaded import LoadedModel
from service.models.repository import load_version
from service.work.request import RequestOptions
from training.data.coco import CocoDataset
from training.data.validate import check_classes
from training.evaluation_report import ALL, evaluate_results
from training.predictors import EVALUATION_THRESHOLD, Result, predict, to_results

UInt8 = NDArray[np.uint8]
Scaling = Literal["own", "size", "auto"]
DATA = ROOT / "tests" / "data" / "nuclei"
COLUMNS = ("AP", "AP50", "F1_50", "recall_0_64", "count_ratio")
ZOOMS: Mapping[str, float] = {"half size": 0.5, "double size": 2.0}
NOISE = 12.0
"""Standard deviation, grey levels."""
BLUR_PX = 1.5
DIM = 0.25
"""Share of the brightness that is left."""


def _noise(image: UInt8, number: int) -> UInt8:
    noise = np.random.default_rng(number).normal(0, NOISE, image.shape)
    return (image + noise).round().clip(0, 255).astype(np.uint8)


def _blur(image: UInt8, number: int) -> UInt8:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), BLUR_PX), np.uint8)


def _dim(image: UInt8, number: int) -> UInt8:
    return (image * DIM).round().astype(np.uint8)


CHANGES: Mapping[str, Callable[[UInt8, int], UInt8]] = {
    "as they are": lambda image, number: image,
    f"noise, sigma {NOISE:g}": _noise,
    f"blur, sigma {BLUR_PX:g} px": _blur,
    f"{DIM:g} of the brightness": _dim,
}


def disturbed(
    *,
    model: Annotated[Path, "folder of the model"] = NUCLEI,
    version: Annotated[int | None, "of the model; default: the last"] = None,
    data: Annotated[Path, "folder of labelled images"] = DATA,
    split: Annotated[str, "of the data"] = "val",
    every: Annotated[int, "takes every n-th image"] = 1,
    every_large: Annotated[int, "the same for double size, which costs four times as much"] = 3,
    max_dets: Annotated[int, "instances of an image"] = 500,
    changes: Annotated[tuple[str, ...], "first words of those to run; default: all"] = (),
) -> Report:
    loaded = load_version(model, version)
    source = CocoDataset(data, split)
    check_classes(source.checked, loaded.config.classes, f"the model {model}")
    wanted = [n for n in (*CHANGES, *ZOOMS) if not changes or n.startswith(changes)]
    if not wanted:
        raise BenchmarkError(f"changes is {changes}, expected of {(*CHANGES, *ZOOMS)}")
    scalings: tuple[Scaling, ...] = ("own",)
    if loaded.config.card.object_size_px is not None:
        scalings = ("own", "size", "auto")
    rows: list[Row] = []
    for name in wanted:
        zoom = ZOOMS.get(name, 1.0)
        step = max(1, every_large if zoom > 1 else every)
        with tempfile.TemporaryDirectory() as scratch:
            changed = write_changed(source, Path(scratch), name, zoom, step)
            for scaling in scalings if zoom != 1 else ("own",):
                row = _measure(loaded, changed, scaling, zoom, max_dets)
                rows.append({"images": name, "number": len(changed), "scale": scaling, **row})
    return Report(data={"rows": rows}, tables={"": rows})


def write_changed(
    source: CocoDataset, folder: Path, name: str, zoom: float, step: int
) -> CocoDataset:
    """A data set of the changed images; objects that vanish are left out."""
    (folder / "images").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(0, len(source), step):
        record = source.records[index]
        picture = resize(decode_image(source.image_bytes(index)), zoom)
        if name in CHANGES:
            picture = CHANGES[name](picture, index)
        height, width = picture.shape[:2]
        file_name = f"{index}.png"
        Image.fromarray(picture).save(folder / "images" / file_name, compress_level=1)
        images.append({"id": index, "file_name": file_name, "height": height, "width": width})
        for item in record.annotations:
            mask = coco_mask.decode(item.rle).astype(np.float32)
            seen = np.asarray(resize(mask, zoom) >= 0.5, np.uint8)
            if not seen.any():
                continue
            rle = coco_mask.encode(np.asfortranarray(seen))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": source.classes[item.label].category_id,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                    "area": int(seen.sum()),
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": c.category_id, "name": c.name} for c in source.classes]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations").mkdir()
    (folder / "annotations" / "val.json").write_bytes(orjson.dumps(content))
    return CocoDataset(folder, "val")


def resize(values: NDArray[Any], zoom: float) -> NDArray[Any]:
    """An image, or a mask of 0 and 1, larger or smaller by a factor."""
    if zoom == 1:
        return values
    height, width = (max(1, round(side * zoom)) for side in values.shape[:2])
    rule = cv2.INTER_AREA if zoom < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(values, (width, height), interpolation=rule))


def _measure(
    loaded: LoadedModel, changed: CocoDataset, scaling: Scaling, zoom: float, max_dets: int
) -> Row:
    own = loaded.config.card.object_size_px
    asked = RequestOptions(
        score_threshold=EVALUATION_THRESHOLD,
        max_instances=max_dets,
        object_size_px=own * zoom if scaling == "size" and own is not None else None,
        scale="auto" if scaling == "auto" else "own",
    )

    def segment(body: bytes) -> list[Result]:
        answer = loaded.answer(decode_image(body), asked)
        return to_results(answer.instances, loaded.config.classes)

    report = evaluate_results(
        changed,
        predict(changed, segment),
        max_dets=max_dets,
        score_threshold=loaded.config.postprocess.score_threshold,
    )
    return {column: round(report.rows[ALL][column], 4) for column in COLUMNS}
