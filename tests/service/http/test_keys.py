from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from service.errors import Overloaded, QuotaExceeded, TooManyImages, TooManyWrongKeys
from service.http.app import create_app
from service.http.keys import MAX_ADDRESSES, WRONG_KEYS, KeySpec, WrongKeys, add_key
from service.models.repository import load_repository
from service.settings import Settings
from service.work.admission import Admission
from service.work.request import ClientProfile
from tests.service.conftest import OPTIONS, OpenClient
from tests.support.blob_model import draw_picture, encode_picture
from tests.support.clock import SetClock

PICTURE = encode_picture(draw_picture())


def build_client(**bounds: Any) -> ClientProfile:
    """What admission knows of a key with these bounds."""
    return KeySpec(name="shop", sha256="0" * 64, **bounds).client


def send(admission: Admission, client: ClientProfile, *costs: int) -> None:
    """A request that is answered at once; raises if it is refused."""
    with admission.admit(client, costs):
        pass


def test_a_keys_client_has_its_bounds_and_its_weight() -> None:
    assert build_client() == ClientProfile(name="key shop")
    assert build_client(max_canvases=3, canvases_per_minute=1.5, weight=2) == ClientProfile(
        name="key shop", weight=2, max_canvases=3, canvases_per_minute=1.5
    )


@pytest.mark.parametrize("bounds", [{"weight": 0}, {"max_canvases": 0}, {"canvases_per_minute": 0}])
def test_a_bound_that_lets_nothing_through_is_refused(bounds: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bounds))):
        build_client(**bounds)


def test_canvases_in_flight_are_bounded_and_freed() -> None:
    admission, shop = Admission(4096), build_client(max_canvases=30)
    with admission.admit(shop, [10, 10]):
        with pytest.raises(QuotaExceeded, match="20 canvases in flight, 11 more would exceed 30"):
            send(admission, shop, 11)
        send(admission, shop, 10)
    send(admission, shop, 30)


def test_a_request_that_fails_frees_its_canvases() -> None:
    admission, shop = Admission(4096), build_client(max_canvases=10)
    with pytest.raises(ZeroDivisionError), admission.admit(shop, [10]):
        raise ZeroDivisionError
    send(admission, shop, 10)


def test_more_than_a_key_may_ever_have_is_another_error() -> None:
    shop = build_client(max_canvases=40)
    with pytest.raises(TooManyImages, match="5 images with 45 canvases together, at most 40"):
        send(Admission(4096), shop, *[9] * 5)


def test_the_rate_fills_up_again() -> None:
    clock = SetClock()
    admission, shop = Admission(4096, clock), build_client(canvases_per_minute=60)
    send(admission, shop, 60)
    with pytest.raises(QuotaExceeded) as refused:
        send(admission, shop, 10)
    assert (refused.value.reason, refused.value.retry_after_s) == ("key_rate", 10)
    clock.now_s += 10
    send(admission, shop, 10)
    clock.now_s += 1e6  # no more than a minute's worth is kept
    send(admission, shop, 60)
    with pytest.raises(QuotaExceeded):
        send(admission, shop, 1)


def test_a_request_beyond_a_minutes_worth_is_served_once_and_paid_for() -> None:
    clock = SetClock()
    admission, shop = Admission(4096, clock), build_client(canvases_per_minute=10)
    send(admission, shop, 30)
    clock.now_s += 120
    with pytest.raises(QuotaExceeded):
        send(admission, shop, 1)
    clock.now_s += 7
    send(admission, shop, 1)


def test_a_request_that_is_refused_costs_nothing() -> None:
    """Whatever refuses it: the key's bounds, the room of the server, or its end."""
    shop = build_client(max_canvases=50, canvases_per_minute=60)
    other = ClientProfile(name="other")
    admission = Admission(128, SetClock())
    with admission.admit(shop, [10]):
        for canvases, error in ((45, QuotaExceeded), (51, TooManyImages)):
            with pytest.raises(error):
                send(admission, shop, canvases)
    with admission.admit(other, [64]), admission.admit(ClientProfile(name="third"), [32]):
        for canvases in (30, 40):
            for _ in range(50):
                with pytest.raises(Overloaded) as caught:
                    send(admission, shop, canvases)
                assert caught.value.reason == "queue_canvases"
    send(admission, shop, 50)  # all that a minute has, but the first 10
    with pytest.raises(QuotaExceeded):
        send(admission, shop, 1)


def test_two_keys_do_not_share_what_they_may_send() -> None:
    admission = Admission(4096, SetClock())
    for name in ("shop", "lab"):
        send(admission, KeySpec(name=name, sha256="0" * 64, canvases_per_minute=10).client, 10)


def test_a_key_that_pauses_is_not_given_its_minute_twice() -> None:
    """What a key has spent is remembered when nothing of it is in flight."""
    admission, shop = Admission(4096, SetClock()), build_client(canvases_per_minute=10)
    send(admission, shop, 10)
    for _ in range(3):
        with pytest.raises(QuotaExceeded):
            send(admission, shop, 1)


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "keys.json"
    bounds = {"free": {}, "small": {"max_canvases": 2}, "slow": {"canvases_per_minute": 1}}
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


