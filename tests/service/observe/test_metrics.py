from __future__ import annotations

import asyncio
import re
from dataclasses import replace

import pytest

from service.engines.state import EngineBuild, EngineState
from service.observe.metrics import PIXELS, STAGES, WORK_ROUTES, Metrics
from service.observe.timing import Timing
from service.work.admission import Admission
from service.work.request import ClientProfile, Outcome
from tests.support.metrics import render

ENGINE = EngineState("onnxruntime", "cpu", "fp32", "CPU provider", None)
NAMES = {
    *(f"solo_shadow_{name}" for name in ("agreement", "iou", "running", "score_difference")),
    *(f"solo_shadow_{name}_total" for name in ("decisions", "images", "instances")),
    "solo_stage_duration_seconds",
    "solo_request_duration_seconds",
    "solo_batch_size",
    "solo_batch_limit_canvases",
    "solo_requests_total",
    "solo_images_total",
    "solo_canvases_total",
    "solo_image_errors_total",
    "solo_instances_total",
    "solo_jobs_bytes",
    "solo_jobs_files_in_flight",
    "solo_jobs_files_open",
    "solo_jobs_files_total",
    "solo_jobs_open",
    "solo_jobs_store_errors_total",
    "solo_jobs_webhooks_total",
    "solo_rejections_total",
    "solo_engine_failures_total",
    "solo_engine_pixels_total",
    "solo_engine_restarts_total",
    "solo_engine_up",
    "solo_cancelled_images_total",
    "solo_queue_images",
    "solo_queue_canvases",
    "solo_queue_limit_canvases",
    "solo_in_flight_requests",
    "solo_ready",
    "solo_model_info",
    "solo_engine_build_progress",
    "solo_engine_canvas_seconds",
    "solo_model_refused",
    "solo_model_precision_fallback",
    "solo_repository_readable",
    "solo_request_body_bytes",
}


def test_the_names_are_those_that_dashboards_rely_on() -> None:
    text = render(Metrics())
    assert set(re.findall(r"^# TYPE (solo_\w+) ", text, re.M)) == NAMES


def test_engines_that_were_timed() -> None:
    metrics = Metrics()
    timed = {"onnxruntime fp32": 0.04, "openvino bf16": 0.02}
    metrics.add_model("nuclei", 3, lambda: replace(ENGINE, canvas_s=timed), 8)
    text = render(metrics)
    labels = 'backend="openvino",model="nuclei",precision="bf16",version="3"'
    assert f"solo_engine_canvas_seconds{{{labels}}} 0.02" in text
    assert text.count("\nsolo_engine_canvas_seconds{") == 2
    metrics.remove_model("nuclei", 3)
    assert "\nsolo_engine_canvas_seconds{" not in render(metrics)


def test_a_models_series_exist_before_its_first_image() -> None:
    metrics = Metrics()
    metrics.add_model("nuclei", 3, lambda: ENGINE, 8)
    text = render(metrics)
    for family in ("images", "canvases", "instances"):
        assert f'solo_{family}_total{{model="nuclei",version="3"}} 0.0' in text
    for family in ("engine_failures", "engine_restarts"):
        assert f'solo_{family}_total{{model="nuclei"}} 0.0' in text
    assert 'solo_batch_size_count{model="nuclei",version="3"} 0.0' in text
    for kind in PIXELS:
        assert f'solo_engine_pixels_total{{kind="{kind}",model="nuclei"}} 0.0' in text
    for stage in STAGES:
        sample = f'solo_stage_duration_seconds_count{{model="nuclei",stage="{stage}",version="3"}}'
        assert f"{sample} 0.0" in text
    assert (
        'solo_model_info{backend="onnxruntime",device="cpu",model="nuclei",precision="fp32",'
        'version="3"} 1.0'
    ) in text


def test_an_engine_that_changes_while_it_serves_is_shown_as_it_is_now() -> None:
    metrics = Metrics()
    states = [
        replace(ENGINE, build=EngineBuild("building the engine", 0.5)),
        replace(ENGINE, name="tensorrt", device="cuda", build=EngineBuild("switched", 1.0)),
    ]
    metrics.add_model("nuclei", 1, lambda: states.pop(0), 8)
    for backend, progress in (("onnxruntime", 0.5), ("tensorrt", 1.0)):
        text = render(metrics)
        (line,) = re.findall(r"^solo_model_info{.*", text, re.M)
        assert f'backend="{backend}"' in line
        assert f'solo_engine_build_progress{{model="nuclei"}} {progress}' in text


