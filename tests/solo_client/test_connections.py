"""Clients in several processes, event loops and threads, against a server on a real socket."""

from __future__ import annotations

import asyncio
import copy
import gc
import multiprocessing
import os
import pickle
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from solo_client import AsyncClient, Busy, Client, ConnectionFailed, Result, Retry
from solo_client.connections import CALLS
from tests.solo_client.conftest import INSTANCE, answer, found
from tests.solo_client.fake_server import FakeServer, line, stream
from tests.support.processes import free_port

ANSWER = answer(found(INSTANCE))
WHOLE = stream(line(result=ANSWER))
"""After this answer the connection is used again."""


def give_answer(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json=ANSWER)


def count_sockets() -> int:
    """Open sockets of this process."""
    count = 0
    for descriptor in range(512):
        with suppress(OSError):
            count += stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    return count


def run_forked(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked process."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            writer.send(work())
        except BaseException as error:
            writer.send(repr(error))
        finally:
            os._exit(0)
    writer.close()
    try:
        return reader.recv()
    finally:
        os.waitpid(child, 0)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def count_found(client: Client) -> int:
    return len(client.segment(b"file").instances)


@needs_fork
def test_a_forked_process_opens_its_own_connection() -> None:
    with FakeServer(*[WHOLE] * 4) as server, Client(server.url) as client:
        assert count_found(client) == 1
        sockets = count_sockets()

        def work() -> tuple[int, int]:
            count = count_found(client)
            gc.collect()
            return count, count_sockets()

        assert run_forked(work) == (1, sockets), "the parent's connection is closed in the child"
        assert server.connections == 2
        assert run_forked(lambda: run_forked(lambda: count_found(client))) == 1
        assert server.connections == 3
        assert count_found(client) == 1
        assert server.connections == 3, "the parent goes on with its own connection"


@needs_fork
def test_a_fork_while_another_thread_holds_the_client_does_not_block_the_child() -> None:
    with FakeServer(WHOLE) as server, Client(server.url) as client, client._lock:
        assert run_forked(lambda: count_found(client)) == 1


@needs_fork
def test_an_async_client_is_used_in_a_forked_process() -> None:
    async def ask(client: AsyncClient) -> int:
        return len((await client.segment(b"file")).instances)

    with FakeServer(*[WHOLE] * 2) as server:
        client = AsyncClient(server.url)
        assert asyncio.run(ask(client)) == 1
        assert run_forked(lambda: asyncio.run(ask(client))) == 1
        assert server.connections == 2


def test_a_client_reaches_another_process_by_pickle() -> None:
    retry = Retry(attempts=2, backoff_s=0)
    with FakeServer(*[WHOLE] * 2) as server:
        with Client(server.url, api_key="secret", timeout_s=20, retry=retry) as client:
            assert count_found(client) == 1
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                assert pool.apply_async(count_found, [client]).get(timeout=60) == 1
        assert server.connections == 2
        assert all("x-api-key: secret\n" in head.lower() for head in server.heads)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("way", [copy.copy, lambda client: pickle.loads(pickle.dumps(client))])
def test_a_copy_has_the_settings(
    kind: type[Client | AsyncClient], way: Callable[[Any], Any]
) -> None:
    retry = Retry(attempts=2)
    client = kind("http://user:word@host/solo", api_key="secret", timeout_s=None, retry=retry)
    same = way(client)
    assert type(same) is kind
    assert same._arguments == client._arguments
    assert same._pools is not client._pools
    with pytest.raises(TypeError, match="transport of its own"):
        way(kind("http://host", transport=httpx.MockTransport(give_answer)))


def test_a_copy_of_a_closed_client_is_open() -> None:
    with Client("http://host") as client:
        pass
    copy.copy(client)._open()


async def find_one(client: AsyncClient) -> int:
    return len((await client.segment(b"file")).instances)


def test_an_async_client_serves_one_event_loop_after_the_other() -> None:
    with FakeServer(*[WHOLE] * 5) as server:
        client = AsyncClient(server.url)
        assert [asyncio.run(find_one(client)) for _ in range(3)] == [1, 1, 1]
        assert server.connections == 3
        assert len(client._pools) == 1, "the pools of closed loops are dropped"

        async def ask_twice() -> None:
            async with client:
                assert await find_one(client) == await find_one(client) == 1

        asyncio.run(ask_twice())
        assert server.connections == 4
        with pytest.raises(RuntimeError, match="the client is closed"):
            asyncio.run(ask_twice())


def test_an_async_client_serves_event_loops_at_once() -> None:
    together = threading.Barrier(2)

    async def ask(client: AsyncClient) -> int:
        first = await find_one(client)
        await asyncio.to_thread(together.wait, 20)
        return first + await find_one(client)

    with FakeServer(*[WHOLE] * 4) as server, ThreadPoolExecutor(2) as pool:
        client = AsyncClient(server.url)
        runs = [pool.submit(lambda: asyncio.run(ask(client))) for _ in range(2)]
        assert [run.result() for run in runs] == [2, 2]
        assert server.connections == 2


def test_a_transport_belongs_to_one_event_loop() -> None:
    transport = httpx.MockTransport(give_answer)
    client = AsyncClient("http://test", transport=transport)
    assert asyncio.run(find_one(client)) == 1
    with pytest.raises(RuntimeError, match="event loop that used it first; create another client"):
        asyncio.run(find_one(client))


@needs_fork
def test_a_transport_belongs_to_one_process() -> None:
    transport = httpx.MockTransport(give_answer)
    with Client("http://test", transport=transport) as client:
        assert count_found(client) == 1
        assert "create another client" in run_forked(lambda: count_found(client))


def test_a_closed_client_says_so() -> None:
    client = Client("http://test")
    client.close()
    client.close()
    for call in (lambda: client.segment(b"file"), client.list_models, client.is_ready):
        with pytest.raises(RuntimeError, match="the client is closed"):
            call()
    with pytest.raises(RuntimeError, match="the client is closed"), client:
        pass


class Crowd:
    """A transport of httpx that counts the requests that are in it at once."""

    def __init__(self) -> None:
        self.now = self.most = 0

    async def answer(self, request: httpx.Request) -> httpx.Response:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.01)
        self.now -= 1
        return give_answer(request)


