from __future__ import annotations

import re
from typing import Any

import pytest

from pipeline.answer_match import AnswerMatch
from pipeline.repository_config import ShadowedVersion
from service.models.shadow_rule import ShadowTally, describe_shadow, judge

POLICY = ShadowedVersion(live=1, shadow=2, images=4, promote_at=0.9, reject_below=0.5)


def tally_of(
    *qualities: float, live_s: float = 1.0, shadow_s: float = 1.0, failures: int = 0
) -> ShadowTally:
    tally = ShadowTally(failures=failures, last_failure="ValueError: no")
    for quality in qualities:
        tally.add(AnswerMatch((quality,), (0.1,), (0, 0)), live_s, shadow_s)
    return tally


@pytest.mark.parametrize(
    ("tally", "verdict", "reason"),
    [
        (tally_of(1, 1, 1), None, ""),
        (tally_of(0, 0, 0), None, ""),
        (tally_of(1, 1, 1, 0.6), "promoted", "mean agreement of 4 images is 0.900, at least 0.9"),
        (tally_of(1, 1, 1, 0.59), None, ""),
        (tally_of(0.5, 0.5, 0.5, 0.5), None, ""),
        (tally_of(0.5, 0.5, 0.5, 0.49), "rejected", "is 0.497, below 0.5"),
        (tally_of(1, 1, 1, 1, failures=2), "promoted", "1.000"),
        (
            tally_of(1, 1, 1, 1, failures=3),
            "rejected",
            "failed on 3 images, 2 are .*ValueError: no",
        ),
        (tally_of(failures=3), "rejected", "failed on 3 images"),
        (tally_of(1, 1, 1, 1, shadow_s=2.0), "promoted", "1.000"),
        (tally_of(1, 1, 1, 1, shadow_s=2.1), "rejected", "takes 2.10 times as long, 2 is allowed"),
        (tally_of(0.7, 0.7, 0.7, 0.7, shadow_s=9), "rejected", "9.00 times"),
        (tally_of(1, 1, 1, 1, live_s=0.0), "promoted", ""),
        (tally_of(1, 1, 1, 1, live_s=0.1, shadow_s=0.3), "rejected", "takes 3.00 times"),
    ],
)
def test_the_rule(tally: ShadowTally, verdict: str | None, reason: str) -> None:
    found = judge(POLICY, tally)
    if verdict is None:
        assert found is None
    else:
        assert found is not None
        assert found[0] == verdict
        assert re.search(reason, found[1])


def test_what_is_shown() -> None:
    tally = ShadowTally(failures=1, dropped=3)
    tally.add(AnswerMatch((0.8, 0.6), (0.1, -0.3), (1, 0)), 1.0, 3.0)
    tally.add(AnswerMatch((), (), (0, 0)), 1.0, 1.0)
    state = describe_shadow(POLICY, tally, "running", "")
    assert (state.version, state.images, state.failures, state.dropped) == (2, 2, 1, 3)
    assert state.agreement == pytest.approx((1.4 / 2.5 + 1) / 2)
    assert state.mean_iou == pytest.approx(0.7)
    assert state.score_difference == pytest.approx(0.2)
    assert state.unmatched_share == pytest.approx(1 / 5)
    assert state.slowdown == pytest.approx(2.0)


def test_nothing_is_shown_of_nothing() -> None:
    state = describe_shadow(POLICY, ShadowTally(), "running", "")
    assert (state.images, state.failures, state.dropped) == (0, 0, 0)
    assert state.agreement is state.mean_iou is state.slowdown is None
    assert state.unmatched_share is state.score_difference is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"shadow": 1}, "own shadow"),
        ({"share": 0.0}, "share"),
        ({"share": 1.5}, "share"),
        ({"reject_below": 0.96}, "above promote_at"),
        ({"images": 0}, "images"),
    ],
)
def test_a_wrong_policy_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ShadowedVersion.model_validate({"live": 1, "shadow": 2, **changes})
