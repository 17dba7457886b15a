"""The kernels' NMS against the NumPy pipeline's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline.model_config import MaskNms, MatrixNms, PostprocessSpec
from pipeline.postprocess import select
from service.engines.base import BackendError
from service.engines.kernels.launcher import Launcher
from service.engines.kernels.select import (
    DeviceBatch,
    MaskType,
    Selection,
    queue_ranking,
    read_ranking,
    select_batch,
)
from service.engines.kernels.workspace import WorkspacePool
from tests.support.kernel_cases import TIE, Outputs, draw_outputs, draw_special_masks
from tests.support.kernel_host import Uploads

GAUSSIAN = PostprocessSpec(nms=MatrixNms())
LINEAR = PostprocessSpec(nms=MatrixNms(kernel="linear"))
GREEDY = PostprocessSpec(nms=MaskNms())
SPECS = {"gaussian": GAUSSIAN, "linear": LINEAR, "greedy": GREEDY}


def run(launcher: Launcher, uploads: Uploads, outputs: Outputs, spec: PostprocessSpec) -> Any:
    pool = WorkspacePool(launcher.device)
    with pool.borrow(uploads.stream) as workspace:
        selections = select_batch(
            launcher, workspace, outputs.upload(uploads), spec, uploads.stream
        )
    pool.close()
    return selections


def assert_equal(selection: Selection, outputs: Outputs, image: int, spec: PostprocessSpec) -> None:
    """Exactly, but for the Gaussian: two `exp` differ by an ulp or so, and ties may change places.

    A survivor that only one side has must be within a tie of the threshold.
    """
    scores, indices = select(outputs.candidates(image), spec)
    found = selection.jobs[:, 0]
    if spec is not GAUSSIAN:
        np.testing.assert_array_equal(found, indices)
        np.testing.assert_array_equal(selection.scores, scores)
    ours = dict(zip(found.tolist(), selection.scores.tolist(), strict=True))
    theirs = dict(zip(indices.tolist(), scores.tolist(), strict=True))
    assert len(ours) == len(found)
    for index in ours.keys() ^ theirs.keys():
        score = ours[index] if index in ours else theirs[index]
        assert abs(score - spec.update_threshold) < TIE
    for index in ours.keys() & theirs.keys():
        assert abs(ours[index] - theirs[index]) < TIE
    assert (np.diff(selection.scores) <= 0).all()
    for place, index in enumerate(indices.tolist()):
        if index in ours:
            assert abs(selection.scores[min(place, len(found) - 1)] - theirs[index]) < TIE


def assert_boxes(selection: Selection, outputs: Outputs, image: int, threshold: float) -> None:
    for index, top, bottom, left, right in selection.jobs.tolist():
        above = outputs.mask_probs[image, index] > threshold
        rows, columns = np.flatnonzero(above.any(axis=1)), np.flatnonzero(above.any(axis=0))
        assert (top, bottom, left, right) == (rows[0], rows[-1], columns[0], columns[-1])


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize(
    ("batch", "candidates", "hw"),
    [(1, 1, (8, 8)), (3, 40, (25, 31)), (2, 33, (40, 56)), (4, 17, (7, 5)), (1, 500, (16, 20))],
)
def test_equals_numpy(
    launcher: Launcher,
    uploads: Uploads,
    kind: str,
    batch: int,
    candidates: int,
    hw: tuple[int, int],
) -> None:
    spec = SPECS[kind]
    outputs = draw_outputs(np.random.default_rng(candidates), batch, candidates, hw)
    selections = run(launcher, uploads, outputs, spec)
    assert len(selections) == batch
    survivors = 0
    for image, selection in enumerate(selections):
        assert_equal(selection, outputs, image, spec)
        assert_boxes(selection, outputs, image, spec.mask_threshold)
        survivors += len(selection.scores)
    assert survivors > 0
    if candidates > 1:
        assert survivors < np.count_nonzero(outputs.scores)  # NMS did something


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("mask_type", ["float16", "bfloat16"])
def test_sixteen_bit_masks_are_those_numbers(
    launcher: Launcher, uploads: Uploads, kind: str, mask_type: MaskType
) -> None:
    outputs = draw_outputs(np.random.default_rng(5), 2, 30, (19, 23), mask_type=mask_type)
    for image, selection in enumerate(run(launcher, uploads, outputs, SPECS[kind])):
        assert_equal(selection, outputs, image, SPECS[kind])
        assert_boxes(selection, outputs, image, 0.5)


@pytest.mark.parametrize("threshold", [0.0, 5e-7, 6e-5])
def test_subnormal_halves_are_widened(
    launcher: Launcher, uploads: Uploads, threshold: float
) -> None:
    values = np.arange(0, 4096, dtype=np.uint16).view(np.float16).reshape(1, 1, 64, 64)
    scores, labels = np.ones((1, 1), np.float32), np.zeros((1, 1), np.int64)
    outputs = Outputs(scores, labels, values, values.astype(np.float32), "float16")
    spec = GREEDY.model_copy(update={"mask_threshold": threshold})
    (selection,) = run(launcher, uploads, outputs, spec)
    assert_boxes(selection, outputs, 0, threshold)


@pytest.mark.parametrize("kind", SPECS)
def test_empty_slots_and_empty_masks_take_no_part(
    launcher: Launcher, uploads: Uploads, kind: str
) -> None:
    outputs = draw_outputs(np.random.default_rng(8), 3, 12, (20, 24), classes=1)
    outputs.scores[0, 8:] = 0
    outputs.scores[0, 3] = 0  # a hole
    outputs.masks[0, 0] = outputs.masks[0, 5] = 0.5  # not above the threshold
    outputs.scores[1] = 0
    outputs.scores[2], outputs.masks[2] = 0.9, 0.25
    selections = run(launcher, uploads, outputs, SPECS[kind])
    assert len(selections[0].scores) > 0
    assert {0, 3, 5, 8, 9, 10, 11}.isdisjoint(selections[0].jobs[:, 0].tolist())
    assert_equal(selections[0], outputs, 0, SPECS[kind])
    assert [len(selection.scores) for selection in selections[1:]] == [0, 0]


@pytest.mark.parametrize("kind", SPECS)
def test_special_masks(launcher: Launcher, uploads: Uploads, kind: str) -> None:
    masks = draw_special_masks((33, 40))[None]
    scores = np.linspace(0.9, 0.3, masks.shape[1], dtype=np.float32)[None]
    outputs = Outputs(scores, np.zeros(scores.shape, np.int64), masks, masks, "float32")
    (selection,) = run(launcher, uploads, outputs, SPECS[kind])
    assert_equal(selection, outputs, 0, SPECS[kind])
    assert_boxes(selection, outputs, 0, 0.5)


@pytest.mark.parametrize("kind", SPECS)
def test_equal_scores_keep_their_order(launcher: Launcher, uploads: Uploads, kind: str) -> None:
    """Disjoint masks keep their scores, so ties are exact here."""
    masks = np.zeros((1, 8, 8, 32), np.float32)
    for index in range(8):
        masks[0, index, :, 4 * index : 4 * index + 3] = 1
    scores = np.array([[0.8, 0.8, 0.8, 0.5, 0.5, 0.5, 0.5, 0.2]], np.float32)
    outputs = Outputs(scores, np.zeros((1, 8), np.int64), masks, masks, "float32")
    (selection,) = run(launcher, uploads, outputs, SPECS[kind])
    assert selection.jobs[:, 0].tolist() == list(range(8))
    np.testing.assert_array_equal(selection.scores, scores[0])


def test_identical_masks_of_one_class_are_one(launcher: Launcher, uploads: Uploads) -> None:
    masks = np.broadcast_to(np.float32(0.9), (1, 4, 9, 9)).copy()
    scores = np.array([[0.9, 0.8, 0.7, 0.6]], np.float32)
    labels = np.array([[0, 0, 1, 1]])
    outputs = Outputs(scores, labels, masks, masks, "float32")
    for spec in (LINEAR, GREEDY):
        (selection,) = run(launcher, uploads, outputs, spec)
        assert selection.jobs[:, 0].tolist() == [0, 2], spec.nms
    (selection,) = run(launcher, uploads, outputs, GAUSSIAN)
    assert_equal(selection, outputs, 0, GAUSSIAN)


def test_a_score_on_the_threshold_stays(launcher: Launcher, uploads: Uploads) -> None:
    masks = np.zeros((1, 2, 8, 8), np.float32)
    masks[0, 0, :3] = masks[0, 1, 4:] = 1
    scores = np.array([[0.5, 0.05]], np.float32)
    outputs = Outputs(scores, np.zeros((1, 2), np.int64), masks, masks, "float32")
    (selection,) = run(launcher, uploads, outputs, LINEAR)
    assert selection.jobs[:, 0].tolist() == [0, 1]
    above = LINEAR.model_copy(update={"update_threshold": 0.0501})
    (selection,) = run(launcher, uploads, outputs, above)
    assert selection.jobs[:, 0].tolist() == [0]


def test_scores_that_are_not_finite_are_refused(launcher: Launcher, uploads: Uploads) -> None:
    outputs = draw_outputs(np.random.default_rng(1), 1, 4, (8, 8))
    outputs.scores[0, 2] = np.nan
    pool = WorkspacePool(launcher.device)
    with pytest.raises(BackendError, match="not finite"), pool.borrow() as workspace:
        batch = outputs.upload(uploads)
        queue_ranking(launcher, workspace, batch, uploads.stream)
        launcher.device.synchronize(uploads.stream)
        read_ranking(workspace, batch)
    pool.close()


def test_sizes_that_do_not_fit_are_refused() -> None:
    good = DeviceBatch(
        scores=0,
        labels=0,
        mask_probs=0,
        mask_type="float32",
        batch=1,
        candidates=1,
        mask_hw=(4, 4),
        release=lambda: None,
    )
    changes: list[dict[str, Any]] = [
        {"batch": 0},
        {"candidates": 0},
        {"mask_hw": (4, 0)},
        {"mask_type": "int8"},
    ]
    for change in changes:
        with pytest.raises(BackendError, match="do not fit"):
            replace(good, **change)
