"""Loading, replacing and unloading models while they are served."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.engines.base import BackendError
from service.errors import ModelUnavailable, UnknownModel, UnknownVersion
from service.http.app import create_app
from service.http.keys import add_key
from service.models.publishing import write_default
from service.models.repository import load_repository
from service.models.store import ModelStore
from service.settings import Settings
from tests.service.conftest import OPTIONS, OpenClient
from tests.support.blob_model import build_graph, draw_picture, encode_picture, publish
from tests.support.memory import read_resident_bytes
from tests.support.model_folder import add_version, edit_config

PICTURE = encode_picture(draw_picture())


@pytest.fixture
def controlled(settings: Settings) -> Settings:
    return settings.model_copy(update={"model_control": True})


@pytest.fixture
async def app(controlled: Settings) -> FastAPI:
    return create_app(controlled, load_repository(controlled.model_repo, OPTIONS))


@pytest.fixture
async def client(app: FastAPI, open_client: OpenClient) -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(app) as opened:
        yield opened


def get_store(app: FastAPI) -> ModelStore:
    store = app.state.segmenter.store
    assert isinstance(store, ModelStore)
    return store


async def segment(client: httpx.AsyncClient, **params: Any) -> httpx.Response:
    return await client.post("/segment", params=params, content=PICTURE)


async def load(client: httpx.AsyncClient, name: str) -> httpx.Response:
    return await client.post(f"/v2/repository/models/{name}/load")


async def wait_for_retirement(store: ModelStore) -> None:
    async with asyncio.timeout(10):
        while store._retiring:
            await asyncio.sleep(0.005)


async def test_a_new_version_is_served_and_the_old_one_ends(
    app: FastAPI, client: httpx.AsyncClient, model_repo: Path
) -> None:
    store = get_store(app)
    old = store.find("blobs", 1)
    add_version(model_repo / "blobs", 2)
    assert (await segment(client)).json()["version"] == 1
    assert (await load(client, "blobs")).status_code == 200
    assert (await segment(client)).json()["version"] == 2
    gone = await segment(client, version=1)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "unknown_version")
    await wait_for_retirement(store)
    with pytest.raises(BackendError, match="closed"):
        old.loaded.probe(old.engine.current)
    metrics = (await client.get("/metrics")).text
    assert 'solo_model_info{backend="onnxruntime",device="cpu",model="blobs"' in metrics
    assert 'model="blobs",precision="fp32",version="2"} 1.0' in metrics
    assert 'model="blobs",precision="fp32",version="1"}' not in metrics


async def test_loading_under_load_loses_no_request(
    client: httpx.AsyncClient, model_repo: Path
) -> None:
    """Version 1, then 2, then a broken 3: every request is answered, and 2 goes on."""
    versions: list[int] = []
    statuses: set[int] = set()
    stop = asyncio.Event()

    async def ask() -> None:
        while not stop.is_set():
            response = await segment(client)
            statuses.add(response.status_code)
            versions.append(response.json().get("version"))

    askers = [asyncio.create_task(ask()) for _ in range(4)]
    while len(versions) < 8:
        await asyncio.sleep(0.01)
    add_version(model_repo / "blobs", 2)
    assert (await load(client, "blobs")).status_code == 200
    swapped = len(versions)
    while len(versions) < swapped + 12:
        await asyncio.sleep(0.01)
    add_version(model_repo / "blobs", 3, graph=b"broken")
    refused = await load(client, "blobs")
    assert (refused.status_code, refused.json()["code"]) == (503, "model_unavailable")
    assert "blobs/3/model.onnx" in refused.json()["error"]
    after = len(versions)
    while len(versions) < after + 8:
        await asyncio.sleep(0.01)
    stop.set()
    await asyncio.gather(*askers)
    assert statuses == {200}
    assert versions[0] == 1 and set(versions[-4:]) == {2}
    assert set(versions) == {1, 2}


async def test_each_version_has_statistics_of_its_own(
    client: httpx.AsyncClient, model_repo: Path
) -> None:
    folder = model_repo / "blobs"
    add_version(folder, 2)
    edit_config(folder, lambda content: content.update(serve={"policy": "all"}))
    assert (await load(client, "blobs")).status_code == 200
    for version, images in ((1, 3), (2, 1)):
        for _ in range(images):
            assert (await segment(client, version=version)).status_code == 200
    refused = await client.post("/segment", params={"version": 2}, content=b"no image")
    assert refused.status_code == 415

    async def read(path: str) -> dict[str, tuple[int, int, int]]:
        stats = (await client.get(path)).json()["model_stats"]
        return {
            f"{one['name']} {one['version']}": (
                *(one["inference_count"], one["execution_count"]),
                one["inference_stats"]["fail"]["count"],
            )
            for one in stats
        }

    found = await read("/v2/models/stats")
    assert found == {"blobs 1": (3, 3, 0), "blobs 2": (1, 1, 1), "wide 1": (0, 0, 0)}
    assert await read("/v2/models/blobs/stats") == {k: found[k] for k in ("blobs 1", "blobs 2")}
    for version in (1, 2):
        path = f"/v2/models/blobs/versions/{version}/stats"
        assert await read(path) == {f"blobs {version}": found[f"blobs {version}"]}
    (one,) = (await client.get("/v2/models/blobs/versions/2/stats")).json()["model_stats"]
    times = one["inference_stats"]
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    assert sum(times[part]["ns"] for part in parts) == pytest.approx(
        times["success"]["ns"], rel=0.01
    )


async def test_versions_that_are_replaced_many_times_leave_few_series(
    app: FastAPI, client: httpx.AsyncClient, model_repo: Path
) -> None:
    sizes = []
    for version in range(2, 12):
        add_version(model_repo / "blobs", version)
        assert (await load(client, "blobs")).status_code == 200
        await wait_for_retirement(get_store(app))
        assert (await segment(client)).json()["version"] == version
        text = (await client.get("/metrics")).text
        sizes.append(text.count("\nsolo_"))
        assert f'solo_images_total{{model="blobs",version="{version}"}} 1.0' in text
    assert len(set(sizes[-5:])) == 1
    assert 'version="3"' not in text
    (stats,) = (await client.get("/v2/models/blobs/stats")).json()["model_stats"]
    assert (stats["version"], stats["inference_count"]) == ("11", 1)


@pytest.mark.usefixtures("client")
async def test_a_request_keeps_its_version_to_the_end(app: FastAPI, model_repo: Path) -> None:
    store = get_store(app)
    with store.use("blobs", None) as model:
        add_version(model_repo / "blobs", 2)
        assert await store.load("blobs") == [2]
        await asyncio.sleep(0.05)
        assert model.loaded.version == 1
        model.loaded.probe(model.engine.current)
    await wait_for_retirement(store)
    with pytest.raises(BackendError, match="closed"):
        model.loaded.probe(model.engine.current)


async def test_several_versions_are_served_side_by_side(
    app: FastAPI, client: httpx.AsyncClient, model_repo: Path
) -> None:
    folder = model_repo / "blobs"
    add_version(folder, 2)
    edit_config(folder, lambda content: content.update(serve={"policy": "all"}))
    kept = get_store(app).find("blobs", 1)
    assert (await load(client, "blobs")).status_code == 200
    assert get_store(app).find("blobs", 1) is kept  # it has not changed
    for version in (1, 2):
        assert (await segment(client, version=version)).json()["version"] == version
    assert (await segment(client)).json()["version"] == 2
    assert (await client.get("/v2/models/blobs")).json()["versions"] == ["1", "2"]
    index = (await client.post("/v2/repository/index")).json()
    assert [(e["name"], e["version"], e["state"]) for e in index] == [
        ("blobs", "1", "READY"),
        ("blobs", "2", "READY"),
        ("broken", "", "UNAVAILABLE"),
        ("wide", "1", "READY"),
    ]
    ready = (await client.post("/v2/repository/index", json={"ready": True})).json()
    assert [entry["name"] for entry in ready] == ["blobs", "blobs", "wide"]


async def test_a_changed_file_is_another_model(
    app: FastAPI, client: httpx.AsyncClient, model_repo: Path
) -> None:
    before = get_store(app).find("blobs", None)
    edit_config(
        model_repo / "blobs",
        lambda c: c.update(postprocess={**c["postprocess"], "score_threshold": 0.9999}),
    )
    assert len((await segment(client)).json()["results"][0]["instances"]) == 1
    await load(client, "blobs")
    assert get_store(app).find("blobs", None) is not before
    assert (await segment(client)).json()["results"][0]["instances"] == []


async def test_unloading_and_loading_again(client: httpx.AsyncClient) -> None:
    assert (await client.post("/v2/repository/models/blobs/unload")).status_code == 200
    assert (await client.post("/v2/repository/models/blobs/unload")).status_code == 404
    refused = await segment(client, model="blobs")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_unavailable")
    listed = {m["name"]: m for m in (await client.get("/v2/models")).json()["models"]}
    assert (listed["blobs"]["state"], listed["blobs"]["reason"]) == ("UNAVAILABLE", "unloaded")
    refused = await segment(client)  # the default is not replaced in silence
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_unavailable")
    assert (await client.get("/v2/health/ready")).status_code == 200
    assert (await load(client, "blobs")).status_code == 200
    assert (await segment(client)).json()["model"] == "blobs"


async def test_a_refused_model_that_is_mended_is_served(
    client: httpx.AsyncClient, model_repo: Path
) -> None:
    assert (await load(client, "broken")).status_code == 503
    (model_repo / "broken" / "1" / "model.onnx").write_bytes(build_graph())
    assert (await load(client, "broken")).status_code == 200
    assert (await segment(client, model="broken")).status_code == 200
    assert 'solo_model_refused{model="broken"} 0.0' in (await client.get("/metrics")).text


@pytest.mark.parametrize("name", ["nothing", "..", ".", "%2e%2e", "blobs%2f1", ".hidden"])
async def test_names_that_are_no_folder_are_unknown(
    client: httpx.AsyncClient, model_repo: Path, name: str
) -> None:
    (model_repo / ".hidden").mkdir()
    assert (await client.post(f"/v2/repository/models/{name}/load")).status_code in (404, 405)


async def test_models_are_changed_only_where_that_is_switched_on(
    settings: Settings, open_client: OpenClient
) -> None:
    app = create_app(settings, load_repository(settings.model_repo, OPTIONS))
    async with open_client(app) as client:
        for verb in ("load", "unload"):
            response = await client.post(f"/v2/repository/models/blobs/{verb}")
            assert (response.status_code, response.json()["code"]) == (403, "forbidden")
        assert (await client.post("/v2/repository/index")).status_code == 200


async def test_only_an_administrators_key_changes_models(
    controlled: Settings, open_client: OpenClient, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    user, admin = add_key(file, "user"), add_key(file, "admin", admin=True)
    changed = controlled.model_copy(update={"keys_file": file})
    app = create_app(changed, load_repository(changed.model_repo, OPTIONS))
    async with open_client(app) as client:
        path = "/v2/repository/models/blobs/load"
        assert (await client.post(path)).status_code == 401
        assert (await client.post(path, headers={"X-API-Key": user})).status_code == 403
        assert (await client.post(path, headers={"X-API-Key": admin})).status_code == 200


async def test_a_repository_that_is_watched_follows_its_folders(
    settings: Settings, open_client: OpenClient, model_repo: Path
) -> None:
    watched = settings.model_copy(update={"model_poll_s": 0.02})
    app = create_app(watched, load_repository(watched.model_repo, OPTIONS))
    async with open_client(app) as client:
        store = get_store(app)
        add_version(model_repo / "blobs", 2)
        async with asyncio.timeout(10):
            while 2 not in store.served["blobs"]:
                await asyncio.sleep(0.01)
        publish(model_repo, "late")
        async with asyncio.timeout(10):
            while "late" not in store.served:
                await asyncio.sleep(0.01)
        add_version(model_repo / "blobs", 3, graph=b"broken")
        async with asyncio.timeout(10):
            while "blobs" not in store.unavailable:
                await asyncio.sleep(0.01)
        assert sorted(store.served["blobs"]) == [2]
        (model_repo / "wide" / "config.json").unlink()
        async with asyncio.timeout(10):
            while "wide" in store.served:
                await asyncio.sleep(0.01)
        assert (await segment(client, model="late")).status_code == 200


@pytest.mark.usefixtures("client")
async def test_errors_name_what_is_there(app: FastAPI) -> None:
    store = get_store(app)
    with pytest.raises(UnknownModel, match=r"no model 'x', only \['blobs', 'wide'\]"):
        store.find("x", None)
    with pytest.raises(UnknownVersion, match="in version 1, not 9"):
        store.find("blobs", 9)
    with pytest.raises(ModelUnavailable, match="'broken' is not served"):
        store.find("broken", None)


@pytest.mark.usefixtures("client")
async def test_reloading_twenty_times_does_not_grow(app: FastAPI, model_repo: Path) -> None:
    store = get_store(app)
    sizes = []
    for index in range(25):
        edit_config(model_repo / "blobs", lambda c, i=index: c.update(description=f"take {i}"))  # type: ignore[misc]
        await store.load("blobs")
        await wait_for_retirement(store)
        gc.collect()
        sizes.append(read_resident_bytes(os.getpid()))
    assert max(sizes[-5:]) - max(sizes[:5]) < 12_000_000


async def test_requests_that_name_no_model_are_refused_where_none_is_the_default(
    settings: Settings, open_client: OpenClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A second model beside the first does not take its requests over."""
    root = tmp_path / "repo"
    publish(root, "nuclei")
    update = {"model_repo": root, "default_model": None, "model_control": True}
    changed = settings.model_copy(update=update)
    app = create_app(changed, load_repository(root, OPTIONS))
    caplog.set_level("INFO")
    async with open_client(app) as client:
        assert (await segment(client)).json()["model"] == "nuclei"
        publish(root, "mine")
        loaded = (await load(client, "mine")).json()
        assert loaded == {"name": "mine", "versions": ["1"], "default_model": None}
        assert "refused, because none of ['mine', 'nuclei'] is the default" in caplog.text
        refused = await segment(client)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "ambiguous_model")
        assert "['mine', 'nuclei']" in refused.json()["error"]["message"]
        for name in ("mine", "nuclei"):
            assert (await segment(client, model=name)).json()["model"] == name
        assert (await client.get("/v2/models")).json()["default_model"] is None
        write_default(root, "nuclei")
        assert (await load(client, "nuclei")).json()["default_model"] == "nuclei"
        assert (await segment(client)).json()["model"] == "nuclei"
        assert (await client.get("/v2/models")).json()["default_model"] == "nuclei"


