from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from export.errors import ParityError
from export.parity import (
    Case,
    Comparison,
    Tolerances,
    build_cases,
    canvas_sizes,
    compare,
    draw_blobs,
    match_candidates,
    require_parity,
)
from pipeline.model_config import InputSpec, KeepRatioResize, TileResize
from pipeline.types import Candidates
from tests.support.tiny_solo import tiny_config, tiny_network


def some_candidates(count: int = 12, seed: int = 0) -> Candidates:
    rng = np.random.default_rng(seed)
    scores = np.sort(rng.random(count).astype(np.float32))[::-1]
    masks = rng.random((count, 8, 8)).astype(np.float32)
    return Candidates(scores, rng.integers(0, 2, count), masks)


def reordered(candidates: Candidates, order: list[int]) -> Candidates:
    return Candidates(
        candidates.scores[order], candidates.labels[order], candidates.mask_probs[order]
    )


def test_equal_candidates_match_without_difference() -> None:
    found = match_candidates(some_candidates(), some_candidates())
    assert (found.candidates_torch, found.candidates_onnx, found.unmatched) == (12, 12, 0)
    assert found.max_score_difference == found.max_mask_difference == 0
    assert found.examples == []


def test_the_order_of_ties_does_not_matter() -> None:
    one = some_candidates()
    one.scores[3:6] = one.scores[3]
    one.labels[3:6] = 1
    other = reordered(one, [0, 1, 2, 5, 3, 4, *range(6, 12)])
    found = match_candidates(one, other)
    assert found.unmatched == 0 and found.max_mask_difference == 0


def test_small_differences_are_measured() -> None:
    one, other = some_candidates(), some_candidates()
    other.scores[2] += 2e-4
    other.mask_probs[7, 3, 3] += 5e-4
    found = match_candidates(one, other)
    assert found.unmatched == 0
    assert found.max_score_difference == pytest.approx(2e-4, rel=0.01)
    assert found.max_mask_difference == pytest.approx(5e-4, rel=0.01)


@pytest.mark.parametrize("what", ["score", "label", "mask"])
def test_a_larger_difference_leaves_both_without_a_partner(what: str) -> None:
    one, other = some_candidates(), some_candidates()
    if what == "score":
        other.scores[4] += 0.01
    elif what == "label":
        other.labels[4] = 9
    else:
        other.mask_probs[4, 0, 0] += 0.01
    found = match_candidates(one, other)
    assert found.unmatched == 2
    assert len(found.examples) == 1 and "score 0." in found.examples[0]


def test_a_missing_candidate_counts_once_and_each_has_one_partner() -> None:
    one = some_candidates()
    assert match_candidates(one, reordered(one, list(range(11)))).unmatched == 1
    assert match_candidates(reordered(one, [0, 0]), reordered(one, [0])).unmatched == 1
    assert match_candidates(reordered(one, []), reordered(one, [])).unmatched == 0


def test_masks_of_another_size_are_an_error() -> None:
    one = some_candidates(1)
    other = Candidates(one.scores, one.labels, np.zeros((1, 4, 8), np.float32))
    with pytest.raises(ParityError, match=r"\(8, 8\) in PyTorch and \(4, 8\) in ONNX Runtime"):
        match_candidates(one, other)


def test_cases_cover_sizes_batches_and_padding() -> None:
    cases = list(build_cases([(64, 96), (96, 64)], (1, 3)))
    assert [(c.content, c.images.shape) for c in cases[:4]] == [
        ("noise", (1, 64, 96, 3)),
        ("blobs", (1, 64, 96, 3)),
        ("noise", (3, 64, 96, 3)),
        ("blobs", (3, 64, 96, 3)),
    ]
    rows, columns = cases[2].valid_hw[1]
    assert (rows, columns) == (51, 84)
    assert not cases[2].images[1, rows:].any() and not cases[2].images[1, :, columns:].any()
    again = list(build_cases([(64, 96), (96, 64)], (1, 3)))
    assert all((a.images == b.images).all() for a, b in zip(cases, again, strict=True))


def test_blobs_have_structure() -> None:
    image = draw_blobs(np.random.default_rng(0), (96, 128))
    assert image.shape == (96, 128, 3) and image.std() > 10


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (TileResize(scale=2, tile_hw=(256, 256), overlap_px=64), ((512, 512), (384, 256))),
        (TileResize(scale=1, tile_hw=(64, 128), overlap_px=8), ((64, 128), (64, 64))),
        (KeepRatioResize(short_side=512, long_side=852), ((512, 512), (384, 256))),
        (KeepRatioResize(short_side=320, long_side=600), ((320, 416), (256, 192))),
    ],
)
def test_canvases_follow_the_served_ones(
    spec: TileResize | KeepRatioResize, expected: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    sizes = canvas_sizes(InputSpec(resize=spec))
    assert sizes == expected
    assert all(side % 32 == 0 for size in sizes for side in size)


class FakeSession:
    """Answers as the network does, but for one error."""

    def __init__(self, error: float) -> None:
        self.network = tiny_network(tiny_config())
        self.error = error

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        import torch

        with torch.inference_mode():
            outputs = self.network.candidates(
                torch.from_numpy(feeds["images"]), torch.from_numpy(feeds["valid_hw"])
            )
        scores, labels, masks = (o.numpy().copy() for o in outputs)
        return [scores, labels, np.clip(masks + self.error, 0, 1)]


def cases() -> Iterator[Case]:
    return build_cases([(64, 64), (64, 96)], (1, 2))


def compare_with(error: float, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("export.parity.ort.InferenceSession", lambda *_, **__: FakeSession(error))
    return compare(tiny_network(tiny_config()), b"", cases())


def test_a_good_report_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    report = compare_with(1e-5, monkeypatch)
    require_parity(report)
    assert report["passed"] and report["unmatched_share"] == 0
    assert report["total"]["max_mask_difference"] == pytest.approx(1e-5, rel=0.05)
    assert {(c["batch"], *c["canvas_hw"]) for c in report["cases"]} == {
        (1, 64, 64),
        (2, 64, 64),
        (1, 64, 96),
        (2, 64, 96),
    }


def test_a_bad_report_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    report = compare_with(0.01, monkeypatch)
    assert not report["passed"]
    with pytest.raises(ParityError, match=r"disagree on \d+ of \d+ candidates .* for example"):
        require_parity(report)


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_report_that_compared_nothing_is_refused(batches: int) -> None:
    comparison = Comparison(Tolerances())
    for case in itertools.islice(cases(), batches):
        none = [some_candidates(0)] * len(case.images)
        comparison.add(case, none, none)
    report = comparison.report({})
    assert report["passed"] is False and len(report["cases"]) == batches
    with pytest.raises(ParityError, match="nothing could be compared"):
        require_parity(report)


def test_a_graph_that_does_not_load_is_an_error() -> None:
    with pytest.raises(ParityError, match="cannot run the exported graph"):
        compare(tiny_network(tiny_config()), b"no graph", cases())


def test_tolerances_are_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    report = compare_with(0.0, monkeypatch)
    assert report["tolerances"] == {"score": 1e-3, "mask": 1e-3, "unmatched_share": 0.01}
    assert Tolerances(score=0.5).score == 0.5
