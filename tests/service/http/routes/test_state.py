"""Whose request it is, by API key or address, and who may change models."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import FastAPI, Request

from service.errors import Forbidden, Unauthorized
from service.http.keys import KeyRing, add_key
from service.http.routes.state import find_client, find_key, require_admin
from service.work.request import ClientProfile


def build_request(
    ring: KeyRing | None, headers: dict[str, str] | None = None, peer: str = "10.0.0.1"
) -> Request:
    app = FastAPI()
    app.state.keys = ring
    pairs = [(name.lower().encode(), text.encode()) for name, text in (headers or {}).items()]
    return Request({"type": "http", "headers": pairs, "client": (peer, 1), "app": app})


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "keys.json"
    user = add_key(file, "user", weight=2, max_canvases=8, canvases_per_minute=60)
    return {"user": user, "admin": add_key(file, "admin", admin=True)}


@pytest.fixture
def ring(keys: dict[str, str], tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path / "keys.json")


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": "USER"},
        {"Authorization": "Bearer USER"},
        {"Authorization": "bearer   USER "},
        {"X-API-Key": "USER", "Authorization": "Bearer other"},
        {"X-API-Key": "", "Authorization": "Bearer USER"},
    ],
)
async def test_a_key_is_in_a_header_of_its_own_or_a_bearer_token(
    keys: dict[str, str], ring: KeyRing, headers: dict[str, str]
) -> None:
    given = {name: text.replace("USER", keys["user"]) for name, text in headers.items()}
    request = build_request(ring, given)
    spec = await find_key(request)
    assert spec is not None and spec.name == "user"
    assert await find_client(request) == ClientProfile(
        name="key user", weight=2, max_canvases=8, canvases_per_minute=60
    )


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "an API key is needed"),
        ({"X-API-Key": ""}, "an API key is needed"),
        ({"Authorization": "USER"}, "an API key is needed"),
        ({"Authorization": "Bearer"}, "an API key is needed"),
        ({"Authorization": "Basic USER"}, "an API key is needed"),
        ({"X-API-Key": "other"}, "the API key is not known"),
        ({"Authorization": "Bearer other"}, "the API key is not known"),
        ({"X-API-Key": "other", "Authorization": "Bearer USER"}, "the API key is not known"),
    ],
)
async def test_a_request_without_a_known_key_is_refused(
    keys: dict[str, str], ring: KeyRing, headers: dict[str, str], message: str
) -> None:
    given = {name: text.replace("USER", keys["user"]) for name, text in headers.items()}
    for find in (find_key, find_client, require_admin):
        with pytest.raises(Unauthorized, match=message):
            await find(build_request(ring, given))


async def test_where_no_keys_are_asked_for_none_is_read() -> None:
    request = build_request(None, {"X-API-Key": "anything"})
    assert await find_key(request) is None
    assert (await find_client(request)).name == "10.0.0.1"
    await require_admin(request)  # nothing to be an administrator of


async def test_only_an_administrators_key_passes(keys: dict[str, str], ring: KeyRing) -> None:
    await require_admin(build_request(ring, {"X-API-Key": keys["admin"]}))
    with pytest.raises(Forbidden, match="key 'user' is not an administrator's"):
        await require_admin(build_request(ring, {"X-API-Key": keys["user"]}))


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8:0:1:ffff::9", "2001:db8:0:1::/64"),
        ("2001:db8:0:1:8000::", "2001:db8:0:1::/64"),
        ("::1", "::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("a socket", "a socket"),
    ],
)
async def test_an_address_is_a_client_and_of_ipv6_the_network(peer: str, name: str) -> None:
    assert await find_client(build_request(None, peer=peer)) == ClientProfile(name=name)
