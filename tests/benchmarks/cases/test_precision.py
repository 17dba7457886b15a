"""The small benchmarks of the CPU engine and of the stages, with few rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import decode
from benchmarks.cases.precision import load_tiles
from benchmarks.harness import BenchmarkError
from benchmarks.inputs import NUCLEI
from benchmarks.ours import read_model
from service.errors import ModelRefused
from tests.support.blob_model import draw_picture, encode_picture, publish


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(encode_picture(draw_picture(100, 48)))
    return folder


def test_stages_have_a_row_for_each_image(
    run_case: Callable[..., Any], tmp_path: Path, images: Path
) -> None:
    model = publish(tmp_path / "repo")
    report = run_case("stages", "--model", model, "--images", images, "--rounds", 1)
    (row,) = report["rows"].values()
    assert row["tiles"] > 1 and row["instances"] >= 1
    stages = ("decode", "prepare", "engine", "postprocess", "encode")
    assert row["total_ms"] == pytest.approx(sum(row[f"{stage}_ms"] for stage in stages))
    outside_ms = row["total_ms"] - row["engine_ms"]
    assert row["outside_engine"] == pytest.approx(outside_ms / row["total_ms"])
    assert report["engine"] == "ort fp32"


def test_stages_run_the_engine_and_precision_asked_for(run_case: Callable[..., Any]) -> None:
    with pytest.raises(ModelRefused, match=r"(?i)openvino"):
        run_case("stages", "--rounds", 1, "--engine", "openvino", "--precision", "int8")


def test_engines_and_precisions_share_their_canvases(run_case: Callable[..., Any]) -> None:
    few = ("--rounds", 1, "--canvases", 1, "--threads", 1)
    report = run_case("precision", *few, "--variants", "ort:int8", "openvino:int8")
    assert set(report["seconds"]) == {"ort:fp32", "ort:int8"}
    assert report["canvas_hw"] == [288, 288]


def test_too_few_canvases_are_refused(images: Path) -> None:
    config, _ = read_model(NUCLEI)
    with pytest.raises(BenchmarkError, match="has 1 canvases of one shape, 9 are needed"):
        load_tiles(config, images, 9)


def test_decoders_are_measured_on_the_same_file(
    run_case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "SIZES_HW", ((48, 64),))
    (row,) = run_case("decode", "--rounds", 1)["rows"]
    assert set(row["cpu_ms"]) == {"server", "pillow", "opencv", "server_scaled"}
    assert row["file_bytes"] > 500
