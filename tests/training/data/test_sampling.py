from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tiny import TINY, TINY_SGD
from training.configs.schema import Config
from training.data.sampling import EpochBatches, Share, SharedBatches, plan_share


def items(size: int, batch: int, seed: int, start: int, stop: int) -> list[list[tuple[int, int]]]:
    return list(EpochBatches(size, batch, seed, start, stop))


@pytest.mark.parametrize(("size", "batch"), [(10, 3), (3, 8), (4, 4), (1, 2)])
def test_a_run_can_start_at_any_step(size: int, batch: int) -> None:
    whole = items(size, batch, 7, 0, 12)
    for start in (1, 5, 11, 12):
        assert items(size, batch, 7, start, 12) == whole[start:]
    assert len(EpochBatches(size, batch, 7, 5, 12)) == 7
    assert len(EpochBatches(size, batch, 7, 12, 5)) == 0


@pytest.mark.parametrize(("size", "batch"), [(10, 3), (3, 8), (4, 4)])
def test_every_epoch_shows_every_image_once(size: int, batch: int) -> None:
    steps = -(-size * 4 // batch)
    flat = [item for one in items(size, batch, 0, 0, steps) for item in one]
    for epoch in range(3):
        assert sorted(i for e, i in flat if e == epoch) == list(range(size))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = items(50, 50, 0, 0, 2)
    assert first == items(50, 50, 0, 0, 2)
    assert [i for _, i in first[0]] != [i for _, i in first[1]]
    assert first != items(50, 50, 1, 0, 2)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        EpochBatches(0, 2, 0, 0, 1)


@settings(max_examples=60, deadline=None)
@given(
    portrait=st.lists(st.booleans(), min_size=1, max_size=40),
    group=st.integers(1, 4),
    groups=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_grouping_by_aspect(portrait: list[bool], group: int, groups: int, seed: int) -> None:
    kinds, size, batch = np.array(portrait), len(portrait), group * groups
    steps = -(-size * 4 // batch)

    def read(start: int) -> list[list[tuple[int, int]]]:
        found = EpochBatches(size, batch, seed, start, steps, portrait=kinds, group=group)
        return list(found)

    whole = read(0)
    # Every epoch shows every image once, batches are full, and any step can be the first.
    flat = [item for one in whole for item in one]
    assert len(flat) == steps * batch
    for epoch in range(3):
        assert sorted(i for e, i in flat if e == epoch) == list(range(size))
    assert [epoch for epoch, _ in flat] == sorted(epoch for epoch, _ in flat)
    for start in (1, steps // 2, steps):
        assert read(start) == whole[start:]
    # Groups are of one kind, but for the one over an epoch's border and one of what is left.
    mixed: Counter[int] = Counter()
    for at in range(0, len(flat), group):
        members = flat[at : at + group]
        within = len({epoch for epoch, _ in members}) == 1
        if within and len({portrait[i] for _, i in members}) > 1:
            mixed[members[0][0]] += 1
    assert max(mixed.values(), default=0) <= 1 and not (group == 1 and mixed)


def test_grouping_keeps_the_order_random() -> None:
    kinds = np.arange(400) % 4 == 0
    batches = list(EpochBatches(400, 4, 0, 0, 100, portrait=kinds, group=2))
    assert any(kinds[b[0][1]] != kinds[b[2][1]] for b in batches)  # a group, not a batch, is one
    portraits = [at for at, b in enumerate(batches) for _, i in b if kinds[i]]
    assert min(portraits) < 20 and max(portraits) > 80
    other = list(EpochBatches(400, 4, 1, 0, 100, portrait=kinds, group=2))
    assert batches != other


def test_a_group_must_divide_the_batch() -> None:
    with pytest.raises(ValueError, match="group is 3, expected a divisor of the batch of 4"):
        EpochBatches(5, 4, 0, 0, 1, portrait=np.zeros(5, np.bool_), group=3)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2)])
def test_the_shares_make_up_the_batch(group: int, processes: int, accumulate: int) -> None:
    portrait = np.zeros(21, np.bool_)

    def batches() -> EpochBatches:
        return EpochBatches(21, 8, 0, 0, 5, portrait=portrait, group=group)

    shares = [
        list(SharedBatches(batches(), Share(rank=r, processes=processes, accumulate=accumulate)))
        for r in range(processes)
    ]
    assert all(len(share) == 5 * accumulate for share in shares)
    for step, batch in enumerate(batches()):
        parts = [m for share in shares for m in share[step * accumulate : (step + 1) * accumulate]]
        assert [item for part in parts for item in part.items] == batch
        for part in parts:
            groups = [set(batch[at : at + group]) for at in range(0, 8, group)]
            touched = [one for one in groups if one & set(part.items)]
            assert set(part.canvas_items) == set().union(*touched)


def test_how_a_batch_is_split() -> None:
    tiles = replace(TINY, schedule=replace(TINY.schedule, batch_size=16))
    canvases = replace(TINY_SGD, schedule=replace(TINY_SGD.schedule, batch_size=16))

    def forward_passes(config: Config, processes: int, accumulate: int | None = None) -> int:
        share = plan_share(config, rank=0, processes=processes, accumulate=accumulate)
        return share.accumulate

    assert forward_passes(tiles, 1) == 1 and forward_passes(tiles, 8) == 1
    assert forward_passes(tiles, 2, 4) == 4
    # By the keep-ratio rule the two images of a canvas go through the network together.
    assert [forward_passes(canvases, n) for n in (1, 2, 4, 8, 16)] == [8, 4, 2, 1, 1]
    assert forward_passes(canvases, 1, 1) == 1


@pytest.mark.parametrize("processes", [3, 5, 32])
def test_processes_must_divide_the_batch(processes: int) -> None:
    config = replace(TINY, schedule=replace(TINY.schedule, batch_size=16))
    with pytest.raises(ValueError, match=f"batch_size 16 .* evenly over {processes} processes"):
        plan_share(config, rank=0, processes=processes, accumulate=None)


@pytest.mark.parametrize("accumulate", [0, -1, 3, 16])
def test_forward_passes_must_divide_a_process_part(accumulate: int) -> None:
    config = replace(TINY, schedule=replace(TINY.schedule, batch_size=16))
    with pytest.raises(ValueError, match=f"accumulate is {accumulate}, .* divisor of the 8 images"):
        plan_share(config, rank=0, processes=2, accumulate=accumulate)
