"""Compares PyTorch and ONNX Runtime, candidate by candidate.

The runtimes round differently, so near-ties may be decided differently: which of two cells survives
points NMS, the order of candidates, which one is the last of the top K, whether a pixel is above
0.5. Candidates are therefore matched by label, score and mask, not by rank, and a small share may
remain unmatched.

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
from tqdm import tqdm

from export.errors import ParityError
from pipeline.model_config import InputSpec, TileResize
from pipeline.types import Candidates, Int64, UInt8
from training.model.solo import Solo

STRIDE = 32
BATCHES = (1, 3)
LARGEST_SIDE_PX = 512
"""Maximum canvas side in comparisons; larger ones take minutes on a CPU and test nothing more."""
MAX_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """Allowed differences between two runtimes.

    Attributes:
        score: Maximum score difference of a match. Larger than rounding, because one pixel on the
            other side of 0.5 changes the mean probability of a small mask.
        mask: Maximum difference of any mask probability of a match.
        unmatched_share: Maximum share of unmatched candidates.
    """

    score: float = 1e-3
    mask: float = 1e-3
    unmatched_share: float = 0.01


@dataclass(frozen=True)
class Case:
    """One test batch.

    Attributes:
        content: Kind of images: noise, blobs or data.
        images: [B, H, W, 3] uint8.
        valid_hw: [B, 2] int64.
    """

    content: str
    images: UInt8
    valid_hw: Int64

    def split(self) -> list[Case]:
        """Batches of one canvas each."""
        places = [slice(place, place + 1) for place in range(len(self.images))]
        return [Case(self.content, self.images[p], self.valid_hw[p]) for p in places]


@dataclass
class Difference:
    """Difference between two sets of candidates.

    Attributes:
        candidates_torch, candidates_onnx: Number of candidates.
        unmatched: Candidates of either set without a match.
        max_score_difference, max_mask_difference: Maxima over the matches.
        examples: Descriptions of some unmatched candidates.
    """

    candidates_torch: int = 0
    candidates_onnx: int = 0
    unmatched: int = 0
    max_score_difference: float = 0.0
    max_mask_difference: float = 0.0
    examples: list[str] = field(default_factory=list)

    def add(self, other: Difference) -> None:
        """Accumulates the difference of another image or case."""
        self.candidates_torch += other.candidates_torch
        self.candidates_onnx += other.candidates_onnx
        self.unmatched += other.unmatched
        self.max_score_difference = max(self.max_score_difference, other.max_score_difference)
        self.max_mask_difference = max(self.max_mask_difference, other.max_mask_difference)
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]


def match_candidates(
    expected: Candidates, found: Candidates, tolerances: Tolerances = Tolerances()
) -> Difference:
    """Matches the candidates of one image, each to the most similar mask within the tolerances.

    Args:
        expected: PyTorch's candidates, without empty slots.
        found: ONNX Runtime's candidates, without empty slots.
        tolerances: Allowed differences of a match.
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
                f"nearest mask within the score tolerance differs by {mask_gaps.min():.2g}"
                if near.size
                else "no candidate of this label within the score tolerance"
            )
            result.examples.append(f"label {label}, score {score:.6f}: {closest}")
            continue
        best = near[mask_gaps.argmin()]
        free[best] = False
        result.max_score_difference = max(result.max_score_difference, float(score_gaps[best]))
        result.max_mask_difference = max(result.max_mask_difference, float(mask_gaps.min()))
    pairs = len(free) - int(free.sum())
    result.unmatched = len(expected.scores) + len(found.scores) - 2 * pairs
    result.examples = result.examples[:MAX_EXAMPLES]
    return result


