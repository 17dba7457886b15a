from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, ExitStack

import pytest

from service.errors import Overloaded
from service.grpc.places import Places


def test_a_client_holds_at_most_as_many_as_are_free() -> None:
    places = Places(8)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(places.take("a"))
        with pytest.raises(Overloaded, match="4 of 8 calls are open, 4 of them") as caught:
            stack.enter_context(places.take("a"))
        assert caught.value.reason == "connections"
        for _ in range(2):
            stack.enter_context(places.take("b"))
        with pytest.raises(Overloaded):
            stack.enter_context(places.take("b"))
        with places.take("c"):
            assert places.used == 7
    assert places.used == 0
    with places.take("a"):
        assert places.used == 1


def test_one_place_is_for_anybody() -> None:
    places = Places(1)
    with places.take("a"), pytest.raises(Overloaded), places.take("b"):
        pass
    with places.take("b"):
        assert places.used == 1


async def test_who_waits_is_served_in_turn_and_no_client_waits_for_another() -> None:
    places, order = Places(4), []

    async def work(client: str, name: str, gate: asyncio.Event) -> None:
        async with places.wait(client):
            order.append(name)
            await gate.wait()

    gates = {name: asyncio.Event() for name in ("a1", "a2", "a3", "a4", "b1")}
    tasks = {name: asyncio.create_task(work(name[0], name, gate)) for name, gate in gates.items()}
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert order == ["a1", "a2", "b1"]
    gates["b1"].set()
    await tasks["b1"]
    assert order == ["a1", "a2", "b1"]  # two are free, and a has two
    gates["a1"].set()
    await tasks["a1"]
    await asyncio.sleep(0)
    assert order == ["a1", "a2", "b1", "a3"]
    for gate in gates.values():
        gate.set()
    await asyncio.gather(*tasks.values())
    assert places.used == 0


async def test_who_is_cancelled_while_waiting_holds_nothing() -> None:
    places = Places(2)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(places.wait("a"))
        places_of = [places.wait("a") for _ in range(2)]
        waiting = [asyncio.create_task(place.__aenter__()) for place in places_of]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
        assert places.used == 1
    await asyncio.wait_for(waiting[1], 5)
    assert places.used == 1


async def test_who_is_cancelled_just_as_its_turn_comes_gives_it_on() -> None:
    places = Places(1)
    holder = places.wait("a")
    await holder.__aenter__()

    async def enter() -> None:
        async with places.wait("b"):
            await asyncio.sleep(0)

    waiting = [asyncio.create_task(enter()) for _ in range(2)]
    await asyncio.sleep(0)
    await holder.__aexit__(None, None, None)
    waiting[0].cancel()
    await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
    assert waiting[0].cancelled()
    assert not waiting[1].cancelled()
    assert places.used == 0
