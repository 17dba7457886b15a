"""`slide`: its plumbing on a small slide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from benchmarks.cases.slide import PATCH_TILES, TILE_PX, average_tenths, write_slide
from benchmarks.harness import BenchmarkError
from tests.support.blob_model import publish

PATCH_PX = PATCH_TILES * TILE_PX


def test_a_slide_is_timed_and_its_memory_is_sampled(
    run_case: Callable[..., Any], tmp_path: Path
) -> None:
    model = publish(tmp_path / "repo")
    report = run_case("slide", "--model", model, "--side", PATCH_PX, "--tissue", 1)
    row = report["row"]
    assert row["tissue, megapixels"] == pytest.approx(PATCH_PX**2 / 1e6)
    assert row["wall s"] > 0 and row["CPU s"] > 0 and row["instances"] > 0
    assert row["s per gigapixel"] == pytest.approx(row["wall s"] * 1e9 / PATCH_PX**2)
    assert len(report["memory_bytes"]) > 1
    assert max(report["memory_bytes"]) <= row["peak memory, MB"] * 1e6 * 1.01


def test_the_slide_has_its_share_of_tissue(tmp_path: Path) -> None:
    side = 2 * PATCH_PX + 100
    tissue_px = write_slide(tmp_path / "a.tif", side, 0.25)
    pixels = tifffile.imread(tmp_path / "a.tif")
    assert pixels.shape == (side, side)
    full = [
        np.ptp(pixels[y : y + TILE_PX, x : x + TILE_PX]) > 20
        for y in range(0, side, TILE_PX)
        for x in range(0, side, TILE_PX)
    ]
    assert sum(full) * TILE_PX**2 == tissue_px == PATCH_PX**2


@pytest.mark.parametrize(("side", "tissue"), [(PATCH_PX - TILE_PX, 0.1), (PATCH_PX, 0.0)])
def test_what_has_no_tissue_is_refused(tmp_path: Path, side: int, tissue: float) -> None:
    with pytest.raises(BenchmarkError, match=f"side {side} .* tissue {tissue}"):
        write_slide(tmp_path / "a.tif", side, tissue)


def test_a_curve_has_ten_points_at_most() -> None:
    assert average_tenths(list(range(20))) == [i + 0.5 for i in range(0, 20, 2)]
    assert average_tenths([3, 4]) == [3.0, 4.0] and average_tenths([]) == []
