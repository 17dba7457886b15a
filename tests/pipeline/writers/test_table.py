from __future__ import annotations

import csv
import io

import pytest

from pipeline.measure import COLUMNS
from pipeline.writers import FORMATS, Page
from tests.support.found import CLASSES, build_page


def write(*pages: Page) -> list[dict[str, str]]:
    chosen = FORMATS["csv"]
    assert chosen.join is not None
    parts = ((n, chosen.encode(page)) for n, page in enumerate(pages, 1))
    text = b"".join(chosen.join(CLASSES, parts)).decode()
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_there_is_a_row_for_each_instance() -> None:
    rows = write(build_page(3), build_page(0, name="none"), build_page(1, name="b.png"))
    assert [(row["file_name"], row["label"]) for row in rows] == [
        *(("a.png", "1"), ("a.png", "2"), ("a.png", "3"), ("b.png", "1")),
    ]
    assert list(rows[0])[-len(COLUMNS) :] == list(COLUMNS)
    assert rows[0] == rows[0] | {
        "category_id": "7",
        "category": "cell",
        "score": "1.0",
        "area": "1",
        "bbox-0": "39",
        "bbox-1": "49",
        "bbox-2": "40",
        "bbox-3": "50",
        "centroid-0": "39.0",
        "centroid-1": "49.0",
        "solidity": "1.0",
    }
    assert rows[1]["category"] == "other, one"


def test_without_instances_there_is_the_header() -> None:
    assert write() == [] == write(build_page(0))


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_no_text_is_run_as_a_formula(start: str) -> None:
    text = start + "cmd|' /C calc'!A0"
    classes = tuple(spec.model_copy(update={"name": text}) for spec in CLASSES)
    (row,) = write(build_page(1, name=text, classes=classes))
    assert row["category"] == row["file_name"] == f"'{text}"


def test_negative_numbers_stay_numbers() -> None:
    rows = write(build_page(20))
    assert min(float(row["orientation"]) for row in rows) < 0
