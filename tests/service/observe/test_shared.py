from __future__ import annotations

import asyncio

import pytest

from service.observe.shared import SharedCalls


class Work:
    """Counts its calls; each returns its number when it is allowed to end."""

    def __init__(self) -> None:
        self.calls = 0
        self.running = 0
        self.may_end = asyncio.Event()

    async def __call__(self) -> int:
        self.calls += 1
        number = self.calls
        self.running += 1
        assert self.running == 1
        await self.may_end.wait()
        self.running -= 1
        return number


async def pass_turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_who_asks_during_a_call_shares_the_next_one() -> None:
    calls, work = SharedCalls[int](), Work()
    first = asyncio.ensure_future(calls.get("a", work))
    await pass_turn()
    later = [asyncio.ensure_future(calls.get("a", work)) for _ in range(10)]
    await pass_turn()
    assert work.calls == 1
    work.may_end.set()
    assert await asyncio.gather(first, *later) == [1] + [2] * 10


async def test_other_keys_have_calls_of_their_own_one_after_the_other() -> None:
    calls, work = SharedCalls[int](), Work()
    asked = [asyncio.ensure_future(calls.get(key, work)) for key in "abab"]
    await pass_turn()
    work.may_end.set()
    assert await asyncio.gather(*asked) == [1, 2, 1, 2]


async def test_a_caller_that_leaves_does_not_end_the_call() -> None:
    calls, work = SharedCalls[int](), Work()
    leaving, staying = [asyncio.ensure_future(calls.get("a", work)) for _ in range(2)]
    await pass_turn()
    leaving.cancel()
    await pass_turn()
    assert leaving.cancelled()
    work.may_end.set()
    assert await staying == 1


async def test_an_error_reaches_all_callers_and_ends_with_the_call() -> None:
    calls, work = SharedCalls[int](), Work()
    work.may_end.set()

    async def fail() -> int:
        raise OSError("no")

    failed = await asyncio.gather(
        calls.get("a", fail), calls.get("a", fail), return_exceptions=True
    )
    assert [str(error) for error in failed] == ["no", "no"]
    assert await calls.get("a", work) == 1


@pytest.mark.parametrize("count", [1, 100])
async def test_nothing_is_kept(count: int) -> None:
    calls, work = SharedCalls[int](), Work()
    work.may_end.set()
    await asyncio.gather(*(calls.get(str(index % 7), work) for index in range(count)))
    assert calls._waiting == {}
