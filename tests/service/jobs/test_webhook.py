from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import itertools
import socket
from typing import Any

import pytest

from service.errors import InvalidParameter, SourceForbidden, StartupError
from service.jobs import webhook as module
from service.jobs.webhook import NotDelivered, Webhooks, build_webhooks, is_public, wait_s
from tests.support.receiver import receive_webhooks

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()


def allow(hosts: str = "127.0.0.1", *, private: bool = True) -> Webhooks:
    return build_webhooks(SECRET, hosts, allow_private=private)


async def test_a_webhook_is_signed_and_has_its_id_in_every_attempt() -> None:
    with receive_webhooks() as receiver:
        receiver.statuses = [500]
        with pytest.raises(NotDelivered, match="status 500"):
            await allow().send(receiver.url, "job1", b'{"a":1}')
        await allow().send(receiver.url, "job1", b'{"a":1}')
    assert len(receiver.received) == 2
    for headers, body in receiver.received:
        assert headers["webhook-id"] == "job1" and body == b'{"a":1}'
        signed = f"job1.{headers['webhook-timestamp']}.".encode() + body
        expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"
        assert headers["host"] in receiver.url
        assert headers["content-type"] == "application/json"


async def test_redirects_are_not_followed() -> None:
    with receive_webhooks() as receiver, receive_webhooks() as other:
        receiver.statuses, receiver.location = [307], other.url
        with pytest.raises(NotDelivered, match="status 307"):
            await allow().send(receiver.url, "job1", b"{}")
    assert other.received == []


async def test_private_addresses_are_refused_whatever_the_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with receive_webhooks() as receiver:
        with pytest.raises(NotDelivered, match=r"has the address 127\.0\.0\.1, not a public one"):
            await allow("*", private=False).send(receiver.url, "job1", b"{}")
        port = receiver.url.rpartition(":")[2].partition("/")[0]
        with pytest.raises(NotDelivered, match="not a public one"):
            await allow("*", private=False).send(f"http://localhost:{port}/", "job1", b"{}")
    assert receiver.received == []


async def test_the_connection_goes_to_the_address_that_was_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name that gives another address when it is resolved again does not matter."""
    asked = []
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        if host == "hook.example.com":
            asked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]
        return real(host, port, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with receive_webhooks() as receiver:
        url = receiver.url.replace("127.0.0.1", "hook.example.com")
        await allow("*.example.com").send(url, "job1", b"{}")
    assert asked == ["hook.example.com"]
    assert receiver.received[0][0]["host"].startswith("hook.example.com:")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.0.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("2002:7f00:1::", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::808:808", True),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) == public


async def test_a_receiver_that_is_not_there_or_silent_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with receive_webhooks() as receiver:
        gone = receiver.url
    with pytest.raises(NotDelivered):
        await allow().send(gone, "job1", b"{}")
    with pytest.raises(NotDelivered):
        await allow("*").send("http://no-such-host.invalid/", "job1", b"{}")
    monkeypatch.setattr(module, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(NotDelivered):
            await allow().send(url, "job1", b"{}")


@pytest.mark.parametrize(
    "url",
    ["", "ftp://127.0.0.1/", "127.0.0.1/hook", "http://", "http://u:p@127.0.0.1/", "http://[::1"],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidParameter, match="webhook: "):
        allow().check(url)


def test_hosts_must_be_named() -> None:
    allowed = allow("Hooks.example.com, *.internal")
    for url in (
        "https://hooks.example.com/",
        "http://a.internal:8080/x",
        "https://HOOKS.example.com.",
    ):
        allowed.check(url)
    for url in ("https://example.com/", "https://hooks.example.com.evil.net/", "https://internal/"):
        with pytest.raises(SourceForbidden, match="is not allowed"):
            allowed.check(url)
    with pytest.raises(SourceForbidden, match="no secret"):
        build_webhooks("", "*", allow_private=False).check("https://example.com/")


@pytest.mark.parametrize("secret", ["whsec_not base64!", "whsec_" + "A" * 8])
def test_a_weak_or_wrong_secret_is_refused_without_repeating_it(secret: str) -> None:
    with pytest.raises(StartupError, match="jobs_webhook_secret") as caught:
        build_webhooks(secret, "*", allow_private=False)
    assert secret not in str(caught.value)


def test_waits_double() -> None:
    waits = [wait_s(attempt) for attempt in range(1, module.ATTEMPTS)]
    assert all(2 * a == b for a, b in itertools.pairwise(waits))
    assert 1800 < sum(waits) < 7200
