"""Behaviours 1 and 4: images of any size share engine calls, and nobody notices the others."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from pycocotools import mask as coco_mask

from benchmarks.load import read_metrics, run_closed_loop
from tests.reliability.conftest import Report
from tests.support.blob_model import KEEP_RATIO_INPUT, draw_picture, encode_picture, publish
from tests.support.pictures import build_truncated_jpeg
from tests.support.server import CPU_FLAGS, ROOT, run_server
from tests.support.slow_model import ONE_CANVAS, build_slow_graph, publish_graph

NUCLEI = ROOT / "tests" / "data" / "nuclei" / "images"


def test_64_sizes_fill_the_batches_and_leave_the_event_loop_free(
    tmp_path: Path, report: Report
) -> None:
    graph = build_slow_graph(rounds=25_000)
    publish_graph(tmp_path / "repo", "blobs", graph, input=ONE_CANVAS)
    pictures = [draw_picture(200 + 4 * i, 500 - 3 * i) for i in range(64)]
    bodies = [encode_picture(picture, "JPEG") for picture in pictures]
    flags = ("--model-repo", str(tmp_path / "repo"), *CPU_FLAGS, "--max-delay-ms", "5")
    with run_server(tmp_path / "log", *flags) as server:
        out = tmp_path / "ping.json"
        command = [sys.executable, "-m", "benchmarks", "ping", server.url, "--out", str(out)]
        command += ["--seconds", "4"]
        with subprocess.Popen(command, cwd=ROOT) as pinger:
            load = asyncio.run(
                run_closed_loop(
                    server.url, bodies, clients=64, may_go_on=lambda _: pinger.poll() is None
                )
            )
        ping = json.loads(out.read_bytes())
        metrics = read_metrics(server.url)
    calls = metrics['solo_batch_size_count{model="blobs",version="1"}']
    mean = metrics['solo_batch_size_sum{model="blobs",version="1"}'] / calls
    report("images", len(load.answers))
    report("mean_batch_of_8", mean)
    report("live_p50_ms", ping["p50_ms"])
    report("live_p99_ms", ping["p99_ms"])
    assert set(load.statuses) == {200}
    assert mean >= 0.9 * 8
    assert ping["p99_ms"] < 500  # 20 is the aim; other work on the machine adds to it


def post_many(url: str, model: str, files: list[bytes]) -> list[dict[str, Any]]:
    parts = [("images", (str(index), data)) for index, data in enumerate(files)]
    response = httpx.post(f"{url}/segment", params={"model": model}, files=parts, timeout=300)
    results: list[dict[str, Any]] = response.raise_for_status().json()["results"]
    return results


def least_iou(alone: dict[str, Any], together: dict[str, Any]) -> float:
    """Least IoU of the instances of one image, which must be the same in number and class."""
    ours, theirs = alone["instances"], together["instances"]
    assert [i["category_id"] for i in ours] == [i["category_id"] for i in theirs]
    masks = ([i["segmentation"] for i in found] for found in (ours, theirs))
    return min(float(coco_mask.iou([a], [b], [0])[0, 0]) for a, b in zip(*masks, strict=True))


def check_batches(url: str, model: str, files: list[bytes]) -> float:
    """N = 1..8 images together against each alone, then a damaged one among 8; the least IoU."""
    alone = [post_many(url, model, [data])[0] for data in files]
    least = 1.0
    for count in range(1, 9):
        together = post_many(url, model, files[:count])
        least = min([least, *map(least_iou, alone, together)])
    with_damage = post_many(url, model, [*files[:3], build_truncated_jpeg(), *files[4:]])
    errors = [result.get("error", {}).get("code") for result in with_damage]
    assert errors == [None] * 3 + ["corrupt_image"] + [None] * 4
    for index in (0, 1, 2, 4, 5, 6, 7):
        least = min(least, least_iou(alone[index], with_damage[index]))
    return least


def test_batches_change_nothing(tmp_path: Path, report: Report) -> None:
    publish(tmp_path / "repo", "wide", input=KEEP_RATIO_INPUT)
    files = [encode_picture(draw_picture(40 + 9 * i, 110 - 7 * i)) for i in range(8)]
    flags = ("--model-repo", str(tmp_path / "repo"), *CPU_FLAGS, "--max-delay-ms", "30")
    with run_server(tmp_path / "log", *flags) as server:
        least = check_batches(server.url, "wide", files)
        metrics = read_metrics(server.url)
    report("least_mask_iou", least)
    assert least >= 0.999
    calls = metrics['solo_batch_size_count{model="wide",version="1"}']
    canvases = metrics['solo_batch_size_sum{model="wide",version="1"}']
    assert canvases > 1.2 * calls  # there were batches


@pytest.mark.slow
def test_batches_change_nothing_with_the_bundled_model(tmp_path: Path, report: Report) -> None:
    files = [file.read_bytes() for file in sorted(NUCLEI.glob("*.jpg"))[:8]]
    with run_server(tmp_path / "log", *CPU_FLAGS, "--max-delay-ms", "100") as server:
        least = check_batches(server.url, "nuclei", files)
    report("least_mask_iou", least)
    assert least >= 0.999
