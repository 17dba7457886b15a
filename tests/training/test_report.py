"""The HTML report of a run."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny import TINY, build_tiny_data
from training.data.coco import CocoDataset
from training.model.solo import Solo
from training.report import Picture, build_pictures, describe_left, draw_chart, write_report
from training.run_log import RunLog


def test_the_report_has_curves_notes_and_pictures_and_loads_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0) as log:
        for step in range(1, 5):
            log.write(step, {"total": 4.0 / step, "mask": float("nan"), "lr": 0.1})
        log.note(4, "resumed with <b>")
        log.write(4, {"val/AP": 0.25})
    image = np.full((30, 900, 3), 120, np.uint8)
    path = write_report(tmp_path, "a & b", "step 4", [Picture("<x>.png", image, image)])
    text = path.read_text()
    HTMLParser().feed(text)
    assert text.count("<polyline") == 3 and text.count("data:image/jpeg;base64,") == 2
    assert "a &amp; b" in text and "resumed with &lt;b&gt;" in text and "&lt;x&gt;.png" in text
    assert "<b>" not in text and "nan" not in text
    assert not re.search(r"https?:|<script|<link|@import", text)
    assert not list(tmp_path.glob("*.partial"))


def test_a_report_of_an_empty_log(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0):
        pass
    text = write_report(tmp_path, "t", "s", []).read_text()
    assert "<svg" not in text and "<figure" not in text


def test_a_chart_is_thinned_and_keeps_its_last_point() -> None:
    chart = draw_chart("t", {"a": [(step, float(step)) for step in range(10007)], "b": []})
    (points,) = re.findall(r'points="([^"]*)"', chart)
    assert 500 < len(points.split()) <= 1001
    assert points.split()[0] == "70.0,216.0" and points.split()[-1] == "630.0,10.0"
    assert draw_chart("t", {"a": [(1, float("inf"))]}) == "" == draw_chart("t", {})
    assert "70.0,216.0" in draw_chart("t", {"a": [(3, 2.0)]})


def test_pictures_show_images_with_objects(tmp_path: Path) -> None:
    data = CocoDataset(build_tiny_data(tmp_path), "val")
    model = Solo(TINY.model, 2).eval()
    pictures = build_pictures(data)(model, TINY)
    assert [p.name for p in pictures] == ["val1.png", "val2.png"]  # the third is empty
    for index, picture in enumerate(pictures):
        image = data.image(index)
        assert picture.truth.shape == picture.predicted.shape == image.shape
        assert (picture.truth != image).any()
    data.records = data.records[2:]
    assert build_pictures(data)(model, TINY) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "time left unknown"),
        (0.0, "0 s left"),
        (29.0, "29 s left"),
        (60.0, "1 min left"),
        (7260.0, "2 h 1 min left"),
    ],
)
def test_time_left(seconds: float | None, text: str) -> None:
    assert describe_left(seconds) == text
