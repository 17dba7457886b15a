from __future__ import annotations

import time

import pytest
import torch

from training import speed
from training.speed import MAX_IMAGES, device_name, measure_fps


def test_the_first_image_is_not_measured() -> None:
    seen: list[bytes] = []

    def predict(image: bytes) -> None:
        seen.append(image)
        time.sleep(0.5 if image == b"0" else 0.01)

    fps = measure_fps(predict, [b"0", b"1", b"2"])
    assert seen == [b"0", b"1", b"2"] and 5 < fps <= 100


def test_a_single_image_is_measured_the_second_time() -> None:
    seen: list[bytes] = []
    assert measure_fps(seen.append, [b"0"]) > 0 and seen == [b"0", b"0"]


def test_the_measurement_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    measure_fps(seen.append, [b"0"] * (10 * MAX_IMAGES))
    assert len(seen) == MAX_IMAGES + 1
    monkeypatch.setattr(speed, "MAX_SECONDS", -1.0)
    seen.clear()
    measure_fps(seen.append, [b"0"] * 10)
    assert len(seen) == 2


def test_a_cpu_is_named_with_its_threads() -> None:
    assert device_name("cpu") == f"CPU ({torch.get_num_threads()} threads)"