def _mask_gap(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    if a.shape != b.shape:
        raise ParityError(f"masks are {a.shape} in PyTorch and {b.shape} in ONNX Runtime")
    return float(np.abs(a - b).max())


def draw_noise(rng: np.random.Generator, hw: tuple[int, int]) -> UInt8:
    """Independent random pixels, [H, W, 3]."""
    return rng.integers(0, 256, (*hw, 3), dtype=np.uint8)


def draw_blobs(rng: np.random.Generator, hw: tuple[int, int]) -> UInt8:
    """Blurred coloured ellipses on a uniform background with a little noise, [H, W, 3]."""
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
    """Two canvas sizes, multiples of 32: near the served one, and a smaller one."""
    if isinstance(spec.resize, TileResize):
        height, width = spec.resize.canvas_hw
    else:
        height, width = spec.resize.short_side, spec.resize.short_side * 4 // 3
    height, width = (_round_to_stride(min(side, LARGEST_SIDE_PX)) for side in (height, width))
    return (height, width), (_round_to_stride(height * 3 // 4), _round_to_stride(width // 2))


def _round_to_stride(side: int) -> int:
    return max(2, round(side / STRIDE)) * STRIDE


def build_cases(
    sizes: Sequence[tuple[int, int]], batches: Sequence[int] = BATCHES, *, seed: int = 0
) -> Iterator[Case]:
    """Noise and blobs at every canvas size and batch size; every second image is padded."""
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


def _drop_empty_slots(scores: Any, labels: Any, mask_probs: Any) -> list[Candidates]:
    arrays = zip(scores, labels, mask_probs, strict=True)
    return [Candidates(s[s > 0], c[s > 0], m[s > 0]) for s, c, m in arrays]


@torch.inference_mode()
def run_torch(network: Solo, case: Case) -> list[Candidates]:
    """Candidates of each image, without empty slots."""
    outputs = network.candidates(torch.from_numpy(case.images), torch.from_numpy(case.valid_hw))
    return _drop_empty_slots(*(output.numpy() for output in outputs))


def run_onnx(session: ort.InferenceSession, case: Case) -> list[Candidates]:
    """Candidates of each image, without empty slots."""
    feeds = {"images": case.images, "valid_hw": case.valid_hw}
    return _drop_empty_slots(*session.run(["scores", "labels", "mask_probs"], feeds))


class Comparison:
    """Accumulates the differences of all cases into a report.

    Args:
        tolerances: Allowed differences.
    """

    def __init__(self, tolerances: Tolerances) -> None:
        self._tolerances = tolerances
        self._rows: list[dict[str, Any]] = []
        self._total = Difference()

    def add(self, case: Case, expected: Sequence[Candidates], found: Sequence[Candidates]) -> None:
        """Compares the candidates of each canvas of a case.

        Args:
            case: The batch.
            expected: PyTorch's candidates.
            found: The other engine's candidates.
        """
        difference = Difference()
        for pair in zip(expected, found, strict=True):
            difference.add(match_candidates(*pair, self._tolerances))
        batch, height, width, _ = case.images.shape
        head = {"content": case.content, "batch": batch, "canvas_hw": [height, width]}
        self._rows.append({**head, **asdict(difference)})
        self._total.add(difference)

    def report(self, runtimes: dict[str, str]) -> dict[str, Any]:
        """The parity report in JSON types; `passed` tells whether the file may be published."""
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
    """Runs PyTorch and ONNX Runtime on every case and compares their candidates.

    Args:
        network: In evaluation mode, on the CPU.
        graph: Its exported graph.
        cases: Batches to run.
        tolerances: Allowed differences.

    Returns:
        `Comparison.report`.

    Raises:
        ParityError: ONNX Runtime cannot load the graph or run a batch.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    comparison = Comparison(tolerances)
    try:
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        for case in tqdm(cases, "comparing", unit="batch", disable=None, leave=False):
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
    """Checks that a report has passed.

    Raises:
        ParityError: The two differ too much, or there was nothing to compare.
    """
    if report["passed"]:
        return
    total = report["total"]
    compared = total["candidates_torch"] + total["candidates_onnx"]
    if not compared:
        raise ParityError(
            "no candidate was found on the test images, so nothing could be compared; train "
            "longer, or use --data to add images with objects of the trained classes"
        )
    raise ParityError(
        f"PyTorch and ONNX Runtime disagree on {total['unmatched']} of {compared} candidates "
        f"({report['unmatched_share']:.1%}, at most {report['tolerances']['unmatched_share']:.1%} "
        f"may differ); for example {'; '.join(total['examples'])}"
    )