async def test_many_calls_at_once_wait_before_they_read_their_images(tmp_path: Path) -> None:
    reading, most = 0, 0

    class Slow(os.PathLike[str]):
        def __fspath__(self) -> str:
            nonlocal reading, most
            reading += 1
            most = max(most, reading)
            return str(tmp_path / "a.png")

    (tmp_path / "a.png").write_bytes(b"file")
    crowd = Crowd()

    async def ask(client: AsyncClient) -> Result:
        nonlocal reading
        result = await client.segment(Slow())
        reading -= 1
        return result

    async with AsyncClient("http://test", transport=httpx.MockTransport(crowd.answer)) as client:
        results = await asyncio.gather(*(ask(client) for _ in range(400)))
    assert [len(result.instances) for result in results] == [1] * 400
    assert 1 < crowd.most <= CALLS
    assert 1 < most <= CALLS


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 60), ({"timeout_s": 0.001}, 0.001), ({"timeout_s": None}, None)],
)
def test_the_timeout_bounds_all_but_the_wait_for_a_connection(
    options: dict[str, Any], expected: float | None
) -> None:
    with Client("http://test", **options) as client:
        assert client._http.timeout == httpx.Timeout(expected, pool=None)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
def test_a_wrong_timeout_is_refused(timeout_s: float) -> None:
    with pytest.raises(ValueError, match=f"timeout_s is {timeout_s}"):
        Client("http://test", timeout_s=timeout_s)


@pytest.mark.parametrize("key", ["", "key\n", "schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ValueError, match="API key") as caught:
        Client("http://test", api_key=key)
    assert not key or key not in str(caught.value)


def test_a_name_and_a_password_in_the_address_are_sent_and_not_shown() -> None:
    once = Retry(attempts=1)
    with FakeServer(WHOLE, [b""]) as server:
        address = server.url.replace("http://", "http://name:s3cret@")
        with Client(address, retry=once) as client:
            assert count_found(client) == 1
            with pytest.raises(ConnectionFailed, match=server.url) as caught:
                client.segment(b"file")
    assert "s3cret" not in str(caught.value)
    assert "authorization: basic " in server.heads[0].lower()


def test_a_proxy_of_the_environment_is_used_unless_it_is_excluded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    refusal = b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n"
    with FakeServer(WHOLE, [refusal]) as proxy, FakeServer(WHOLE) as server:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        with Client("http://solo.example:8000") as client:
            assert count_found(client) == 1
        once = Retry(attempts=1)
        with Client("http://solo.example", retry=once) as client, pytest.raises(Busy) as busy:
            client.segment(b"file")
        assert busy.value.status == 502
        assert proxy.heads[0].startswith("POST http://solo.example:8000/segment HTTP/1.1\n")
        monkeypatch.setenv("NO_PROXY", "fd00::/8,127.0.0.0/8")
        with Client(server.url) as client:
            assert count_found(client) == 1
        assert (proxy.connections, server.connections) == (2, 1)


def test_a_proxy_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://name:s3cret@127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", "")
    with (
        Client("http://solo.example", retry=Retry(attempts=1)) as client,
        pytest.raises(ConnectionFailed, match="through the proxy http://127") as caught,
    ):
        client.segment(b"file")
    assert "s3cret" not in str(caught.value)