async def test_the_setting_goes_before_what_the_repository_says(
    settings: Settings, open_client: OpenClient, model_repo: Path
) -> None:
    write_default(model_repo, "wide")
    for setting, expected in (("blobs", "blobs"), (None, "wide")):
        changed = settings.model_copy(update={"default_model": setting})
        app = create_app(changed, load_repository(model_repo, OPTIONS))
        async with open_client(app) as client:
            assert (await segment(client)).json()["model"] == expected


async def test_a_model_without_the_precision_is_served_in_fp32_and_says_so(
    settings: Settings, open_client: OpenClient, model_repo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graph = build_graph()
    (model_repo / "blobs" / "1" / "model.int8.onnx").write_bytes(graph)

    def add(content: dict[str, Any]) -> None:
        files = content["versions"]["1"]["files"]
        files["model.int8.onnx"] = files["model.onnx"]

    edit_config(model_repo / "blobs", add)
    publish(model_repo, "own", limits={"precision": "fp16"})
    changed = settings.model_copy(update={"precision": "int8"})
    app = create_app(changed, load_repository(model_repo, changed.backend_options()))
    async with open_client(app) as client:
        shown = {}
        for name in ("blobs", "wide", "own"):
            assert (await segment(client, model=name)).status_code == 200
            detail = (await client.get(f"/v2/models/{name}")).json()
            shown[name] = detail["precision"], detail["asked_precision"]
        assert shown == {
            "blobs": ("int8", "int8"),
            "wide": ("fp32", "int8"),
            "own": ("fp32", "fp16"),
        }
        metrics = (await client.get("/metrics")).text
        for labels, value in {
            'asked="int8",model="blobs"': "0.0",
            'asked="int8",model="wide"': "1.0",
            'asked="fp16",model="own"': "1.0",
        }.items():
            assert f'solo_model_precision_fallback{{{labels},version="1"}} {value}' in metrics
        ready = (await client.get("/v2/health/ready")).json()
        reasons = {engine["model"]: engine["reason"] for engine in ready["engines"]}
        assert "precision int8 was asked for" in reasons["wide"]
        assert "asked for; precision" not in reasons["blobs"]
    assert "model wide version 1 is served in fp32, not in int8" in caplog.text
    assert "model blobs version 1 is served in" not in caplog.text


async def test_a_repository_that_is_away_is_said_when_a_model_is_to_be_loaded(
    client: httpx.AsyncClient, model_repo: Path
) -> None:
    model_repo.rename(model_repo.with_name("aside"))
    refused = await load(client, "blobs")
    assert (refused.status_code, refused.json()["code"]) == (503, "model_unavailable")
    assert "the model repository cannot be read: No such file" in refused.json()["error"]
    assert (await segment(client)).status_code == 200


async def test_a_wrong_repository_json_does_not_refuse_a_model(
    client: httpx.AsyncClient, model_repo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (model_repo / "repository.json").write_text("{")
    add_version(model_repo / "blobs", 2)
    assert (await load(client, "blobs")).json()["versions"] == ["2"]
    assert "the default model is not changed" in caplog.text
