from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline.errors import ImageTooLarge
from service import segmenter as segmenter_module
from service.engines.base import BackendOptions
from service.errors import (
    Draining,
    EngineError,
    EngineRestarting,
    Overloaded,
    TooManyCanvases,
    TooManyImages,
    UnknownModel,
)
from service.models.repository import load_repository
from service.models.store import LAST_CALL_S, LAST_STEP_S
from service.observe.metrics import Metrics
from service.observe.tracing import collect_images
from service.segmenter import LocalSegmenter, measure
from service.settings import Settings
from service.work import image as image_module
from service.work.request import ClientProfile, ImageFile, Outcome, RequestOptions, RequestProgress
from tests.service.conftest import OPTIONS
from tests.support.blob_model import draw_picture, encode_picture, poisoned_picture, publish
from tests.support.gate import EngineGate
from tests.support.metrics import render
from tests.support.pictures import build_png_header
from tests.support.waiting import wait_until

CLIENT = ClientProfile(name="a")
ONE, NINE = (encode_picture(draw_picture(side, side)) for side in (48, 128))


class Running:
    """A segmenter that has started, and its gate."""

    def __init__(self, segmenter: LocalSegmenter, gate: EngineGate) -> None:
        self.segmenter = segmenter
        self.gate = gate

    async def segment(
        self,
        *images: bytes,
        model: str = "blobs",
        client: ClientProfile = CLIENT,
        progress: RequestProgress | None = None,
    ) -> list[Outcome]:
        files = [ImageFile(f"{i}.png", image) for i, image in enumerate(images)]
        with self.segmenter.use(model, None, client) as used:
            segmented = await self.segmenter.segment(
                used, files, RequestOptions(), client, progress or RequestProgress()
            )
        assert segmented.model.name == model
        return list(segmented.outcomes)


