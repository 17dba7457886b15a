"""Behaviour 2: a hundred masks as large as a photograph never exist side by side."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from benchmarks.harness.memory import reset_peak
from tests.reliability.conftest import Report
from tests.support.blob_model import draw_picture, encode_picture
from tests.support.memory import read_peak_bytes, read_resident_bytes
from tests.support.server import CPU_FLAGS, run_server
from tests.support.slow_model import build_full_graph, full_config, publish_graph

HEIGHT, WIDTH = 3024, 4032
MASKS = 100


@pytest.mark.slow
def test_a_hundred_large_masks_need_little_memory(tmp_path: Path, report: Report) -> None:
    publish_graph(tmp_path / "repo", "full", build_full_graph(MASKS), **full_config(MASKS))
    photograph = encode_picture(draw_picture(HEIGHT, WIDTH), "JPEG")
    flags = ("--model-repo", str(tmp_path / "repo"), *CPU_FLAGS)
    with run_server(tmp_path / "log", *flags) as server:
        pid = server.process.pid
        before = read_resident_bytes(pid)
        reset_peak(pid)
        response = httpx.post(f"{server.url}/segment", content=photograph, timeout=300)
        extra = read_peak_bytes(pid) - before
    instances = response.raise_for_status().json()["results"][0]["instances"]
    report("extra_mb", extra / 1e6)
    report("dense_masks_mb", MASKS * HEIGHT * WIDTH / 1e6)
    assert len(instances) == MASKS
    for instance in instances:
        dense = coco_mask.decode(instance["segmentation"])
        again = coco_mask.encode(np.asfortranarray(dense))
        assert again["counts"].decode() == instance["segmentation"]["counts"]
        assert int(dense.sum()) == instance["area"]
        assert 0.99 * HEIGHT * WIDTH < instance["area"] < HEIGHT * WIDTH
    assert extra <= 200e6
