"""Jobs on fronts that share their folder."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.jobs import runner
from service.jobs.runner import MAX_ATTEMPTS
from service.scale.cluster import front
from service.scale.cluster.front import TRIES
from service.scale.cluster.messages import WorkerDied, WorkerLost
from service.scale.cluster.worker import Worker
from tests.service.scale.cluster.conftest import LocalWorkers
from tests.support.blob_model import draw_picture, encode_picture

PICTURE = encode_picture(draw_picture())
DEADLY = "deadly.png"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_S", "RETRY_S", "BEAT_S"):
        monkeypatch.setattr(runner, name, 0.02)
    monkeypatch.setattr(front, "BACKOFF_S", 0.0)


async def submit(client: httpx.AsyncClient, *names: str) -> str:
    answer = await client.post("/v2/jobs", files=[("images", (name, PICTURE)) for name in names])
    assert answer.status_code == 202, answer.text
    job: str = answer.json()["id"]
    return job


async def finish(client: httpx.AsyncClient, job: str) -> list[dict[str, Any]]:
    async with asyncio.timeout(60):
        while (await client.get(f"/v2/jobs/{job}")).json()["state"] != "done":
            await asyncio.sleep(0.02)
    results: list[dict[str, Any]] = (await client.get(f"/v2/jobs/{job}/results")).json()["results"]
    return results


def count_calls(*fronts: LocalWorkers) -> Counter[str]:
    return Counter(str(call.images[0].file_name) for workers in fronts for call in workers.calls)


async def test_fronts_share_a_job_and_process_each_file_once(
    open_front: Any, worker: Worker, tmp_path: Path
) -> None:
    names = [f"{number}.png" for number in range(40)]
    folder = {"jobs_dir": tmp_path / "jobs", "jobs_in_flight": 2}
    async with (
        open_front(**folder) as (first, one, segmenter),
        open_front(**folder) as (second, other, _),
    ):
        results = await finish(second, await submit(first, *names))
        asked = (await first.post("/segment", content=PICTURE)).json()["results"][0]
        assert [entry["file_name"] for entry in results] == names
        assert all(entry["instances"] == asked["instances"] for entry in results)
        one.calls.pop()
        assert one.calls and other.calls, "one front has processed all files"
        assert count_calls(one, other) == Counter(names)
        assert {call.options.priority for call in one.calls} == {"background"}
        assert segmenter.admission.images == 0


async def test_a_file_that_ends_workers_is_given_up_and_the_others_are_done(
    open_front: Any, worker: Worker, tmp_path: Path
) -> None:
    async with open_front(jobs_dir=tmp_path / "jobs") as (client, workers, segmenter):
        workers.faults[DEADLY] = [WorkerDied("ActorDiedError")] * 1000
        results = await finish(client, await submit(client, DEADLY, "a.png", "b.png"))
        codes = [entry.get("error", {}).get("code") for entry in results]
        assert codes == ["process_lost", None, None]
        assert count_calls(workers) == {DEADLY: MAX_ATTEMPTS, "a.png": 1, "b.png": 1}
        assert segmenter.metrics.retries._value.get() == 0


async def test_while_no_worker_can_be_reached_files_wait(
    open_front: Any, worker: Worker, tmp_path: Path
) -> None:
    async with open_front(jobs_dir=tmp_path / "jobs") as (client, workers, _):
        workers.faults["a.png"] = [WorkerLost("DeploymentUnavailableError")] * TRIES * 3
        (entry,) = await finish(client, await submit(client, "a.png"))
        assert entry["instances"]
        assert count_calls(workers) == {"a.png": TRIES * 3 + 1}