@pytest.fixture
async def running(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> AsyncIterator[Running]:
    """Indirect parameters are changes of the settings."""
    changed = settings.model_copy(update=getattr(request, "param", {}))
    repository = load_repository(changed.model_repo, OPTIONS)
    gate = EngineGate(monkeypatch, repository)
    segmenter = LocalSegmenter(changed, repository, Metrics())
    segmenter.start()
    yield Running(segmenter, gate)
    gate.let()
    await segmenter.drain()


SHORT_DRAIN = [{"drain_timeout_s": 0.2}]


def test_opencv_has_as_many_threads_as_there_are_cores(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cv2.getNumThreads()
    monkeypatch.setattr("service.segmenter.count_cores", lambda: 1)
    try:
        cv2.setNumThreads(3)
        LocalSegmenter(settings, load_repository(settings.model_repo, OPTIONS), Metrics())
        assert cv2.getNumThreads() == 1
    finally:
        cv2.setNumThreads(before)


async def test_outcomes_come_in_the_order_of_the_images(running: Running) -> None:
    running.gate.let()
    outcomes = await running.segment(NINE, b"text", ONE, build_png_header(1, 40_000_000))
    assert [type(outcome.error).__name__ for outcome in outcomes] == [
        *("NoneType", "UnsupportedFormat", "NoneType", "TooManyCanvases"),
    ]
    assert [outcome.canvases for outcome in outcomes] == [9, 0, 1, 0]
    assert b'"3.png"' in outcomes[3].payload


async def test_a_header_that_takes_long_to_read_does_not_hold_up_the_event_loop(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def watch(*given: Any, **named: Any) -> Any:
        threads.append(threading.current_thread())
        return measure(*given, **named)

    monkeypatch.setattr(segmenter_module, "measure", watch)
    running.gate.let()
    await running.segment(ONE, b"text")
    assert len(threads) == 2 and threading.main_thread() not in threads


async def test_finished_and_failed_images_are_counted(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    running.gate.let()
    await running.segment(NINE, b"text", ONE)
    await running.segment(b"", ONE)
    text = render(running.segmenter.metrics)
    assert 'solo_images_total{model="blobs",version="1"} 3.0' in text
    assert 'solo_canvases_total{model="blobs",version="1"} 11.0' in text
    assert 'solo_instances_total{model="blobs",version="1"} 3.0' in text
    for code in ("unsupported_format", "empty_image"):
        assert f'solo_image_errors_total{{code="{code}",model="blobs",version="1"}} 1.0' in text
    assert 'solo_stage_duration_seconds_count{model="blobs",stage="total",version="1"} 3.0' in text
    assert [r for r in caplog.records if r.levelno >= logging.ERROR and r.exc_info] == []


async def test_an_error_of_our_own_is_logged_with_its_traceback(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*args: object, **given: object) -> bytes:
        raise ZeroDivisionError("of our own")

    running.gate.let()
    monkeypatch.setattr(image_module, "encode_entry", explode)
    (outcome,) = await running.segment(ONE)
    assert isinstance(outcome.error, ZeroDivisionError)
    (record,) = [r for r in caplog.records if r.exc_info]
    assert "of our own" in str(record.exc_info)
    text = render(running.segmenter.metrics)
    assert 'solo_image_errors_total{code="internal_error",model="blobs",version="1"} 1.0' in text


async def test_an_engine_error_is_its_images_alone(running: Running) -> None:
    outcomes = await running.segment(ONE, encode_picture(poisoned_picture()), model="wide")
    assert outcomes[0].error is None
    assert isinstance(outcomes[1].error, EngineError)


async def test_only_images_that_are_processed_are_admitted(running: Running) -> None:
    admission = running.segmenter.admission
    progress = RequestProgress()
    working = asyncio.create_task(running.segment(NINE, b"text", ONE, progress=progress))
    await asyncio.wait_for(progress.admitted.wait(), 10)
    assert (admission.images, admission.canvases, progress.canvases) == (2, 10, 10)
    assert admission.held(CLIENT) == 10
    text = render(running.segmenter.metrics)
    assert "solo_queue_canvases 10.0" in text and "solo_queue_limit_canvases 32768.0" in text
    running.gate.let()
    await working
    assert (admission.images, admission.canvases, progress.done) == (0, 0, 10)
    assert admission.held(CLIENT) == 0


@pytest.mark.parametrize(
    "running", [{"max_queue_canvases": 4, "max_image_canvases": 2}], indirect=True
)
async def test_a_request_of_bad_images_alone_needs_no_room(running: Running) -> None:
    progress = RequestProgress()
    with running.segmenter.admission.admit(ClientProfile(name="b"), [2]):
        (outcome,) = await running.segment(b"text", progress=progress)
    assert outcome.error is not None
    assert not progress.admitted.is_set() and progress.canvases == 0


@pytest.mark.parametrize(
    "running", [{"max_queue_canvases": 24, "max_image_canvases": 12}], indirect=True
)
async def test_a_request_is_admitted_whole_or_not_at_all(running: Running) -> None:
    admission = running.segmenter.admission
    with pytest.raises(TooManyImages):
        await running.segment(NINE, ONE, ONE, ONE, ONE)
    with admission.admit(ClientProfile(name="b"), [8]):
        with pytest.raises(Overloaded) as caught:
            await running.segment(NINE, ONE)
        assert caught.value.reason == "queue_canvases"  # 16 are free, 6 would be then
    assert (admission.images, admission.canvases, admission.requests) == (0, 0, 0)
    assert running.gate.calls == 0


async def test_a_cancelled_request_leaves_nothing_behind(running: Running) -> None:
    segmenter = running.segmenter
    working = asyncio.create_task(running.segment(NINE))
    await wait_until(lambda: segmenter.admission.canvases == 9)
    model = segmenter.store.find("blobs", None)
    assert (model.users, segmenter.admission.requests) == (1, 1)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert (model.users, segmenter.admission.requests) == (0, 0)
    assert (segmenter.admission.images, segmenter.admission.canvases) == (0, 0)
    assert model.scheduler.waiting == 0


async def test_an_unknown_model_is_no_request(running: Running) -> None:
    with pytest.raises(UnknownModel), running.segmenter.use("cats", None, CLIENT):
        pytest.fail("used")
    assert running.segmenter.admission.requests == 0


@pytest.mark.parametrize("running", [{"max_queue_canvases": 2}], indirect=True)
async def test_a_full_queue_is_seen_before_the_body_is_read(running: Running) -> None:
    with running.segmenter.admission.admit(ClientProfile(name="b"), [1]):
        with pytest.raises(Overloaded), running.segmenter.use("blobs", None, CLIENT):
            pytest.fail("used")
        model = running.segmenter.store.find("blobs", None)
        assert (model.users, running.segmenter.admission.requests) == (0, 0)


async def test_draining_waits_for_what_was_accepted(running: Running) -> None:
    segmenter = running.segmenter
    working = asyncio.create_task(running.segment(NINE))
    await wait_until(lambda: segmenter.admission.canvases == 9)
    draining = asyncio.create_task(segmenter.finish_accepted())
    await asyncio.sleep(0.05)
    assert not draining.done() and not segmenter.is_ready
    with pytest.raises(Draining), segmenter.use("blobs", None, CLIENT):
        pytest.fail("used")
    running.gate.let()
    assert await asyncio.wait_for(draining, 10)
    assert (await working)[0].error is None


async def test_a_body_that_is_still_read_is_waited_for(running: Running) -> None:
    segmenter = running.segmenter
    with segmenter.use("blobs", None, CLIENT):
        draining = asyncio.create_task(segmenter.finish_accepted())
        await asyncio.sleep(0.05)
        assert not draining.done()
    assert await asyncio.wait_for(draining, 10)


@pytest.mark.parametrize("running", SHORT_DRAIN, indirect=True)
async def test_draining_ends_when_its_time_is_up(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    segmenter = running.segmenter
    working = asyncio.create_task(running.segment(NINE))
    await wait_until(lambda: segmenter.admission.canvases == 9)
    began_s = time.monotonic()
    assert not await segmenter.finish_accepted()
    assert 0.19 < time.monotonic() - began_s < 5
    assert "1 requests were not finished in time" in caplog.text
    began_s = time.monotonic()
    await segmenter.give_up()
    # The thread is still in the engine; nothing else is waited for.
    assert time.monotonic() - began_s < LAST_STEP_S + LAST_CALL_S / 2
    with pytest.raises(Draining):
        await working


@pytest.mark.parametrize("running", SHORT_DRAIN, indirect=True)
async def test_what_a_drain_does_not_finish_is_given_up(running: Running) -> None:
    working = asyncio.create_task(running.segment(NINE))
    await wait_until(lambda: running.segmenter.admission.canvases == 9)
    await asyncio.wait_for(running.segmenter.drain(), 10)
    with pytest.raises(Draining):
        await working


async def test_a_drain_with_nothing_to_do_frees_the_engines(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = load_repository(settings.model_repo, OPTIONS)
    closed: list[str] = []
    for name, versions in repository.models.items():
        for loaded in versions.values():
            monkeypatch.setattr(loaded.backend, "close", lambda name=name: closed.append(name))
    segmenter = LocalSegmenter(settings, repository, Metrics())
    segmenter.start()
    began_s = time.monotonic()
    await segmenter.drain()
    assert time.monotonic() - began_s < 5
    assert sorted(closed) == ["blobs", "wide"]


async def test_a_dead_engine_is_not_ready_and_gets_nothing(running: Running) -> None:
    segmenter = running.segmenter
    assert "solo_ready 1.0" in render(segmenter.metrics)
    engine = segmenter.store.find("wide", None).engine
    engine._usable.clear()
    assert not segmenter.is_ready
    assert "solo_ready 0.0" in render(segmenter.metrics)
    with pytest.raises(EngineRestarting):
        segmenter.find("wide", None)
    with pytest.raises(EngineRestarting), segmenter.use("wide", None, CLIENT):
        pytest.fail("used")
    assert segmenter.find("blobs", None).name == "blobs"
    engine._usable.set()


async def test_an_engine_that_dies_is_rebuilt_and_the_request_is_answered(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = load_repository(settings.model_repo, OPTIONS)

    def fail(tiles: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(repository.models["blobs"][1].backend, "infer", fail)
    segmenter = LocalSegmenter(settings, repository, Metrics())
    segmenter.start()
    try:
        with segmenter.use("blobs", None, CLIENT) as model:
            segmented = await asyncio.wait_for(
                segmenter.segment(
                    model, [ImageFile(None, ONE)], RequestOptions(), CLIENT, RequestProgress()
                ),
                30,
            )
        assert segmented.outcomes[0].instances == 1
        restarts = 'solo_engine_restarts_total{model="blobs"} 1.0'
        await wait_until(lambda: restarts in render(segmenter.metrics))
        assert segmenter.is_ready
    finally:
        await segmenter.drain()


async def test_images_are_noted_for_the_trace_of_their_request(running: Running) -> None:
    running.gate.let()
    images = collect_images()
    await running.segment(ONE, b"text", NINE)
    assert [image.model for image in images] == ["blobs", "blobs"]
    assert all({"decode", "infer"} <= set(image.stages) for image in images)


async def test_models_are_listed_with_their_engines(running: Running) -> None:
    states = running.segmenter.models
    assert [(state.name, state.version) for state in states] == [("blobs", 1), ("wide", 1)]
    assert {state.engine.name for state in states} == {"onnxruntime"}
    assert set(running.segmenter.unavailable) == {"broken"}


@pytest.mark.parametrize("running", [{"model_poll_s": 0.02}], indirect=True)
async def test_the_repository_is_watched_until_the_drain(
    running: Running, settings: Settings
) -> None:
    publish(settings.model_repo, "later")
    await wait_until(lambda: any(m.name == "later" for m in running.segmenter.models))
    await running.segmenter.drain()
    publish(settings.model_repo, "too_late")
    await asyncio.sleep(0.1)
    assert not any(m.name == "too_late" for m in running.segmenter.models)


async def test_it_is_not_watched_unless_that_is_asked_for(
    running: Running, settings: Settings
) -> None:
    publish(settings.model_repo, "later")
    await asyncio.sleep(0.1)
    assert not any(m.name == "later" for m in running.segmenter.models)
    await running.segmenter.load("later")
    assert any(m.name == "later" for m in running.segmenter.models)
    await running.segmenter.unload("later")
    assert not any(m.name == "later" for m in running.segmenter.models)


def test_what_an_image_costs(settings: Settings) -> None:
    config = (
        load_repository(settings.model_repo, BackendOptions(device="cpu", threads=1))
        .models["blobs"][1]
        .config
    )
    options = RequestOptions()
    pixels = np.zeros((100, 48, 3), np.uint8)
    assert measure(ImageFile(None, NINE), (128, 128), config, options, settings) == (
        (128, 128),
        9,
        config,
    )
    assert measure(ImageFile(None, NINE), None, config, options, settings) == (
        (128, 128),
        9,
        config,
    )
    assert measure(ImageFile(None, pixels), None, config, options, settings) == (
        (100, 48),
        2,
        config,
    )
    bounded = settings.model_copy(update={"max_image_canvases": 8})
    with pytest.raises(TooManyCanvases, match="128x128 px needs 9 canvases, the server allows 8"):
        measure(ImageFile(None, NINE), (128, 128), config, options, bounded)
    small = settings.model_copy(update={"max_image_pixels": 128 * 128 - 1})
    for size in ((128, 128), None):
        with pytest.raises(ImageTooLarge):
            measure(ImageFile(None, NINE), size, config, options, small)
