"""PyTorch against ONNX Runtime, candidate by candidate.

Two runtimes round differently, so a near-tie may be decided differently: which of two cells
survives points NMS, which candidate comes first or is the last to fit, whether a pixel lies above
0.5. Candidates are therefore matched by label, score and mask, not by rank, and a small share of
them may stay without a partner.

Symbols: B batch, K candidates, N filled slots, H W canvas, h w mask.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import cv2
import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from export.errors import ParityError
from pipeline.model_config import InputSpec, TileResize
from pipeline.types import Candidates, Int64, UInt8
from training.model.solo import Solo

STRIDE = 32
BATCHES = (1, 3)
LARGEST_SIDE_PX = 512
"""Bound of the canvases; a larger one shows nothing more and takes minutes on a CPU."""
LISTED = 5


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """What the two may differ by.

    Attributes:
        score: Absolute difference of a matched pair's scores. A pixel on the other side of 0.5
            changes the mean probability of a small mask by more than rounding would.
        mask: Greatest absolute difference of a matched pair's mask probabilities.
        unmatched_share: Share of all candidates that may stay without a partner.
    """

    score: float = 1e-3
    mask: float = 1e-3
    unmatched_share: float = 0.01


@dataclass(frozen=True)
class Case:
    """One batch that both run.

    Attributes:
        content: What the images show: noise, blobs or data.
        images: [B, H, W, 3] uint8.
        valid_hw: [B, 2] int64.
    """

    content: str
    images: UInt8
    valid_hw: Int64


@dataclass
class Difference:
    """How two sets of candidates differ.

    Attributes:
        candidates_torch, candidates_onnx: Filled slots.
        unmatched: Candidates of either without a partner.
        max_score_difference, max_mask_difference: Over the matched pairs.
        examples: Some of the unmatched, with the nearest candidate of their label.
    """

    candidates_torch: int = 0
    candidates_onnx: int = 0
    unmatched: int = 0
    max_score_difference: float = 0.0
    max_mask_difference: float = 0.0
    examples: list[str] = field(default_factory=list)

    def add(self, other: Difference) -> None:
        """Takes in the difference of another image or case."""
        self.candidates_torch += other.candidates_torch
        self.candidates_onnx += other.candidates_onnx
        self.unmatched += other.unmatched
        self.max_score_difference = max(self.max_score_difference, other.max_score_difference)
        self.max_mask_difference = max(self.max_mask_difference, other.max_mask_difference)
        self.examples = (self.examples + other.examples)[:LISTED]


def match_candidates(
    expected: Candidates, found: Candidates, tolerances: Tolerances = Tolerances()
) -> Difference:
    """Pairs the candidates of one image, each with the most similar mask within the tolerances.

    Args:
        expected: PyTorch's, empty slots dropped.
        found: ONNX Runtime's, empty slots dropped.
        tolerances: Bounds of a pair's differences.
    """
    result = Difference(len(expected.scores), len(found.scores))
    free = np.ones(len(found.scores), bool)
    for score, label, mask in zip(
        expected.scores, expected.labels, expected.mask_probs, strict=True
    ):
        score_gaps = np.abs(found.scores - score)
        near = np.flatnonzero(free & (found.labels == label) & (score_gaps <= tolerances.score))
        mask_gaps = np.array([_mask_gap(mask, found.mask_probs[i]) for i in near])
        if not near.size or mask_gaps.min() > tolerances.mask:
            closest = (
                f"nearest mask within it differs by {mask_gaps.min():.2g}"
                if near.size
                else ("no candidate of the label within the score's tolerance")
            )
            result.examples.append(f"label {label}, score {score:.6f}: {closest}")
            continue
        best = near[mask_gaps.argmin()]
        free[best] = False
        result.max_score_difference = max(result.max_score_difference, float(score_gaps[best]))
        result.max_mask_difference = max(result.max_mask_difference, float(mask_gaps.min()))
    pairs = len(free) - int(free.sum())
    result.unmatched = len(expected.scores) + len(found.scores) - 2 * pairs
    result.examples = result.examples[:LISTED]
    return result


def _mask_gap(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    if a.shape != b.shape:
        raise ParityError(f"masks are {a.shape} in PyTorch and {b.shape} in ONNX Runtime")
    return float(np.abs(a - b).max())


def draw_noise(rng: np.random.Generator, hw: tuple[int, int]) -> UInt8:
    """Independent random pixels, [H, W, 3]."""
    return rng.integers(0, 256, (*hw, 3), dtype=np.uint8)


def draw_blobs(rng: np.random.Generator, hw: tuple[int, int]) -> UInt8:
    """Soft coloured ellipses on a plain background with a little noise, [H, W, 3]."""
    image = np.full((*hw, 3), rng.integers(0, 80, 3), np.uint8)
    largest = max(6, min(hw) // 6)
    for _ in range(max(6, hw[0] * hw[1] // 4096)):
        centre = int(rng.integers(0, hw[1])), int(rng.integers(0, hw[0]))
        axes = int(rng.integers(3, largest)), int(rng.integers(3, largest))
        colour = [int(v) for v in rng.integers(60, 256, 3)]
        cv2.ellipse(image, centre, axes, float(rng.integers(0, 180)), 0, 360, colour, -1)
    noisy = cv2.GaussianBlur(image, (0, 0), 1.5) + rng.normal(0, 4, image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def canvas_sizes(spec: InputSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two canvases, multiples of 32: like the served one, and a smaller one of another shape."""
    if isinstance(spec.resize, TileResize):
        height, width = spec.resize.canvas_hw
    else:
        height, width = spec.resize.short_side, spec.resize.short_side * 4 // 3
    height, width = (_round(min(side, LARGEST_SIDE_PX)) for side in (height, width))
    return (height, width), (_round(height * 3 // 4), _round(width // 2))


def _round(side: int) -> int:
    return max(2, round(side / STRIDE)) * STRIDE


def build_cases(
    sizes: Sequence[tuple[int, int]], batches: Sequence[int] = BATCHES, *, seed: int = 0
) -> Iterator[Case]:
    """Noise and blobs at every size and batch; every second image is padded."""
    rng = np.random.default_rng(seed)
    for height, width in sizes:
        for batch in batches:
            for content, draw in (("noise", draw_noise), ("blobs", draw_blobs)):
                images = np.zeros((batch, height, width, 3), np.uint8)
                valid_hw = np.tile(np.array([height, width], np.int64), (batch, 1))
                valid_hw[1::2] = height * 4 // 5, width * 7 // 8
                for image, (rows, columns) in zip(images, valid_hw, strict=True):
                    image[:rows, :columns] = draw(rng, (int(rows), int(columns)))
                yield Case(content, images, valid_hw)


def _filled(scores: Any, labels: Any, mask_probs: Any) -> list[Candidates]:
    arrays = zip(scores, labels, mask_probs, strict=True)
    return [Candidates(s[s > 0], c[s > 0], m[s > 0]) for s, c, m in arrays]


@torch.inference_mode()
def run_torch(network: Solo, case: Case) -> list[Candidates]:
    """Candidates of each image, empty slots dropped."""
    outputs = network.candidates(torch.from_numpy(case.images), torch.from_numpy(case.valid_hw))
    return _filled(*(output.numpy() for output in outputs))


def run_onnx(session: ort.InferenceSession, case: Case) -> list[Candidates]:
    """Candidates of each image, empty slots dropped."""
    feeds = {"images": case.images, "valid_hw": case.valid_hw}
    return _filled(*session.run(["scores", "labels", "mask_probs"], feeds))


class Comparison:
    """What two engines found, case by case, and the report of it.

    Args:
        tolerances: Bounds of the differences.
    """

    def __init__(self, tolerances: Tolerances) -> None:
        self._tolerances = tolerances
        self._rows: list[dict[str, Any]] = []
        self._total = Difference()

    def add(self, case: Case, expected: Sequence[Candidates], found: Sequence[Candidates]) -> None:
        """Compares the canvases of a case, PyTorch's candidates first."""
        difference = Difference()
        for ours, theirs in zip(expected, found, strict=True):
            difference.add(match_candidates(ours, theirs, self._tolerances))
        batch, height, width, _ = case.images.shape
        head = {"content": case.content, "batch": batch, "canvas_hw": [height, width]}
        self._rows.append({**head, **asdict(difference)})
        self._total.add(difference)

    def report(self, runtimes: dict[str, str]) -> dict[str, Any]:
        """JSON types; `passed` says whether what was compared may be published."""
        compared = self._total.candidates_torch + self._total.candidates_onnx
        share = self._total.unmatched / compared if compared else 0.0
        return {
            "passed": compared > 0 and share <= self._tolerances.unmatched_share,
            "unmatched_share": share,
            "total": asdict(self._total),
            "tolerances": asdict(self._tolerances),
            "runtimes": runtimes,
            "cases": self._rows,
        }


def compare(
    network: Solo,
    graph: bytes,
    cases: Sequence[Case] | Iterator[Case],
    tolerances: Tolerances = Tolerances(),
) -> dict[str, Any]:
    """Runs both on every case.

    Args:
        network: In evaluation mode, on the CPU.
        graph: Its exported graph.
        cases: What to run.
        tolerances: Bounds of the differences.

    Returns:
        The report, JSON types; `passed` says whether the graph may be published.

    Raises:
        ParityError: ONNX Runtime refuses the graph or a batch.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    comparison = Comparison(tolerances)
    try:
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        for case in cases:
            comparison.add(case, run_torch(network, case), run_onnx(session, case))
    except ParityError:
        raise
    except Exception as error:  # the runtime's exceptions have no common base
        raise ParityError(f"ONNX Runtime cannot run the exported graph: {error}") from error
    return comparison.report(
        {
            "torch": torch.__version__.split("+")[0],
            "onnxruntime": ort.__version__,
            "machine": platform.machine(),
        }
    )


def require_parity(report: dict[str, Any]) -> None:
    """Refuses a report that has not passed.

    Raises:
        ParityError: Says by how much the two differ, or that nothing was compared.
    """
    if report["passed"]:
        return
    total = report["total"]
    compared = total["candidates_torch"] + total["candidates_onnx"]
    if not compared:
        raise ParityError(
            "no candidate was found on the test images, so nothing could be compared; is the "
            "network trained? --data adds images of a data set to the comparison"
        )
    raise ParityError(
        f"PyTorch and ONNX Runtime disagree on {total['unmatched']} of {compared} candidates "
        f"({report['unmatched_share']:.1%}, at most {report['tolerances']['unmatched_share']:.1%} "
        f"may differ); for example {'; '.join(total['examples'])}"
    )
