"""Fair queueing: order, weights, bursts and the bound."""

from __future__ import annotations

import random

import pytest

from service.work.fair import BURST, BURST_CHARGE, FairQueue, Flow

BOUND = BURST * (1 - BURST_CHARGE) + 2
"""Of the module's docstring, for weights of 1."""


def serve(queue: FairQueue[Flow], canvases: int) -> list[Flow]:
    """Serves flows that always have work waiting."""
    served = []
    for _ in range(canvases):
        flow = queue.first()
        assert flow is not None
        served.append(flow)
        flow.charge()
        queue.served(flow, goes_on=True)
    return served


def steady(weight: float = 1.0) -> Flow:
    """A flow whose burst is over."""
    return Flow(weight=weight, burst=0)


def test_an_empty_queue_gives_nothing() -> None:
    queue: FairQueue[Flow] = FairQueue()
    assert not queue
    assert queue.first() is None


def test_flows_that_are_equal_take_turns_by_arrival() -> None:
    queue: FairQueue[Flow] = FairQueue()
    flows = [steady() for _ in range(3)]
    for flow in flows:
        queue.push(flow)
    assert serve(queue, 9) == flows * 3


def test_a_flow_is_in_the_queue_once() -> None:
    queue: FairQueue[Flow] = FairQueue()
    flow = steady()
    queue.push(flow)
    queue.push(flow)
    assert queue.first() is flow
    flow.charge()
    queue.served(flow, goes_on=False)
    assert queue.first() is None
    queue.push(flow)
    assert queue.first() is flow


@pytest.mark.parametrize("weight", [2.0, 3.0, 0.5])
def test_service_is_proportional_to_the_weight(weight: float) -> None:
    queue: FairQueue[Flow] = FairQueue()
    heavy, light = steady(weight), steady()
    queue.push(heavy)
    queue.push(light)
    served = serve(queue, 600)
    assert abs(served.count(heavy) / weight - served.count(light)) <= 1 / weight + 1


def test_a_burst_is_charged_less_and_then_over() -> None:
    flow = Flow()
    for _ in range(BURST):
        flow.charge()
    assert flow.tag == pytest.approx(BURST * BURST_CHARGE)
    flow.charge()
    assert flow.tag == pytest.approx(BURST * BURST_CHARGE + 1)
    heavy = Flow(weight=4.0)
    heavy.charge()
    assert heavy.tag == pytest.approx(BURST_CHARGE / 4)


def test_the_bound_is_ten_canvases() -> None:
    assert pytest.approx(10) == BOUND


def test_a_newcomer_goes_next_and_gets_three_of_four_canvases_of_its_burst() -> None:
    queue: FairQueue[Flow] = FairQueue()
    old = steady()
    queue.push(old)
    serve(queue, 1000)
    new = Flow()
    queue.push(new)
    served = serve(queue, 16)
    assert served.count(new) >= 12
    assert served.count(old) >= 3  # it goes on meanwhile


def test_short_flows_that_do_not_take_turns_end_in_their_order() -> None:
    queue: FairQueue[Flow] = FairQueue()
    flows = [Flow(in_turns=False) for _ in range(3)]
    for flow in flows[:2]:
        queue.push(flow)
    served = serve(queue, BURST)
    queue.push(flows[2])
    assert served + serve(queue, 2 * BURST) == [flow for flow in flows for _ in range(BURST)]
    assert [flow.tag for flow in flows[:2]] == pytest.approx([BURST * BURST_CHARGE] * 2)


def test_a_flow_that_left_before_its_burst_was_over_keeps_its_place() -> None:
    queue: FairQueue[Flow] = FairQueue()
    first, second = (Flow(in_turns=False) for _ in range(2))
    queue.push(first)
    queue.push(second)
    queue.served(first, goes_on=False)
    assert queue.first() is second
    queue.push(first)
    assert queue.first() is second  # time has passed
    queue.served(second, goes_on=False)
    assert queue.first() is first


def test_a_flow_that_comes_back_before_its_time_keeps_its_place() -> None:
    queue: FairQueue[Flow] = FairQueue()
    first, second = (Flow(tag=10.0, burst=0) for _ in range(2))
    queue.push(first)
    queue.push(second)
    queue.served(first, goes_on=False)  # time is 10 now, as far as the first tag
    queue.push(first)
    assert serve(queue, 2) == [first, second]


def test_a_newcomer_does_not_wait_for_what_a_heavy_flow_was_served_before() -> None:
    queue: FairQueue[Flow] = FairQueue()
    heavy = steady(weight=10.0)
    queue.push(heavy)
    serve(queue, 100)
    new = steady()
    queue.push(new)
    assert serve(queue, 24).count(new) in (2, 3)


def test_a_short_flow_passes_a_long_one_that_does_not_take_turns_either() -> None:
    queue: FairQueue[Flow] = FairQueue()
    old = Flow(in_turns=False)
    queue.push(old)
    serve(queue, 1000)
    new = Flow(in_turns=False)
    queue.push(new)
    assert serve(queue, BURST + 1).count(new) == BURST


def test_an_idle_flow_saves_up_no_credit() -> None:
    queue: FairQueue[Flow] = FairQueue()
    busy, idle = steady(), steady()
    queue.push(idle)
    assert queue.first() is idle
    idle.charge()
    queue.served(idle, goes_on=False)
    queue.push(busy)
    serve(queue, 1000)
    queue.push(idle)
    served = serve(queue, 100)
    assert abs(served.count(idle) - served.count(busy)) <= 2


@pytest.mark.parametrize("seed", range(5))
def test_two_flows_that_wait_all_the_time_differ_by_no_more_than_the_bound(seed: int) -> None:
    """Whatever others do, at any moment, for any length of time."""
    rng = random.Random(seed)
    queue: FairQueue[Flow] = FairQueue()
    pair = [Flow(), Flow()]
    queue.push(pair[0])
    serve(queue, rng.randrange(50))
    queue.push(pair[1])
    others: list[Flow] = []
    counts = [0, 0]
    low = high = 0
    for _ in range(3000):
        if rng.random() < 0.02:
            others.append(Flow(weight=rng.choice([0.5, 1, 4])))
            queue.push(others[-1])
        flow = queue.first()
        assert flow is not None
        flow.charge()
        queue.served(flow, goes_on=flow in pair or rng.random() < 0.9)
        if flow in pair:
            counts[pair.index(flow)] += 1
            low, high = min(low, counts[0] - counts[1]), max(high, counts[0] - counts[1])
    assert min(counts) > 100
    assert high - low <= BOUND


@pytest.mark.parametrize("others", [1, 4, 16])
@pytest.mark.parametrize("weight", [1.0, 10.0])
@pytest.mark.parametrize("in_turns", [True, False])
def test_flows_that_come_and_go_do_not_starve_one_that_stays(
    others: int, weight: float, in_turns: bool
) -> None:
    queue: FairQueue[Flow] = FairQueue()
    staying = Flow(weight=weight, in_turns=in_turns)
    queue.push(staying)
    for _ in range(others):
        queue.push(Flow(in_turns=in_turns))
    gap = 0
    served = 0
    for _ in range(100 * (others + 1)):
        flow = queue.first()
        assert flow is not None
        flow.charge()
        is_staying = flow is staying
        queue.served(flow, goes_on=is_staying)
        served += is_staying
        gap = 0 if is_staying else gap + 1
        assert gap <= (others + 1) * (1 / BURST_CHARGE + (1 if in_turns else BURST))
        if not is_staying:
            queue.push(Flow(in_turns=in_turns))
    assert served >= 100 * BURST_CHARGE * min(weight, 2)
