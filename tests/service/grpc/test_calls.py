from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from service.errors import Overloaded
from service.grpc.calls import MAX_ARRIVING, Rpc, RpcState, read_address
from service.http.limits import RequestBodies
from service.observe.metrics import Metrics
from service.settings import Settings


def build_state(max_bodies: int = 1000, **changes: Any) -> RpcState:
    application = SimpleNamespace(
        settings=Settings(**changes),
        segmenter=None,
        metrics=Metrics(),
        bodies=RequestBodies(max_bodies),
        version="0",
        keys=None,
        tracer=None,
    )
    return RpcState(cast(Any, application))


def build_rpc(state: RpcState, peer: str = "ipv4:10.0.0.7:5", **metadata: str) -> Rpc:
    sent = tuple((name.replace("_", "-"), value) for name, value in metadata.items())
    context = SimpleNamespace(invocation_metadata=lambda: sent, peer=lambda: peer)
    return Rpc(state, "/service/Call", context)


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:127.0.0.1:80", "127.0.0.1"),
        ("ipv6:%5B::1%5D:50051", "::1"),
        ("ipv6:[fe80::1%25eth0]:1", "fe80::1%eth0"),
        ("unix:/run/x", "unix:/run/x"),
        ("", ""),
    ],
)
def test_the_address_of_a_peer(peer: str, address: str) -> None:
    assert read_address(peer) == address


def test_a_trusted_proxy_names_the_client() -> None:
    state = build_state(trusted_proxies="10.0.0.7")
    assert build_rpc(state, x_forwarded_for="10.0.0.8").address_name == "10.0.0.8"
    direct = build_rpc(build_state(), x_forwarded_for="10.0.0.8")
    assert direct.address_name == "10.0.0.7"


def test_the_id_of_a_request_is_the_clients_if_it_is_harmless() -> None:
    state = build_state()
    assert build_rpc(state, x_request_id="a-1").request_id == "a-1"
    assert len(build_rpc(state, x_request_id="a b\n").request_id) == 32


def test_no_more_messages_are_incomplete_than_there_is_memory_for() -> None:
    assert build_state().readers.total == MAX_ARRIVING
    small = build_state(max_body_bytes=100, max_bodies_bytes=150)
    assert (small.readers.total, small.streams.total) == (4, 4)


def test_messages_are_counted_as_bodies() -> None:
    state = build_state()
    rpc = build_rpc(state)
    with rpc.hold(bytes(600)):
        assert state.bodies.held == 600
        with pytest.raises(Overloaded, match="1100 bytes") as caught, rpc.hold(bytes(500)):
            pass
        assert caught.value.reason == "body_bytes"
        with rpc.hold(bytes(400)):
            assert state.bodies.held == 1000
    assert state.bodies.held == 0


def test_errors_are_counted_and_unexpected_ones_say_nothing() -> None:
    rpc = build_rpc(build_state(retry_after_s=7))
    status, detail, retry_s = rpc.describe(Overloaded("full", "queue_canvases"))
    assert (status, detail, retry_s) == (503, {"code": "overloaded", "message": "full"}, 7)
    status, detail, retry_s = rpc.describe(RuntimeError("secret"))
    assert (status, detail["code"], retry_s) == (500, "internal_error", None)
    assert "secret" not in detail["message"]