def test_an_edge_stands_at_each_objective() -> None:
    metrics = Metrics()
    metrics.add_model("nuclei", 1, lambda: ENGINE, 8)
    for edge in (0.4, 0.5):
        assert f'le="{edge}",model="nuclei",stage="total"' in render(metrics)


def test_how_full_batches_are_can_be_told() -> None:
    metrics = Metrics()
    metrics.add_model("nuclei", 1, lambda: ENGINE, 8)
    metrics.batch_size.labels("nuclei", 1).observe(6)
    text = render(metrics)
    assert 'solo_batch_size_sum{model="nuclei",version="1"} 6.0' in text
    assert 'solo_batch_limit_canvases{model="nuclei"} 8.0' in text


@pytest.mark.parametrize("route", WORK_ROUTES)
def test_routes_that_segment_have_a_rate_from_their_first_request_on(route: str) -> None:
    text = render(Metrics())
    assert f'solo_requests_total{{method="POST",route="{route}",status="200"}} 0.0' in text
    assert f'solo_request_duration_seconds_count{{method="POST",route="{route}"}} 0.0' in text


def test_two_servers_in_one_process_do_not_share_numbers() -> None:
    one, other = Metrics(), Metrics()
    one.images.labels("nuclei", 1).inc()
    assert 'solo_images_total{model="nuclei",version="1"}' not in render(other)


def test_the_queue_is_read_when_it_is_asked_for() -> None:
    metrics, admission = Metrics(), Admission(4096)
    metrics.watch(admission)
    assert "solo_queue_limit_canvases 4096.0" in render(metrics)
    client = ClientProfile(name="a")
    with admission.request(client), admission.admit(client, [4, 4, 900]):
        text = render(metrics)
        assert "solo_queue_images 3.0" in text
        assert "solo_queue_canvases 908.0" in text
        assert "solo_in_flight_requests 1.0" in text
    text = render(metrics)
    for name in ("solo_queue_images", "solo_queue_canvases", "solo_in_flight_requests"):
        assert f"{name} 0.0" in text


def test_an_image_is_counted_with_its_canvases_instances_and_stages() -> None:
    metrics = Metrics()
    metrics.add_model("nuclei", 1, lambda: ENGINE, 8)
    timing = Timing(decode=0.5, queue=0.25, infer=1.0, postprocess=0.125, encode=0.0625, total=2.0)
    for _ in range(2):
        metrics.count_image("nuclei", 1, Outcome(b"{}", timing, canvases=9, instances=70))
    text = render(metrics)
    for name, value in (("images", 2), ("canvases", 18), ("instances", 140)):
        assert f'solo_{name}_total{{model="nuclei",version="1"}} {value}.0' in text
    for stage, seconds in zip(STAGES, (1.0, 0.5, 2.0, 0.25, 0.125, 4.0), strict=True):
        sample = f'solo_stage_duration_seconds_sum{{model="nuclei",stage="{stage}",version="1"}}'
        assert f"{sample} {seconds}" in text


def test_a_version_that_is_not_served_any_more_is_not_shown() -> None:
    metrics = Metrics()
    metrics.add_model("nuclei", 1, lambda: ENGINE, 8)
    metrics.add_model("nuclei", 2, lambda: ENGINE, 8)
    metrics.images.labels("nuclei", 1).inc()
    metrics.remove_model("nuclei", 1)
    text = render(metrics)
    assert re.findall(r'^solo_model_info{.*version="(\d)"', text, re.M) == ["2"]
    assert 'solo_images_total{model="nuclei",version="1"} 1.0' in text


def test_an_engine_that_is_dead_in_one_version_is_not_up() -> None:
    metrics = Metrics()
    metrics.add_model("nuclei", 1, lambda: replace(ENGINE, is_alive=False), 8)
    metrics.add_model("nuclei", 2, lambda: ENGINE, 8)
    assert 'solo_engine_up{model="nuclei"} 0.0' in render(metrics)


async def test_requests_at_once_share_an_answer_and_later_ones_do_not() -> None:
    metrics, reads = Metrics(), 0

    def read() -> int:
        nonlocal reads
        reads += 1
        return reads

    metrics.follow(metrics.queue_images, read)
    answers = await asyncio.gather(*(metrics.answer("") for _ in range(20)))
    assert reads == 1
    assert len({body for body, _ in answers}) == 1
    body, _ = await metrics.answer("")
    assert b"solo_queue_images 2.0" in body


async def test_the_event_loop_goes_on_while_metrics_are_written() -> None:
    metrics = Metrics()
    for index in range(100):
        metrics.add_model(f"m{index}", 1, lambda: ENGINE, 8)
    writing = asyncio.ensure_future(metrics.answer(""))
    turns = 0
    while not writing.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 100
