"""CSV of measurements: a row for each instance, columns as of scikit-image's regionprops_table."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator

from pipeline.encode import SCORE_DIGITS
from pipeline.measure import COLUMNS, measure_shape
from pipeline.writers.page import Classes, Page

_HEADER = ("file_name", "label", "category_id", "category", "score", *COLUMNS)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_DIGITS = 6


def encode(page: Page) -> bytes:
    """The rows of a page; `label` is the number of the instance in its image, from 1."""
    rows = []
    for number, instance in enumerate(page.instances, 1):
        spec = page.classes[instance.label]
        rows.append(
            (
                *(_guard(page.name), number, spec.category_id, _guard(spec.name)),
                round(instance.score, SCORE_DIGITS),
                *(round(value, _DIGITS) for value in measure_shape(instance).values()),
            )
        )
    return _write(rows)


def join(classes: Classes, pages: Iterable[tuple[int, bytes]]) -> Iterator[bytes]:
    """The table, page by page."""
    yield _write([_HEADER])
    for _, part in pages:
        yield part


def _write(rows: Iterable[Iterable[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _guard(text: str) -> str:
    """A text that spreadsheets do not run as a formula: an apostrophe goes before it."""
    return f"'{text}" if text.startswith(_FORMULA) else text
