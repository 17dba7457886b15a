"""A model's F1, AJI and counts beside Otsu's threshold with a watershed, on labelled images.

The baseline knows one class and no scores, so there is no AP of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from benchmarks.harness.report import ROOT, Report, Row
from benchmarks.inputs import NUCLEI
from pipeline.decode import decode_image
from training.data.coco import CocoDataset
from training.data.validate import check_classes
from training.evaluation_report import EvaluationReport, evaluate_results, group_images
from training.predictors import RepositoryPredictor, predict

DATA = ROOT / "tests" / "data" / "nuclei"
COLUMNS = ("F1_50", "F1_70", "DSB_50", "AJI", "count_MAE", "count_ratio", "recall_0_64")


def baseline(
    *,
    model: Annotated[Path, "folder of the model"] = NUCLEI,
    data: Annotated[Path, "folder of labelled images"] = DATA,
    split: Annotated[str, "of the data"] = "val",
    group_by: Annotated[str | None, "as solo-eval's"] = None,
    max_dets: Annotated[int, "instances of an image"] = 500,
) -> Report:
    from benchmarks.watershed import segment_image  # only this needs scikit-image

    images = CocoDataset(data, split)
    groups = group_images(images, group_by)
    predictor = RepositoryPredictor(model, None, max_dets=max_dets)
    check_classes(images.checked, predictor.classes, f"the model {model}")
    category_id = images.classes[0].category_id
    reports: dict[str, EvaluationReport] = {}
    for name, segment in (
        (predictor.loaded.config.name, predictor),
        ("Otsu, watershed", lambda body: segment_image(decode_image(body), category_id)),
    ):
        reports[name] = evaluate_results(
            images,
            predict(images, segment),
            max_dets=max_dets,
            score_threshold=predictor.score_threshold,
            groups=groups,
        )
    rows: list[Row] = [
        {"images": group, "": name, **{column: row[column] for column in COLUMNS}}
        for group in reports[predictor.loaded.config.name].rows
        for name, report in reports.items()
        for row in (report.rows[group],)
    ]
    return Report(data={"rows": rows, "images": len(images)}, tables={"": rows})
