from __future__ import annotations

from typing import Any

import pytest

from training.data.ids import read_image_id, read_whole


@pytest.mark.parametrize(
    ("value", "whole"),
    [
        *[(5, 5), ("5", 5), (5.0, 5), ("-5", -5), (5.5, None), ("5.0", None), ("", None)],
        *[(2**53, 2**53), (2**53 + 1, None), (float("nan"), None), (None, None), (True, None)],
        ("\u0663", None),
    ],
)
def test_whole_numbers(value: Any, whole: int | None) -> None:
    assert read_whole(value) == whole


@pytest.mark.parametrize(
    ("value", "image_id"), [("12", 12), (7.0, 7), ("a.jpg", "a.jpg"), ("", None), (None, None)]
)
def test_ids_of_images(value: Any, image_id: int | str | None) -> None:
    assert read_image_id(value) == image_id
