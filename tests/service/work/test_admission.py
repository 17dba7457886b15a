"""Admission: limits, shares of clients, quotas of keys."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from service.errors import Draining, Overloaded, QuotaExceeded, TooManyImages
from service.work.admission import Admission
from service.work.request import ClientProfile
from tests.support.clock import SetClock

ANN, BOB, CAT = (ClientProfile(name=name) for name in ("ann", "bob", "cat"))


def refuse(admission: Admission, client: ClientProfile, *costs: int) -> Exception:
    """The error of a request that is refused."""
    with pytest.raises((Overloaded, QuotaExceeded, TooManyImages, Draining)) as caught:
        admission.admit(client, costs).__enter__()
    return caught.value


def test_work_is_counted_until_it_is_done() -> None:
    admission = Admission(100)
    with admission.admit(ANN, [30, 5]):
        assert (admission.images, admission.canvases, admission.held(ANN)) == (2, 35, 35)
        with admission.admit(BOB, [10]):
            assert (admission.images, admission.canvases) == (3, 45)
            assert (admission.held(ANN), admission.held(BOB)) == (35, 10)
    assert (admission.images, admission.canvases, admission.held(ANN)) == (0, 0, 0)


def test_work_that_fails_gives_its_room_back() -> None:
    admission = Admission(8)
    with pytest.raises(RuntimeError), admission.admit(ANN, [4]):
        raise RuntimeError
    assert (admission.images, admission.canvases, admission.held(ANN)) == (0, 0, 0)


def test_what_does_not_fit_now_is_overload() -> None:
    admission = Admission(100)
    with admission.admit(ANN, [50]), admission.admit(BOB, [25]):
        error = refuse(admission, CAT, 26)
        assert isinstance(error, Overloaded) and error.reason == "queue_canvases"
        assert str(error) == "75 of 100 canvases are in flight, there is no room for 26 more"
        error = refuse(admission, CAT, 13)
        assert isinstance(error, Overloaded) and error.reason == "queue_canvases"
        with admission.admit(CAT, [12]):
            assert admission.canvases == 87


def test_a_request_may_fill_half_of_an_idle_server() -> None:
    admission = Admission(100)
    with admission.admit(ANN, [30, 20]):
        assert admission.canvases == 50


def test_a_client_holds_no_more_than_is_free() -> None:
    admission = Admission(100)
    with admission.admit(ANN, [30]), admission.admit(ANN, [20, 0]):
        error = refuse(admission, ANN, 1)
        assert isinstance(error, Overloaded) and error.reason == "client_share"
        assert "50 canvases in flight, 1 more would exceed its share" in str(error)
        assert "as many as are free (50 of 100)" in str(error)
        with admission.admit(BOB, [25]):  # there is room for others
            assert isinstance(refuse(admission, BOB, 1), Overloaded)
            with admission.admit(CAT, [12]):
                pass


@pytest.mark.parametrize("clients", [1, 2, 5, 20])
def test_greedy_clients_leave_room_for_another(clients: int) -> None:
    """Each takes one canvas after another as long as it can."""
    admission = Admission(1000)
    with ExitStack() as stack:
        for _ in range(1000):
            for index in range(clients):
                try:
                    stack.enter_context(admission.admit(ClientProfile(name=f"{index}"), [1]))
                except Overloaded:
                    continue
        held = [admission.held(ClientProfile(name=f"{index}")) for index in range(clients)]
        assert min(held) >= 1000 // (clients + 1) - 1
        with admission.admit(ANN, [1000 // (clients + 1) // 2]):
            pass


@pytest.mark.parametrize("costs", [[51], [30, 21]])
def test_what_can_never_fit_is_no_overload(costs: list[int]) -> None:
    error = refuse(Admission(100), ANN, *costs)
    assert isinstance(error, TooManyImages)
    assert f"{len(costs)} images with {sum(costs)} canvases" in str(error)
    assert "at most 50" in str(error)


def test_closed_admission_takes_nothing_and_lets_accepted_work_end() -> None:
    admission = Admission(4)
    with admission.admit(ANN, [1]):
        assert Admission(4).is_open
        admission.close()
        assert not admission.is_open
        assert isinstance(refuse(admission, BOB, 1), Draining)
        with pytest.raises(Draining):
            admission.request(BOB).__enter__()
    assert admission.canvases == 0


def test_a_request_is_refused_before_its_body_is_read_if_nothing_fits() -> None:
    admission = Admission(4)
    with admission.admit(ANN, [2]):
        with pytest.raises(Overloaded, match="the client has 2"):
            admission.request(ANN).__enter__()
        with admission.request(BOB):
            assert admission.requests == 1
            full = pytest.raises(Overloaded, match="3 of 4 canvases are in flight")
            with admission.admit(BOB, [1]), full:
                admission.request(CAT).__enter__()
        assert admission.requests == 0


async def test_finishing_waits_for_the_requests_in_flight(
    caplog: pytest.LogCaptureFixture,
) -> None:
    admission = Admission(4)
    assert await admission.finish(0.0)
    admission = Admission(4)
    with admission.request(ANN):
        assert not await admission.finish(0.02)
        assert "1 requests were not finished" in caplog.text
        finishing = asyncio.create_task(admission.finish(3.0))
        await asyncio.sleep(0.05)
        assert not finishing.done()
    assert await finishing
    assert await admission.finish(10.0)
    assert not admission.is_open


class TestQuotas:
    KEY = ClientProfile(name="key shop", max_canvases=8)
    RATE = ClientProfile(name="key rate", canvases_per_minute=60.0)

    def test_a_key_has_no_more_in_flight_than_it_may(self) -> None:
        admission = Admission(100)
        with admission.admit(self.KEY, [4, 2]):
            error = refuse(admission, self.KEY, 3)
            assert isinstance(error, QuotaExceeded)
            assert (error.reason, error.retry_after_s) == ("key_canvases", 1)
            assert str(error) == "key shop has 6 canvases in flight, 3 more would exceed 8"
            with admission.admit(self.KEY, [2]):
                pass
        error = refuse(admission, self.KEY, 9)
        assert isinstance(error, TooManyImages) and "at most 8" in str(error)

    def test_a_minutes_worth_may_come_at_once_and_then_the_rate_holds(self) -> None:
        clock = SetClock()
        admission = Admission(1000, clock)
        with admission.admit(self.RATE, [60]):
            pass
        error = refuse(admission, self.RATE, 2)
        assert isinstance(error, QuotaExceeded)
        assert (error.reason, error.retry_after_s) == ("key_rate", 2)
        assert "60 canvases a minute; 2 are too many now" in str(error)
        clock.now_s += 1.9
        assert isinstance(refuse(admission, self.RATE, 2), QuotaExceeded)
        clock.now_s += 0.1
        with admission.admit(self.RATE, [2]):
            pass
        clock.now_s += 3600  # no more than a minute's worth is saved up
        with admission.admit(self.RATE, [60]):
            pass
        assert isinstance(refuse(admission, self.RATE, 1), QuotaExceeded)

    def test_a_request_of_more_than_a_minutes_worth_leaves_a_debt(self) -> None:
        clock = SetClock()
        admission = Admission(1000, clock)
        with admission.admit(self.RATE, [90]):
            pass
        error = refuse(admission, self.RATE, 1)
        assert isinstance(error, QuotaExceeded) and error.retry_after_s == 31

    def test_what_is_refused_costs_nothing(self) -> None:
        clock = SetClock()
        admission = Admission(100, clock)
        with admission.admit(ANN, [50]), admission.admit(BOB, [25]):
            for _ in range(50):
                assert isinstance(refuse(admission, self.RATE, 13), Overloaded)
        both = ClientProfile(name="key both", canvases_per_minute=60.0, max_canvases=4)
        with admission.admit(both, [4]):
            for _ in range(50):
                assert isinstance(refuse(admission, both, 1), QuotaExceeded)
        for client, canvases in ((self.RATE, 50), (both, 4)):
            with admission.admit(client, [canvases]):
                pass
        assert admission._accounts["key rate"].credit == 10

    def test_bounds_that_change_hold_at_once(self) -> None:
        admission = Admission(100)
        with admission.admit(self.KEY, [4]):
            smaller = ClientProfile(name="key shop", max_canvases=4)
            assert isinstance(refuse(admission, smaller, 1), QuotaExceeded)

    def test_a_rate_that_is_new_counts_from_the_clients_first_canvas_in_flight(self) -> None:
        clock = SetClock()
        admission = Admission(100, clock)
        free, bounded = (
            ClientProfile(name="key shop"),
            ClientProfile(name="key shop", canvases_per_minute=60.0),
        )
        with admission.admit(free, [4]):
            assert isinstance(refuse(admission, bounded, 1), QuotaExceeded)
            clock.now_s += 1
            with admission.admit(bounded, [1]):
                assert isinstance(refuse(admission, bounded, 1), QuotaExceeded)

    def test_addresses_are_forgotten_and_rates_are_not(self) -> None:
        admission = Admission(100)
        for client in (ANN, self.RATE):
            with admission.admit(client, [1]):
                assert client.name in admission._accounts
        assert list(admission._accounts) == ["key rate"]


async def test_what_precedes_accepted_work_is_given_up_when_new_work_is_refused() -> None:
    admission, ended = Admission(100), asyncio.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    waiting = asyncio.ensure_future(admission.unless_closed(wait()))
    assert await admission.unless_closed(asyncio.sleep(0, "found")) == "found"
    with pytest.raises(OverflowError, match="too many"):
        await admission.unless_closed(fail())
    assert not waiting.done()
    admission.close()
    with pytest.raises(Draining):
        await waiting
    await asyncio.wait_for(ended.wait(), 10)


async def test_what_precedes_accepted_work_ends_with_its_client() -> None:
    ended = asyncio.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    waiting = asyncio.ensure_future(Admission(100).unless_closed(wait()))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.wait_for(ended.wait(), 10)


async def fail() -> None:
    raise OverflowError("too many")