async def test_a_503_leaves_the_key_its_canvases(
    settings: Settings, tmp_path: Path, open_client: OpenClient
) -> None:
    key = add_key(tmp_path / "keys.json", "shop", canvases_per_minute=10)
    changed = settings.model_copy(
        update={"keys_file": tmp_path / "keys.json", "max_queue_canvases": 20}
    )
    app = create_app(changed, load_repository(changed.model_repo, OPTIONS))
    async with open_client(app) as client:
        admission = app.state.segmenter.admission
        others = (("a", 10), ("b", 5), ("c", 2))
        with contextlib.ExitStack() as stack:
            for name, canvases in others:
                stack.enter_context(admission.admit(ClientProfile(name=name), [canvases]))
            for _ in range(20):
                refused = await post(client, key, 2)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert (await post(client, key, 10)).status_code == 200
        assert (await post(client, key)).status_code == 429


async def test_bad_images_and_429s_leave_the_key_its_canvases(
    guarded: FastAPI, keys: dict[str, str], open_client: OpenClient
) -> None:
    async with open_client(guarded) as client:
        headers = {"X-API-Key": keys["slow"]}
        for _ in range(5):
            bad = await client.post("/segment", content=b"no image", headers=headers)
            assert bad.status_code == 415
        large = encode_picture(draw_picture(128, 128))  # 9 canvases: more than a minute's worth
        assert (await client.post("/segment", content=large, headers=headers)).status_code == 200
        waits = []
        for _ in range(3):
            refused = await post(client, keys["slow"])
            assert refused.status_code == 429
            waits.append(int(refused.headers["retry-after"]))
        assert waits == sorted(waits, reverse=True)  # being refused does not add to the debt
        assert 530 < waits[0] <= 540


async def test_keys_are_counted_in_canvases(
    guarded: FastAPI, keys: dict[str, str], open_client: OpenClient
) -> None:
    """One image of 9 canvases is more than a key for 2 may ever have in flight."""
    large = encode_picture(draw_picture(128, 128))
    async with open_client(guarded) as client:
        headers = {"X-API-Key": keys["small"]}
        response = await client.post("/segment", content=large, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "too_many_images")
        assert "at most 2 are allowed" in response.json()["error"]["message"]


async def test_a_key_with_too_much_in_flight_is_429(
    guarded: FastAPI, keys: dict[str, str], open_client: OpenClient
) -> None:
    async with open_client(guarded) as client:
        spec = guarded.state.keys.find(keys["small"])
        with guarded.state.segmenter.admission.admit(spec.client, [1]):
            assert (await post(client, keys["small"])).status_code == 200
            refused = await post(client, keys["small"], 2)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert (await post(client, keys["free"], 2)).status_code == 200
        assert (await post(client, keys["small"], 2)).status_code == 200
        assert 'reason="key_canvases"} 1.0' in (await client.get("/metrics")).text


def test_wrong_keys_are_slowed_and_then_refused() -> None:
    clock = SetClock()
    wrong = WrongKeys(clock)
    assert [wrong.count("a") for _ in range(WRONG_KEYS)] == [0.0] * WRONG_KEYS
    assert [wrong.count("a"), wrong.count("a")] == [1.0, 2.0]
    for _ in range(100):  # being refused makes nothing worse
        with pytest.raises(TooManyWrongKeys, match=r"from a$") as caught:
            wrong.count("a")
        assert (caught.value.retry_after_s, caught.value.reason) == (1, "wrong_keys")
    assert wrong.count("b") == 0.0
    clock.now_s += 1
    assert wrong.count("a") == 2.0
    clock.now_s += 3600
    assert [wrong.count("a") for _ in range(WRONG_KEYS + 1)] == [0.0] * WRONG_KEYS + [1.0]


def test_the_addresses_of_wrong_keys_are_bounded() -> None:
    wrong = WrongKeys(SetClock())
    for _ in range(WRONG_KEYS + 2):
        wrong.count("old")
    for number in range(MAX_ADDRESSES - 1):
        wrong.count(f"{number}")
    assert wrong.count("0") == 0.0
    with pytest.raises(TooManyWrongKeys):
        wrong.count("old")
    wrong.count("another")
    assert wrong.count("old") == 0.0
    assert len(wrong._paid_s) == MAX_ADDRESSES


async def test_many_wrong_keys_are_429_and_a_valid_one_is_served(
    guarded: FastAPI,
    keys: dict[str, str],
    open_client: OpenClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("service.http.clients.sleep", sleep)
    monkeypatch.setattr("service.http.keys.WRONG_KEY_EVERY_S", 60.0)
    monkeypatch.setattr("service.http.keys.MAX_DELAY_S", 60.0)
    async with open_client(guarded) as client:
        statuses = [(await post(client, f"wrong {n}")).status_code for n in range(20)]
        assert statuses == [401] * (WRONG_KEYS + 1) + [429] * (19 - WRONG_KEYS)
        assert slept[:WRONG_KEYS] == [0.0] * WRONG_KEYS
        assert 59 < slept[WRONG_KEYS] <= 60
        refused = await client.post("/v2/models/blobs/infer", headers={"x-api-key": "wrong"})
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_wrong_keys")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert (await post(client, keys["free"])).status_code == 200
        assert (await client.post("/segment", content=b"")).status_code == 401  # no key at all
        text = (await client.get("/metrics")).text
        assert f'solo_rejections_total{{reason="wrong_keys"}} {20.0 - WRONG_KEYS}' in text
        assert f'solo_rejections_total{{reason="unauthorized"}} {WRONG_KEYS + 2.0}' in text
