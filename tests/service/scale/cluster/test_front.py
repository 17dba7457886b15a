from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.errors import Draining, Overloaded, TooManyImages
from service.http.keys import add_key
from service.scale.cluster import front
from service.scale.cluster.front import TRIES
from service.scale.cluster.messages import Answer, Call
from service.scale.cluster.settings import ClusterSettings
from service.scale.cluster.worker import Worker
from service.work.request import ClientProfile
from tests.service.scale.cluster.conftest import run_worker
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.pictures import build_png_header

PICTURE = encode_picture(draw_picture())
LOST = None


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "BACKOFF_S", 0.0)


async def post(client: httpx.AsyncClient, path: str = "/segment", **given: Any) -> Any:
    response = await client.post(path, content=PICTURE, **given)
    return response.status_code, response.json()


def code_of(answer: tuple[int, dict[str, Any]]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["code"]


async def test_a_lost_workers_call_goes_to_another(open_front: Any, worker: Worker) -> None:
    async with open_front(LOST, LOST, worker) as (client, workers, segmenter):
        status, body = await post(client)
        assert status == 200
        assert [i["category"] for i in body["results"][0]["instances"]] == ["red"]
        assert len(workers.calls) == 3
        assert segmenter.metrics.retries._value.get() == 2


async def test_an_image_cannot_kill_all_workers(open_front: Any) -> None:
    async with open_front(LOST) as (client, workers, _):
        response = await client.post("/segment", content=PICTURE)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_restarting"
        assert response.headers["retry-after"] == "1"
        assert len(workers.calls) == TRIES


@pytest.mark.parametrize("error", [Draining("going"), Overloaded("full", "queue_canvases")])
async def test_a_worker_that_cannot_is_not_the_last_word(
    open_front: Any, worker: Worker, error: Any
) -> None:
    async with open_front(Answer(error=error), worker) as (client, _, _):
        assert (await post(client))[0] == 200
    async with open_front(Answer(error=error)) as (client, _, _):
        assert code_of(await post(client)) == (503, error.code)


async def test_a_wrong_request_is_not_tried_again(open_front: Any) -> None:
    refusal = Answer(error=TooManyImages("300 images"))
    async with open_front(refusal) as (client, workers, _):
        assert code_of(await post(client)) == (413, "too_many_images")
        assert len(workers.calls) == 1


async def test_during_an_upgrade_the_answer_says_which_version_it_was(
    open_front: Any, cluster_settings: ClusterSettings, worker: Worker
) -> None:
    """The front knows version 1; a worker that is new has version 2 alone."""
    new_repo = cluster_settings.model_repo.parent / "new"
    publish(new_repo, version=2)
    settings = cluster_settings.model_copy(update={"model_repo": new_repo})
    async with run_worker(settings) as new, open_front(new, worker) as (client, workers, _):
        for version in (2, 1):
            status, body = await post(client)
            assert (status, body["version"]) == (200, version)
        status, body = await post(client, "/segment?version=1")
        assert (status, body["version"], len(workers.calls)) == (200, 1, 4)


async def test_what_is_served_is_asked_for_again(
    open_front: Any, cluster_settings: ClusterSettings, worker: Worker, monkeypatch: Any
) -> None:
    monkeypatch.setattr(front, "REFRESH_S", 0.01)
    publish(cluster_settings.model_repo, "later")
    async with open_front() as (client, _, _):
        assert code_of(await post(client, "/segment?model=later")) == (404, "unknown_model")
        await worker._segmenter.store.load("later")
        while (await post(client, "/segment?model=later"))[0] != 200:
            await asyncio.sleep(0.01)
        await worker._segmenter.store.unload("blobs")
        while "blobs" in str((await client.get("/v2/health/ready")).json()["models"]):
            await asyncio.sleep(0.01)
        assert code_of(await post(client, "/segment?model=blobs")) == (503, "model_unavailable")


async def test_a_front_that_no_worker_answers_is_not_ready(
    open_front: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_front(LOST) as (client, _, _):
        assert (await client.get("/v2/health/ready")).status_code == 200
        monkeypatch.setattr(front, "SILENCE_S", 0.0)
        assert (await client.get("/v2/health/ready")).status_code == 503
        assert (await client.get("/v2/health/live")).status_code == 200


async def test_a_deadline_ends_the_work_at_the_worker(
    open_front: Any, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = asyncio.Event()

    async def segment(call: Call) -> Answer:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        return Answer()

    monkeypatch.setattr(worker, "segment", segment)
    async with open_front() as (client, _, segmenter):
        answer = await post(client, headers={"x-timeout-ms": "50"})
        assert code_of(answer) == (504, "deadline_exceeded")
        assert cancelled.is_set()
        assert segmenter.admission.images == 0


async def test_the_way_to_the_worker_counts_as_waiting(
    open_front: Any, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = worker.segment

    async def segment_later(call: Call) -> Answer:
        await asyncio.sleep(0.2)
        return await segment(call)

    monkeypatch.setattr(worker, "segment", segment_later)
    async with open_front() as (client, _, _):
        timing = (await post(client))[1]["timing_ms"]
        assert timing["queue"] > 190
        assert sum(timing.values()) == pytest.approx(2 * timing["total"], abs=0.1)


async def test_a_fronts_admission_is_the_single_servers(open_front: Any) -> None:
    bounds = {"max_queue_canvases": 4, "max_image_canvases": 2}
    async with open_front(**bounds) as (client, workers, segmenter):
        files = [("images", ("a.png", PICTURE))] * 3
        response = await client.post("/segment", files=files)
        assert (response.status_code, len(workers.calls)) == (413, 0)
        with segmenter.admission.admit(ClientProfile(name="other"), [2]):
            response = await client.post("/segment", files=files[:2])
            assert (response.status_code, len(workers.calls)) == (503, 0)
            assert (await post(client))[0] == 200
            with segmenter.admission.admit(ClientProfile(name="third"), [1]):
                assert code_of(await post(client)) == (503, "overloaded")
        response = await client.post("/segment", files=files[:2])
        assert (response.status_code, len(workers.calls)) == (200, 2)
        assert (segmenter.admission.canvases, segmenter.admission.images) == (0, 0)


async def test_images_of_too_many_canvases_do_not_travel(open_front: Any) -> None:
    large = encode_picture(draw_picture(128, 128))
    files = [("images", ("a.png", image)) for image in (PICTURE, large, b"text", PICTURE)]
    async with open_front(max_image_canvases=8) as (client, workers, segmenter):
        body = (await client.post("/segment", files=files)).raise_for_status().json()
        codes = [result.get("error", {}).get("code") for result in body["results"]]
        assert codes == [None, "too_many_canvases", "unsupported_format", None]
        assert body["canvases"] == 2
        (call,) = workers.calls
        assert [image.data for image in call.images] == [PICTURE, PICTURE]
        thin = await client.post("/segment", content=build_png_header(40_000_000, 1))
        assert (thin.status_code, thin.json()["error"]["code"]) == (413, "too_many_canvases")
        assert len(workers.calls) == 1
        assert segmenter.admission.images == 0


async def test_the_client_travels_with_its_weight(open_front: Any, tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.json", "shop", weight=3, max_canvases=5)
    async with open_front(keys_file=tmp_path / "keys.json") as (client, workers, _):
        assert (await post(client, headers={"x-api-key": key}))[0] == 200
        (call,) = workers.calls
        assert call.client == ClientProfile(name="key shop", weight=3, max_canvases=5)


async def test_progress_is_streamed_by_a_front_too(open_front: Any) -> None:
    async with open_front() as (client, _, _):
        headers = {"accept": "application/x-ndjson"}
        response = await client.post("/segment", content=PICTURE, headers=headers)
        lines = [json.loads(line) for line in response.text.splitlines()]
        assert all(line["progress"]["canvases"] == 1 for line in lines[:-1])
        assert lines[-1]["result"]["canvases"] == 1
