from __future__ import annotations

import asyncio
import base64
import io
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from service.http.app import create_app
from service.http.keys import add_key
from service.jobs import runner
from service.jobs.files import ATTEMPTS
from service.jobs.store import FILE_NAME
from service.models.repository import load_repository
from service.settings import Settings
from tests.service.conftest import OPTIONS, OpenClient
from tests.service.http.routes.conftest import OpenGated
from tests.support import zarr_files
from tests.support.blob_model import draw_picture, encode_picture
from tests.support.gate import EngineGate
from tests.support.receiver import receive_webhooks
from tests.support.s3_server import ENVIRONMENT, serve_store

IMAGE = encode_picture(draw_picture())
LARGE = encode_picture(draw_picture(256, 256))
JSON = {"content-type": "application/json"}
SECRET = SecretStr("whsec_" + base64.b64encode(bytes(32)).decode())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_S", "RETRY_S", "BEAT_S"):
        monkeypatch.setattr(runner, name, 0.05)


@pytest.fixture
def with_jobs(settings: Settings, tmp_path: Path) -> Settings:
    folder = tmp_path / "in"
    folder.mkdir()
    update: dict[str, Any] = {"jobs_dir": tmp_path / "jobs", "jobs_roots": str(folder)}
    hooks = {"jobs_webhook_hosts": "127.0.0.1", "jobs_webhook_secret": SECRET}
    return settings.model_copy(update={**update, **hooks, "jobs_webhook_private": True})


def build(settings: Settings) -> FastAPI:
    return create_app(settings, load_repository(settings.model_repo, OPTIONS))


@pytest.fixture
def app(with_jobs: Settings) -> FastAPI:
    return build(with_jobs)


