from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.errors import QuotaExceeded, StartupError, TooManyImages
from service.http.app import create_app
from service.http.keys import KeyRing, KeySpec, Quota, add_key, main
from service.models.repository import load_repository
from service.settings import Settings
from tests.service.conftest import OPTIONS, OpenClient
from tests.support.blob_model import draw_picture, encode_picture

PICTURE = encode_picture(draw_picture())


class Clock:
    """A clock that is set by hand."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def build_quota(clock: Clock, **bounds: Any) -> Quota:
    return Quota(KeySpec(name="shop", sha256="0" * 64, **bounds), clock)


def test_images_in_work_are_bounded_and_freed() -> None:
    quota = build_quota(Clock(), max_images=3)
    with quota.admit(2):
        with pytest.raises(QuotaExceeded, match="2 images in work, 2 more would exceed 3"):
            quota.admit(2).__enter__()
        with quota.admit(1):
            pass
    with quota.admit(3):
        pass


def test_a_request_that_fails_frees_its_images() -> None:
    quota = build_quota(Clock(), max_images=1)
    with pytest.raises(ZeroDivisionError), quota.admit(1):
        raise ZeroDivisionError
    with quota.admit(1):
        pass


def test_more_than_a_key_may_ever_have_is_another_error() -> None:
    with pytest.raises(TooManyImages, match="has 5 images, key 'shop' may have 4"):
        build_quota(Clock(), max_images=4).admit(5).__enter__()


def test_the_rate_fills_up_again() -> None:
    clock = Clock()
    quota = build_quota(clock, images_per_minute=60)
    with quota.admit(60):
        pass
    with pytest.raises(QuotaExceeded) as refused:
        quota.admit(10).__enter__()
    assert (refused.value.reason, refused.value.retry_after_s) == ("key_rate", 10)
    clock.now_s += 10
    with quota.admit(10):
        pass
    clock.now_s += 1e6  # no more than a minute's worth is kept
    with quota.admit(60):
        pass
    with pytest.raises(QuotaExceeded):
        quota.admit(1).__enter__()


def test_a_request_beyond_a_minutes_worth_is_served_once_and_paid_for() -> None:
    clock = Clock()
    quota = build_quota(clock, images_per_minute=10)
    with quota.admit(30):
        pass
    clock.now_s += 120
    with pytest.raises(QuotaExceeded):
        quota.admit(1).__enter__()
    clock.now_s += 7
    with quota.admit(1):
        pass


def test_a_refused_request_costs_nothing() -> None:
    quota = build_quota(Clock(), max_images=2, images_per_minute=2)
    with quota.admit(1):
        with pytest.raises(QuotaExceeded):
            quota.admit(2).__enter__()
        with quota.admit(1):
            pass


def test_the_file_holds_hashes_and_is_private(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key, other = add_key(file, "shop", max_images=3), add_key(file, "lab", admin=True)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text()
    assert key not in text and other not in text
    assert hashlib.sha256(key.encode()).hexdigest() in text
    ring = KeyRing(file)
    shop, lab = ring.find(key), ring.find(other)
    assert shop is not None and lab is not None
    assert (shop.spec.name, shop.spec.max_images, lab.spec.admin) == ("shop", 3, True)
    for wrong in ("", key[:-1], key + "x", "ключ"):
        assert ring.find(wrong) is None


def test_the_command_prints_a_key_that_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.json"
    assert main(["shop", "--file", str(file), "--max-images", "2"]) == 0
    assert KeyRing(file).find(capsys.readouterr().out.strip()) is not None
    assert main(["shop", "--file", str(file)]) == 1
    assert "has a key for 'shop' already" in capsys.readouterr().err
    assert main(["a b", "--file", str(file)]) == 1


def test_a_changed_file_is_read_again_and_a_broken_one_is_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, clock = tmp_path / "keys.json", Clock()
    first = add_key(file, "first")
    ring = KeyRing(file, clock)
    quota = ring.find(first)
    second = add_key(file, "second")
    assert ring.find(second) is None  # not looked at yet
    clock.now_s += 2
    assert ring.find(second) is not None
    assert ring.find(first) is quota  # with what it has in work
    file.write_text('{"keys": [{"name": "x"}]}')
    clock.now_s += 2
    assert ring.find(first) is quota
    assert "keys.0.sha256" in caplog.text and "stay valid" in caplog.text
    file.unlink()
    clock.now_s += 2
    assert ring.find(first) is quota
    add_key(file, "third")
    clock.now_s += 2
    assert ring.find(first) is None


@pytest.mark.parametrize("content", ["", "[]", '{"keys": [{"name": "a", "sha256": "xyz"}]}'])
def test_a_broken_file_stops_the_start(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(StartupError, match=r"keys\.json"):
        KeyRing(file)
    with pytest.raises(StartupError, match="nowhere"):
        KeyRing(tmp_path / "nowhere.json")


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "keys.json"
    bounds = {"free": {}, "small": {"max_images": 2}, "slow": {"images_per_minute": 1}}
    return {name: add_key(file, name, **b) for name, b in bounds.items()}


@pytest.fixture
def guarded(settings: Settings, keys: dict[str, str], tmp_path: Path) -> FastAPI:
    changed = settings.model_copy(update={"keys_file": tmp_path / "keys.json"})
    return create_app(changed, load_repository(changed.model_repo, OPTIONS))


async def post(client: httpx.AsyncClient, key: str, images: int = 1) -> httpx.Response:
    files = [("images", ("a.png", PICTURE))] * images
    return await client.post("/segment", files=files, headers={"X-API-Key": key})


async def test_without_a_known_key_nothing_is_segmented(
    guarded: FastAPI, keys: dict[str, str], open_client: OpenClient
) -> None:
    async with open_client(guarded) as client:
        bearer = {"Authorization": f"Bearer {keys['free']}"}
        basic = {"Authorization": f"Basic {keys['free']}"}
        for headers in ({}, {"X-API-Key": "wrong"}, basic):
            response = await client.post("/segment", content=PICTURE, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "unauthorized"
            assert response.headers["www-authenticate"] == "Bearer"
        assert (await post(client, keys["free"])).status_code == 200
        accepted = await client.post("/segment", content=PICTURE, headers=bearer)
        assert accepted.status_code == 200
        assert (await client.get("/v2/health/ready")).status_code == 200
        metrics = (await client.get("/metrics")).text
        assert 'solo_rejections_total{reason="unauthorized"} 3.0' in metrics
        assert keys["free"] not in metrics


async def test_a_key_beyond_its_share_is_429_with_retry_after(
    guarded: FastAPI, keys: dict[str, str], open_client: OpenClient
) -> None:
    async with open_client(guarded) as client:
        assert (await post(client, keys["small"], 2)).status_code == 200
        assert (await post(client, keys["small"], 3)).status_code == 413
        assert (await post(client, keys["slow"])).status_code == 200
        refused = await post(client, keys["slow"])
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "quota_exceeded"
        assert (await post(client, keys["free"])).status_code == 200
        assert 'reason="key_rate"} 1.0' in (await client.get("/metrics")).text


def test_the_file_is_replaced_and_never_half_written(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    add_key(file, "a")
    inode = os.stat(file).st_ino
    add_key(file, "b")
    assert os.stat(file).st_ino != inode
    assert [k["name"] for k in json.loads(file.read_text())["keys"]] == ["a", "b"]
    assert os.listdir(tmp_path) == ["keys.json"]
