"""Compares a variant of another precision with the float32 graph.

The tolerances of `export.parity` are for two runtimes of the same graph; lower precision deviates
more. Here, candidates are matched by mask IoU and score, and the AP must not drop by more than a
threshold.

Symbols: K candidates, h w mask.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.errors import ParityError
from export.parity import Case, run_onnx
from pipeline.types import Candidates

PAIR_IOU = 0.5
"""Minimum mask IoU of a match; COCO's lowest threshold."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Allowed deviation of a variant from float32.

    The limits of AP and mask IoU are project requirements. The other two detect what the AP of a
    small split does not show; they are a few times the bundled model's values
    (docs/precision.md).

    Attributes:
        ap_loss: Most AP of float32 minus AP of the variant.
        mask_iou: Least mean mask IoU of matched candidates.
        matched_share: Least share of candidates that are matched.
        score: Most mean absolute score difference of matched candidates.
    """

    ap_loss: float
    mask_iou: float
    matched_share: float
    score: float


TYPED = Thresholds(ap_loss=0.002, mask_iou=0.99, matched_share=0.98, score=0.005)
INT8 = Thresholds(ap_loss=0.01, mask_iou=0.95, matched_share=0.9, score=0.02)


@dataclass
class Agreement:
    """Statistics of matched candidates of two graphs.

    Attributes:
        candidates: Candidates of both graphs that a response could contain.
        unmatched: Those of them without a match.
        ious: Mask IoU of each match.
        score_differences: Absolute score difference of each match.
    """

    candidates: int = 0
    unmatched: int = 0
    ious: list[float] = field(default_factory=list)
    score_differences: list[float] = field(default_factory=list)

    def add(self, expected: Candidates, found: Candidates, least_score: float) -> None:
        """Matches the candidates of one image.

        Greedy, in descending order of score: each candidate is matched with the unmatched one of
        its label with the greatest IoU minus score difference. Matches count if either score
        reaches `least_score`.

        Args:
            expected: Candidates of the float32 graph.
            found: Candidates of the variant.
            least_score: Minimum score of candidates that a response can contain.
        """
        ious = _mask_ious(expected.mask_probs, found.mask_probs)
        gaps = np.abs(expected.scores[:, None] - found.scores[None])
        near = np.where(expected.labels[:, None] == found.labels[None], ious - gaps, -np.inf)
        near[ious < PAIR_IOU] = -np.inf
        free = np.ones(len(found.scores), bool)
        for row in range(len(expected.scores)):
            left = np.where(free, near[row], -np.inf)
            best = int(left.argmax()) if left.size else 0
            if not left.size or left[best] == -np.inf:
                if expected.scores[row] >= least_score:
                    self.candidates += 1
                    self.unmatched += 1
                continue
            free[best] = False
            if max(expected.scores[row], found.scores[best]) >= least_score:
                self.candidates += 2
                self.ious.append(float(ious[row, best]))
                self.score_differences.append(float(gaps[row, best]))
        alone = int((found.scores[free] >= least_score).sum())
        self.candidates += alone
        self.unmatched += alone

    def summarise(self) -> dict[str, float | int]:
        """Totals, means and extremes; without a match, IoU 0 and score difference 1.

        Raises:
            ParityError: There are no candidates.
        """
        if not self.candidates:
            raise ParityError(
                "no candidate was found on the test images, so nothing could be compared; use "
                "--data to add images with objects of the trained classes"
            )
        ious, differences = self.ious or [0.0], self.score_differences or [1.0]
        return {
            "candidates": self.candidates,
            "unmatched": self.unmatched,
            "matched_share": 1 - self.unmatched / self.candidates,
            "mean_mask_iou": float(np.mean(ious)),
            "min_mask_iou": float(np.min(ious)),
            "mean_score_difference": float(np.mean(differences)),
            "max_score_difference": float(np.max(differences)),
        }


def _mask_ious(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """[K, h, w] and [L, h, w] probabilities -> [K, L] IoU of the masks above 0.5."""
    if a.shape[1:] != b.shape[1:]:
        raise ParityError(f"masks are {a.shape[1:]} in float32 and {b.shape[1:]} in the variant")
    pixels = a.shape[1] * a.shape[2]
    one, other = ((m > 0.5).reshape(len(m), pixels).astype(np.float32) for m in (a, b))
    both = one @ other.T
    either = one.sum(1)[:, None] + other.sum(1)[None] - both
    return np.where(either > 0, both / np.maximum(either, 1), 1).astype(np.float32)


def compare_graphs(
    reference: bytes, variant: bytes, cases: Iterable[Case], least_score: float
) -> dict[str, float | int]:
    """Runs both graphs on every case and matches their candidates.

    Args:
        reference: The float32 graph.
        variant: A graph with the same float32 outputs.
        cases: Batches to run.
        least_score: Minimum score of candidates that count.

    Returns:
        `Agreement.summarise`.

    Raises:
        ParityError: A graph cannot be run, or neither finds a candidate.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    agreement = Agreement()
    try:
        one, other = (
            ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            for graph in (reference, variant)
        )
        for case in cases:
            for pair in zip(run_onnx(one, case), run_onnx(other, case), strict=True):
                agreement.add(*pair, least_score)
    except ParityError:
        raise
    except Exception as error:  # the runtime's exceptions have no common base
        raise ParityError(f"ONNX Runtime cannot run the variant: {error}") from error
    return agreement.summarise()


def check_thresholds(
    numbers: dict[str, float | int], ap: dict[str, float] | None, thresholds: Thresholds
) -> dict[str, Any]:
    """Checks the result of a comparison.

    Args:
        numbers: From `compare_graphs`.
        ap: AP of `fp32` and `variant`; None if not measured.
        thresholds: The limits.

    Returns:
        `passed`, `failures` as text, `thresholds`.
    """
    checks = [
        ("mean mask IoU", numbers["mean_mask_iou"], ">=", thresholds.mask_iou),
        ("matched share", numbers["matched_share"], ">=", thresholds.matched_share),
        ("mean score difference", numbers["mean_score_difference"], "<=", thresholds.score),
    ]
    if ap is not None:
        checks.append(("AP loss", round(ap["fp32"] - ap["variant"], 4), "<=", thresholds.ap_loss))
    failures = [
        f"{name} {value:.4f}, must be {sign} {bound:g}"
        for name, value, sign, bound in checks
        if not (value >= bound if sign == ">=" else value <= bound)
    ]
    return {"passed": not failures, "failures": failures, "thresholds": asdict(thresholds)}
