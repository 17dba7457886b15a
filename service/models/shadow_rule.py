"""What is known of a version that is compared with the served one, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.answer_match import AnswerMatch
from pipeline.repository_config import ShadowedVersion
from service.protocol import ShadowState, ShadowStatus

Verdict = Literal["promoted", "rejected"]


@dataclass
class ShadowTally:
    """Sums over the images that were compared.

    Attributes:
        images: That both versions segmented.
        failures: Images that the shadow failed on.
        dropped: Images that were chosen and not compared, because of the load.
        quality, iou, score_difference: Sums; of images, of matched pairs, of their absolute
            differences.
        matched, unmatched: Pairs; instances without a partner.
        seconds: Engine time of served version and shadow, for the same canvases.
        last_failure: Why the shadow failed.
    """

    images: int = 0
    failures: int = 0
    dropped: int = 0
    quality: float = 0.0
    iou: float = 0.0
    score_difference: float = 0.0
    matched: int = 0
    unmatched: int = 0
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    last_failure: str = ""

    def add(self, agreement: AnswerMatch, live_s: float, shadow_s: float) -> None:
        """Counts an image."""
        self.images += 1
        self.quality += agreement.quality
        self.iou += sum(agreement.ious)
        self.score_difference += sum(map(abs, agreement.score_differences))
        self.matched += len(agreement.ious)
        self.unmatched += sum(agreement.unmatched)
        self.seconds[0] += live_s
        self.seconds[1] += shadow_s

    @property
    def slowdown(self) -> float | None:
        """Engine time of the shadow over that of the served version."""
        return self.seconds[1] / self.seconds[0] if self.seconds[0] > 0 else None


def judge(policy: ShadowedVersion, tally: ShadowTally) -> tuple[Verdict, str] | None:
    """Whether a shadow is to be promoted or rejected, and why; None: not yet."""
    if tally.failures > policy.max_failures:
        return "rejected", (
            f"it failed on {tally.failures} images, {policy.max_failures} are allowed: "
            f"{tally.last_failure}"
        )
    if tally.images < policy.images:
        return None
    mean = tally.quality / tally.images
    found = f"the mean agreement of {tally.images} images is {mean:.3f}"
    if mean < policy.reject_below:
        return "rejected", f"{found}, below {policy.reject_below:g}"
    slowdown = tally.slowdown
    if slowdown is not None and slowdown > policy.max_slowdown:
        return "rejected", (
            f"its engine takes {slowdown:.2f} times as long, {policy.max_slowdown:g} is allowed"
        )
    if mean >= policy.promote_at:
        return "promoted", f"{found}, at least {policy.promote_at:g}"
    return None


def describe_shadow(
    policy: ShadowedVersion, tally: ShadowTally, status: ShadowStatus, reason: str
) -> ShadowState:
    """What is shown of a shadow."""
    pairs, instances = tally.matched, 2 * tally.matched + tally.unmatched
    return ShadowState(
        version=policy.shadow,
        status=status,
        reason=reason,
        share=policy.share,
        images=tally.images,
        failures=tally.failures,
        dropped=tally.dropped,
        agreement=tally.quality / tally.images if tally.images else None,
        mean_iou=tally.iou / pairs if pairs else None,
        unmatched_share=tally.unmatched / instances if instances else None,
        score_difference=tally.score_difference / pairs if pairs else None,
        slowdown=tally.slowdown,
    )
