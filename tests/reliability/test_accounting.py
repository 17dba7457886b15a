"""Behaviour 9: a thousand requests are a thousand in every histogram."""

from __future__ import annotations

import asyncio
from functools import partial
from operator import gt
from pathlib import Path

import pytest

from benchmarks.load import read_metrics, run_closed_loop
from service.observe.metrics import STAGES
from tests.reliability.conftest import Report
from tests.support.blob_model import draw_picture, encode_picture
from tests.support.server import CPU_FLAGS, run_server
from tests.support.slow_model import ONE_CANVAS, build_slow_graph, publish_graph

COUNT = 1000
BAD = 50


@pytest.mark.slow
def test_a_thousand_requests_count_a_thousand(tmp_path: Path, report: Report) -> None:
    """And fifty that fail are counted beside them, not among them."""
    publish_graph(tmp_path / "repo", "blobs", build_slow_graph(), input=ONE_CANVAS)
    picture = encode_picture(draw_picture())
    with run_server(tmp_path / "log", "--model-repo", str(tmp_path / "repo"), *CPU_FLAGS) as server:
        for body, count, status in ((picture, COUNT, 200), (picture[:-100], BAD, 422)):
            load = asyncio.run(
                run_closed_loop(server.url, [body], clients=16, may_go_on=partial(gt, count))
            )
            assert load.statuses == {status: count}
        metrics = read_metrics(server.url)
    stage = 'solo_stage_duration_seconds_%s{model="blobs",stage="%s",version="1"}'
    counts = {name: metrics[stage % ("count", name)] for name in STAGES}
    sums = {name: metrics[stage % ("sum", name)] for name in STAGES}
    whole = sums.pop("total")
    share = sum(sums.values()) / whole
    report("stages_of_total", share)
    assert counts == dict.fromkeys(STAGES, COUNT)
    assert abs(share - 1) < 0.05
    labels = 'method="POST",route="/segment"'
    assert metrics[f"solo_request_duration_seconds_count{{{labels}}}"] == COUNT + BAD
    assert metrics[f'solo_requests_total{{{labels},status="200"}}'] == COUNT
    assert metrics[f'solo_requests_total{{{labels},status="422"}}'] == BAD
    assert metrics['solo_images_total{model="blobs",version="1"}'] == COUNT
    assert metrics['solo_image_errors_total{code="corrupt_image",model="blobs",version="1"}'] == BAD
    assert metrics['solo_batch_size_sum{model="blobs",version="1"}'] == COUNT
    assert metrics["solo_queue_images"] == metrics["solo_in_flight_requests"] == 0