def upload(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", (f"{n}.png", image)) for n, image in enumerate(images, 1)]


async def submit(client: httpx.AsyncClient, *images: bytes, **request: Any) -> dict[str, Any]:
    answer = await client.post("/v2/jobs", files=upload(*images), **request)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v2/jobs/{answer.json()['id']}"
    job: dict[str, Any] = answer.json()
    return job


async def show(client: httpx.AsyncClient, job: dict[str, Any], **request: Any) -> dict[str, Any]:
    answer = await client.get(f"/v2/jobs/{job['id']}", **request)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def wait(client: httpx.AsyncClient, job: dict[str, Any], **request: Any) -> dict[str, Any]:
    deadline_s = time.monotonic() + 60
    while (found := await show(client, job, **request))["state"] != "done":
        assert time.monotonic() < deadline_s, found
        await asyncio.sleep(0.02)
    return found


async def test_without_a_folder_there_are_no_jobs(
    settings: Settings, open_client: OpenClient
) -> None:
    async with open_client(build(settings)) as client:
        for method, path in (("POST", ""), ("GET", ""), ("GET", "/x"), ("DELETE", "/x")):
            answer = await client.request(method, f"/v2/jobs{path}")
            assert (answer.status_code, answer.json()["code"]) == (501, "jobs_disabled")
            assert "--jobs-dir" in answer.json()["error"]


async def test_a_job_finds_what_a_request_finds(client: httpx.AsyncClient) -> None:
    job = await submit(client, IMAGE, LARGE, params={"score_threshold": 0.1})
    assert (job["state"], job["model"], job["files"]["total"]) == ("queued", "blobs", 2)
    done = await wait(client, job)
    assert done["files"] == {"total": 2, "done": 2, "failed": 0, "in_progress": 0}
    assert done["served"] == {"blobs:1": 2}
    assert done["finished"] >= done["created"]
    query = {"score_threshold": 0.1}
    asked = await client.post("/segment", files=upload(IMAGE, LARGE), params=query)
    expected = asked.json()["results"]
    assert expected[0]["instances"] and expected[1]["canvases"] > expected[0]["canvases"]
    results = await client.get(f"/v2/jobs/{job['id']}/results")
    assert results.json()["id"] == job["id"]
    served = {"model": "blobs", "version": 1, "task": "segmentation"}
    assert results.json()["results"] == [
        {"number": number, **served, **entry} for number, entry in enumerate(expected, 1)
    ]
    lines = await client.get(f"/v2/jobs/{job['id']}/results?format=ndjson")
    assert [orjson.loads(line) for line in lines.content.splitlines()] == results.json()["results"]
    coco = await client.get(f"/v2/jobs/{job['id']}/results?format=coco-results")
    assert coco.json() == [
        {"image_id": n, "file_name": e["file_name"], **instance}
        for n, e in enumerate(expected, 1)
        for instance in e["instances"]
    ]


async def test_files_of_the_server_good_and_bad(
    with_jobs: Settings, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    for name, data in (("a.png", IMAGE), ("b.png", b"nonsense"), ("c.png", b""), ("d.png", IMAGE)):
        (folder / name).write_bytes(data)
    (folder / "notes.txt").touch()
    (folder / "e.png").symlink_to("/etc/passwd")
    body = {"inputs": [f"file://{folder}/"], "model": "blobs", "max_instances": 1}
    answer = await client.post("/v2/jobs", json=body)
    assert answer.status_code == 202, answer.text
    assert len(answer.json()["left_out"]) == 2
    assert answer.json()["parameters"] == {"max_instances": 1}
    done = await wait(client, answer.json())
    assert (done["files"]["done"], done["files"]["failed"]) == (2, 2)
    results = (await client.get(f"/v2/jobs/{done['id']}/results")).json()["results"]
    assert [entry["file_name"] for entry in results] == ["a.png", "b.png", "c.png", "d.png"]
    assert [entry["error"]["code"] for entry in results if "error" in entry] == [
        "unsupported_format",
        "empty_image",
    ]
    assert all(len(e["instances"]) == 1 for e in results if "error" not in e)


async def test_files_of_a_store_good_and_bad(
    with_jobs: Settings, open_client: OpenClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra s3")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with serve_store({f"bucket/in/{name}.png": IMAGE for name in "abcd"}) as store:
        store.page = 3
        root = {"jobs_roots": f"s3://bucket/in{store.settings}"}
        async with open_client(build(with_jobs.model_copy(update=root))) as client:
            store.always = {"bucket": 503}
            answer = await client.post("/v2/jobs", json={"inputs": ["s3://bucket/in/"]})
            assert (answer.status_code, answer.json()["code"]) == (503, "jobs_unavailable")
            store.always = {"bucket/in/b.png": 403}
            store.statuses = {
                "bucket/in/c.png": [500] * ATTEMPTS,
                "bucket/in/d.png": [200, 200, -1],
            }
            answer = await client.post("/v2/jobs", json={"inputs": ["s3://bucket/in/"]})
            assert answer.status_code == 202, answer.text
            done = await wait(client, answer.json())
            entries = (await client.get(f"/v2/jobs/{done['id']}/results")).json()["results"]
            codes = [entry.get("error", {}).get("code") for entry in entries]
            assert codes == [None, "source_unavailable", None, None]
            assert entries[0]["instances"] == entries[2]["instances"] == entries[3]["instances"]


async def test_an_input_that_is_deleted_fails_alone(
    with_jobs: Settings, open_gated: OpenGated, tmp_path: Path
) -> None:
    for name in "abcdefgh":
        (tmp_path / "in" / f"{name}.png").write_bytes(IMAGE)
    async with open_gated(**changes_of(with_jobs)) as (app, gate), talk(app) as client:
        body = {"inputs": [f"file://{tmp_path}/in/"]}
        job = (await client.post("/v2/jobs", json=body)).json()
        (tmp_path / "in" / "h.png").unlink()
        gate.let()
        done = await wait(client, job)
        assert (done["files"]["done"], done["files"]["failed"]) == (7, 1)
        results = (await client.get(f"/v2/jobs/{job['id']}/results")).json()["results"]
        assert results[7]["file_name"] == "h.png"
        assert results[7]["error"]["code"] == "source_unavailable"


def changes_of(settings: Settings) -> dict[str, Any]:
    return {name: value for name, value in settings if name.startswith("jobs_")}


def talk(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60)


@pytest.mark.parametrize(
    ("request_", "status", "code", "text"),
    [
        (
            {"files": upload(IMAGE), "params": {"max_instance": 3}},
            422,
            "invalid_parameter",
            "max_i",
        ),
        ({"files": upload(IMAGE), "params": {"timeout_ms": 3}}, 422, "invalid_parameter", "no tim"),
        (
            {"files": upload(IMAGE), "data": {"priority": "batch"}},
            422,
            "invalid_parameter",
            "no pr",
        ),
        (
            {"files": upload(IMAGE), "params": {"masks": "rle"}, "data": {"masks": "none"}},
            *(422, "invalid_parameter", "'masks' is given more than once"),
        ),
        ({"files": upload(IMAGE), "params": {"model": "cats"}}, 404, "unknown_model", "cats"),
        ({"files": upload(IMAGE), "params": {"version": 7}}, 404, "unknown_version", "7"),
        (
            {"files": upload(IMAGE), "params": {"um_per_px": 1}},
            422,
            "invalid_parameter",
            "um_per_px",
        ),
        ({"data": {"masks": "none"}, "files": {}}, 400, "invalid_request", "multipart"),
        ({"content": IMAGE}, 400, "invalid_request", "multipart/form-data"),
        ({"json": {}}, 422, "invalid_parameter", "inputs"),
        ({"json": {"inputs": []}}, 422, "invalid_parameter", "inputs"),
        ({"json": {"inputs": ["file:///etc/"]}}, 403, "source_forbidden", "file:///etc/"),
        ({"json": ["file:///etc/"]}, 400, "invalid_request", "no JSON object"),
        ({"json": {"inputs": [3]}}, 422, "invalid_parameter", "inputs.0"),
        (
            {"content": b"{", "headers": JSON},
            *(400, "invalid_request", "no JSON"),
        ),
        (
            {"content": b'{"inputs": [], "inputs": ["file:///etc/"]}', "headers": JSON},
            *(400, "invalid_request", "'inputs' stands twice"),
        ),
        (
            {"content": b"[" * 100_000, "headers": JSON},
            *(400, "invalid_request", "nested deeper"),
        ),
        (
            {"content": b'{"inputs": ["\xff"]}', "headers": JSON},
            *(400, "invalid_request", "no JSON"),
        ),
        (
            {"files": upload(IMAGE), "headers": [("idempotency-key", k) for k in "ab"]},
            *(422, "invalid_parameter", "more than once"),
        ),
        (
            {"files": upload(IMAGE), "headers": {"idempotency-key": "a b"}},
            *(422, "invalid_parameter", "Idempotency-Key"),
        ),
        (
            {"files": upload(IMAGE), "params": {"webhook": "http://evil.example/"}},
            *(403, "source_forbidden", "evil.example"),
        ),
        ({"files": upload(IMAGE), "params": {"webhook": "x"}}, 422, "invalid_parameter", "webhook"),
    ],
)
async def test_a_wrong_submission_makes_no_job(
    with_jobs: Settings,
    client: httpx.AsyncClient,
    request_: dict[str, Any],
    status: int,
    code: str,
    text: str,
) -> None:
    answer = await client.post("/v2/jobs", **request_)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert text in answer.json()["error"]
    assert (await client.get("/v2/jobs")).json() == {"jobs": [], "next": None}


async def test_more_files_than_allowed_are_refused(
    with_jobs: Settings, open_client: OpenClient, tmp_path: Path
) -> None:
    app = build(with_jobs.model_copy(update={"jobs_max_files": 2}))
    for name in "abc":
        (tmp_path / "in" / f"{name}.png").write_bytes(IMAGE)
    async with open_client(app) as client:
        answer = await client.post("/v2/jobs", files=upload(IMAGE, IMAGE, IMAGE))
        assert (answer.status_code, answer.json()["code"]) == (413, "too_many_images")
        body = {"inputs": [f"file://{tmp_path}/in/"]}
        answer = await client.post("/v2/jobs", json=body)
        assert "there are 3 files, a job may have 2" in answer.json()["error"]


async def test_a_submission_that_is_repeated_makes_one_job(client: httpx.AsyncClient) -> None:
    headers = {"idempotency-key": "order-7"}
    job = await submit(client, IMAGE, IMAGE, headers=headers)
    again = await client.post("/v2/jobs", files=upload(IMAGE, IMAGE), headers=headers)
    assert (again.status_code, again.json()["id"]) == (200, job["id"])
    for files, params in ((upload(LARGE, IMAGE), {}), (upload(IMAGE, IMAGE), {"masks": "none"})):
        other = await client.post("/v2/jobs", files=files, params=params, headers=headers)
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    together = await asyncio.gather(
        *(
            client.post("/v2/jobs", files=upload(IMAGE), headers={"idempotency-key": "k"})
            for _ in range(8)
        )
    )
    assert len({answer.json()["id"] for answer in together}) == 1
    assert sorted(answer.status_code for answer in together) == [200] * 7 + [202]
    listed = [found["id"] for found in (await client.get("/v2/jobs")).json()["jobs"]]
    assert listed[:2] == [together[0].json()["id"], job["id"]]


async def test_a_repeated_submission_does_not_need_its_files_any_more(
    with_jobs: Settings, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    (tmp_path / "in" / "a.png").write_bytes(IMAGE)
    body, headers = {"inputs": [f"file://{tmp_path}/in/a.png"]}, {"idempotency-key": "k"}
    job = await client.post("/v2/jobs", json=body, headers=headers)
    (tmp_path / "in" / "a.png").unlink()
    again = await client.post("/v2/jobs", json=body, headers=headers)
    assert (job.status_code, again.status_code) == (202, 200)
    assert again.json()["id"] == job.json()["id"]
    assert (await client.post("/v2/jobs", json=body)).status_code == 422


async def test_the_list_has_pages(with_jobs: Settings, client: httpx.AsyncClient) -> None:
    ids = [(await submit(client, IMAGE))["id"] for _ in range(3)][::-1]
    first = (await client.get("/v2/jobs?limit=2")).json()
    assert [job["id"] for job in first["jobs"]] == ids[:2]
    rest = (await client.get("/v2/jobs", params={"before": first["next"]})).json()
    assert [job["id"] for job in rest["jobs"]] == ids[2:] and rest["next"] is None
    assert (await client.get("/v2/jobs?before=x")).status_code == 404
    assert (await client.get("/v2/jobs?limit=0")).status_code == 422


async def test_jobs_of_another_key_do_not_exist(
    with_jobs: Settings, open_client: OpenClient, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    keys = [{"x-api-key": add_key(file, name, max_job_files=2)} for name in ("ann", "bob")]
    app = build(with_jobs.model_copy(update={"keys_file": file}))
    async with open_client(app) as client:
        assert (await client.post("/v2/jobs", files=upload(IMAGE))).status_code == 401
        assert (await client.get("/v2/jobs")).status_code == 401
        job = await submit(client, IMAGE, headers=keys[0])
        path = f"/v2/jobs/{job['id']}"
        for method, end in (("GET", ""), ("GET", "/results"), ("DELETE", "")):
            answer = await client.request(method, path + end, headers=keys[1])
            assert (answer.status_code, answer.json()["code"]) == (404, "unknown_job")
        assert (await client.get("/v2/jobs", headers=keys[1])).json()["jobs"] == []
        many = await client.post("/v2/jobs", files=upload(*[IMAGE] * 3), headers=keys[1])
        assert (many.status_code, many.json()["code"]) == (429, "quota_exceeded")
        assert many.headers["retry-after"]
        assert (await wait(client, job, headers=keys[0]))["files"]["done"] == 1


async def test_results_are_there_when_the_job_is_done_and_go_with_it(
    with_jobs: Settings, open_gated: OpenGated
) -> None:
    async with open_gated(**changes_of(with_jobs)) as (app, gate), talk(app) as client:
        job = await submit(client, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE)
        path = f"/v2/jobs/{job['id']}"
        while not gate.is_waiting:
            await asyncio.sleep(0.01)
        early = await client.get(f"{path}/results")
        assert (early.status_code, early.json()["code"]) == (409, "job_not_finished")
        assert "0 of 5 files" in early.json()["error"]
        assert (await show(client, job))["state"] == "running"
        assert (await client.delete(path)).status_code == 204
        for method, end in (("GET", ""), ("GET", "/results"), ("DELETE", "")):
            assert (await client.request(method, path + end)).status_code == 404
        gate.let()
        other = await submit(client, IMAGE)
        await wait(client, other)
        assert [j["id"] for j in (await client.get("/v2/jobs")).json()["jobs"]] == [other["id"]]


async def test_a_drain_gives_files_back_and_the_next_start_goes_on(
    with_jobs: Settings, open_gated: OpenGated, open_client: OpenClient
) -> None:
    async with open_gated(**changes_of(with_jobs)) as (app, gate), talk(app) as client:
        job = await submit(client, *[IMAGE] * 6)
        while not gate.is_waiting:
            await asyncio.sleep(0.01)
        app.state.segmenter.admission.close()
        while app.state.segmenter.admission.requests:
            await asyncio.sleep(0.01)
        refused = await client.post("/v2/jobs", files=upload(IMAGE))
        assert (refused.status_code, refused.json()["code"]) == (503, "draining")
        assert (await show(client, job))["files"]["in_progress"] == 0
        gate.let()
    began_s = time.monotonic()
    async with open_client(build(with_jobs)) as client:
        done = await wait(client, job)
        assert done["files"] == {"total": 6, "done": 6, "failed": 0, "in_progress": 0}
    assert time.monotonic() - began_s < 60


async def test_the_webhook_says_that_the_job_is_done(
    with_jobs: Settings, client: httpx.AsyncClient
) -> None:
    with receive_webhooks() as receiver:
        receiver.statuses = [503]
        job = await submit(client, IMAGE, b"bad", params={"webhook": receiver.url})
        while (found := await show(client, job))["webhook"]["state"] != "delivered":
            await asyncio.sleep(0.05)
        assert found["webhook"]["attempts"] == 2
    assert [headers["webhook-id"] for headers, _ in receiver.received] == [job["id"]] * 2
    event = json.loads(receiver.received[1][1])
    assert event["type"] == "job.done"
    assert event["data"]["files"] == {"total": 2, "done": 1, "failed": 1}


async def test_a_damaged_store_stops_jobs_and_nothing_else(
    with_jobs: Settings, open_client: OpenClient, tmp_path: Path
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / FILE_NAME).write_bytes(b"nonsense" * 1000)
    async with open_client(build(with_jobs)) as client:
        answer = await client.post("/v2/jobs", files=upload(IMAGE))
        assert (answer.status_code, answer.json()["code"]) == (503, "jobs_unavailable")
        assert FILE_NAME in answer.json()["error"]
        assert (await client.get("/v2/health/ready")).status_code == 200
        assert (await client.post("/segment", files=upload(IMAGE))).status_code == 200
        metrics = (await client.get("/metrics")).text
        (line,) = [t for t in metrics.splitlines() if t.startswith("solo_jobs_store_errors_total")]
        assert float(line.split()[1]) > 0
        (tmp_path / "jobs" / FILE_NAME).unlink()
        await wait(client, await submit(client, IMAGE))  # without a restart


async def test_jobs_are_counted_but_not_as_latency(
    with_jobs: Settings, client: httpx.AsyncClient
) -> None:
    await wait(client, await submit(client, IMAGE, b"bad"))
    lines = (await client.get("/metrics")).text.splitlines()
    samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert samples['solo_jobs_files_total{state="done"}'] == "1.0"
    assert samples['solo_jobs_files_total{state="failed"}'] == "1.0"
    assert samples['solo_images_total{model="blobs",version="1"}'] == "1.0"
    stage = 'solo_stage_duration_seconds_count{model="blobs",stage="total",version="1"}'
    assert samples[stage] == "0.0"


async def test_results_are_written_in_the_output_formats(client: httpx.AsyncClient) -> None:
    job = await submit(client, IMAGE, b"bad", LARGE)
    await wait(client, job)
    path = f"/v2/jobs/{job['id']}/results"
    asked = await client.post("/segment?format=coco", files=upload(IMAGE))
    (image,) = asked.json()["images"]
    coco = await client.get(f"{path}?format=coco")
    assert coco.headers["content-disposition"].startswith("attachment; filename=")
    data = coco.json()
    assert [entry["id"] for entry in data["images"]] == [1, 3]
    assert data["images"][0] == image and data["categories"] == asked.json()["categories"]
    own = [found for found in data["annotations"] if found["image_id"] == 1]
    assert own == asked.json()["annotations"] and len(data["annotations"]) > len(own)
    one = await client.post("/segment?format=geojson", files=upload(IMAGE))
    packed = await client.get(f"{path}?format=geojson")
    assert packed.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(packed.content)) as archive:
        assert archive.namelist() == ["1.geojson", "3.geojson"]
        assert archive.read("1.geojson") == one.content
    for query in ("format=jpeg", "simplify_px=1", "format=labels&simplify_px=1"):
        refused = await client.get(f"{path}?{query}")
        assert refused.status_code == 422, query
    boxes = await submit(client, IMAGE, params={"masks": "none"})
    await wait(client, boxes)
    refused = await client.get(f"/v2/jobs/{boxes['id']}/results?format=csv")
    assert "needs a job with masks=rle" in refused.json()["error"]


async def test_a_request_waits_for_no_more_of_a_job_than_is_in_progress(
    with_jobs: Settings, open_gated: OpenGated
) -> None:
    async with open_gated(**changes_of(with_jobs)) as (app, gate), talk(app) as client:
        await submit(client, *[LARGE] * 4)
        for _ in range(5):  # in the middle of an image
            await call_once(gate)
        asked = asyncio.create_task(client.post("/segment", files=upload(IMAGE)))
        while app.state.segmenter.admission.images < 4:  # three of the job, and its own
            await asyncio.sleep(0.005)
        before = gate.calls
        while not asked.done():
            await call_once(gate)
        # One in progress, one that is prepared, its own, and one that begins before the answer.
        assert gate.calls - before <= 4
        assert asked.result().status_code == 200


async def call_once(gate: EngineGate) -> None:
    """Lets one call of the engine through, and waits until the next one is there."""
    calls = gate.calls
    gate.let(1)
    deadline_s = time.monotonic() + 10
    while not (gate.calls > calls and gate.is_waiting) and time.monotonic() < deadline_s:
        await asyncio.sleep(0.005)


async def test_a_folder_that_is_a_zarr_is_one_file(
    with_jobs: Settings, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    pixels = np.moveaxis(draw_picture(), -1, 0)
    zarr_files.write(tmp_path / "in" / "a.zarr", pixels, "cyx", chunks=(1, 20, 30))
    (tmp_path / "in" / "b.png").write_bytes(IMAGE)
    body = {"inputs": [f"file://{tmp_path / 'in'}"]}
    answer = await client.post("/v2/jobs", json=body)
    assert answer.status_code == 202, answer.text
    await wait(client, answer.json())
    results = await client.get(f"/v2/jobs/{answer.json()['id']}/results")
    one, other = results.json()["results"]
    assert (one["file_name"], other["file_name"]) == ("a.zarr", "b.png")
    assert one["instances"] and one["instances"] == other["instances"]
