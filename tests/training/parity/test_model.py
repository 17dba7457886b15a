"""Our network against the published implementation's numbers, from the image to the masks."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipeline.model_config import MatrixNms, PostprocessSpec
from pipeline.postprocess import postprocess, select
from pipeline.types import Candidates, Detection, Prepared, Tile, Window
from tests.support.dense_paste import axis_matrix
from tests.support.parity import (
    TIE,
    ParityModel,
    check_points_nms,
    close,
    each,
    load_input,
    load_metas,
    load_parity_model,
    parity_models,
    read_npz,
)
from training.model.head import LevelOutput
from training.model.solo import Solo, points_nms

PAIRS = [(which, case) for which in parity_models() for case in which.cases()]
EVERY_CASE = each("which,case", PAIRS)
FEATURE_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 1e-4
PROBABILITY_TOLERANCE = 1e-5
DIFFERING_PIXELS = 1e-4
KERNELS: tuple[Literal["gaussian", "linear"], ...] = ("gaussian", "linear")

Stored = dict[str, NDArray[Any]]


def run(which: ParityModel, case: str) -> tuple[Solo, list[LevelOutput], Stored]:
    model = load_parity_model(which)
    with torch.inference_mode():
        outputs = model(load_input(which, case))
    return model, outputs, read_npz(which.folder / f"{case}.npz")


def all_masks(model: Solo, output: LevelOutput, level: int) -> dict[str, NDArray[np.float32]]:
    """Logits of every channel of a level by the fixtures' names."""
    if model.head.decoupled:
        x, y = output.mask_inputs
        return {f"mask_x{level}": x.numpy(), f"mask_y{level}": y.numpy()}
    with torch.inference_mode():
        logits = model.head.mask_out[level](output.mask_inputs[0])
    return {f"mask{level}": logits.numpy()}


@EVERY_CASE
def test_backbone_and_pyramid(which: ParityModel, case: str) -> None:
    model = load_parity_model(which)
    stored = read_npz(which.root / f"{which.size}_features.npz")
    if f"{case}_c2" not in stored:
        pytest.skip(f"{which} has no features of {case}")
    with torch.inference_mode():
        backbone = model.backbone(load_input(which, case))
        neck = model.neck(backbone)
    for name, x in [(f"c{i}", x) for i, x in enumerate(backbone, 2)] + [
        (f"p{i}", x) for i, x in enumerate(neck, 2)
    ]:
        expected = stored[f"{case}_{name}"]
        step = x.shape[1] // expected.shape[1]
        close(x[:, ::step].numpy(), expected, FEATURE_TOLERANCE)


@EVERY_CASE
def test_raw_logits(which: ParityModel, case: str) -> None:
    model, outputs, stored = run(which, case)
    for level, output in enumerate(outputs):
        close(output.category_logits.numpy(), stored[f"train_cls{level}"], LOGIT_TOLERANCE)
        for name, logits in all_masks(model, output, level).items():
            channels = stored.get(f"train_{name}_idx", np.arange(logits.shape[1]))
            close(logits[:, channels], stored[f"train_{name}"], LOGIT_TOLERANCE)
            if f"train_{name}_mean" in stored:
                mean, std = logits.mean(axis=(2, 3)), logits.std(axis=(2, 3), ddof=1)
                close(mean, stored[f"train_{name}_mean"], LOGIT_TOLERANCE)
                if not np.allclose(std, stored[f"train_{name}_std"], atol=LOGIT_TOLERANCE):
                    std = logits.std(axis=(2, 3))
                close(std, stored[f"train_{name}_std"], LOGIT_TOLERANCE)


@EVERY_CASE
def test_a_positive_cell_gets_the_logits_of_its_channel(which: ParityModel, case: str) -> None:
    model, outputs, _ = run(which, case)
    image = outputs[0].category_logits.shape[0] - 1
    for level, output in enumerate(outputs):
        grid = model.config.head.num_grids[level]
        cells = torch.tensor([0, grid, grid * grid - 1])
        masks = all_masks(model, output, level)
        with torch.inference_mode():
            found = model.head.cell_logits(output, level, image, cells)
        if model.head.decoupled:
            close(found[0].numpy(), masks[f"mask_x{level}"][image, cells % grid], 1e-5)
            close(found[1].numpy(), masks[f"mask_y{level}"][image, cells // grid], 1e-5)
        else:
            close(found[0].numpy(), masks[f"mask{level}"][image, cells], 1e-5)


@EVERY_CASE
def test_points_nms_and_masks_at_the_finest_stride(which: ParityModel, case: str) -> None:
    model, outputs, stored = run(which, case)
    step = int(stored["eval_step"])
    size = outputs[0].mask_inputs[0].shape[-2:]
    for level, output in enumerate(outputs):
        probs = output.category_logits.sigmoid()
        ties = check_points_nms(
            probs, points_nms(probs), stored[f"eval_cls{level}"], PROBABILITY_TOLERANCE
        )
        # No candidate is such a tie, so the tests of candidates below compare exactly.
        assert (probs.numpy()[ties] < model.config.candidate_threshold - TIE).all()
        for name, logits in all_masks(model, output, level).items():
            if f"eval_{name}" not in stored:
                continue
            masks = torch.nn.functional.interpolate(
                torch.from_numpy(logits).sigmoid(), size=size, mode="bilinear"
            ).numpy()
            channels = stored.get(f"eval_{name}_idx", np.arange(masks.shape[1]))
            masks = masks[:, channels, ::step, ::step]
            close(masks, stored[f"eval_{name}"], PROBABILITY_TOLERANCE)


def candidates_of(which: ParityModel, case: str) -> tuple[list[Candidates], Stored]:
    model, outputs, stored = run(which, case)
    with torch.inference_mode():
        scores, labels, probs = model.rank(outputs)
    found = [
        Candidates(s, c, m)
        for s, c, m in zip(scores.numpy(), labels.numpy(), probs.numpy(), strict=True)
    ]
    return found, stored


@EVERY_CASE
def test_candidates_and_the_order_after_matrix_nms(which: ParityModel, case: str) -> None:
    found, stored = candidates_of(which, case)
    for image, candidates in enumerate(found):
        expected = stored[f"gaussian{image}_cand_scores"]
        assert len(expected)
        order = np.argsort(-expected, kind="stable")
        filled = candidates.scores > 0
        assert filled.sum() == len(expected)
        close(candidates.scores[filled], expected[order], PROBABILITY_TOLERANCE)
        labels = candidates.labels[filled]
        np.testing.assert_array_equal(labels, stored[f"gaussian{image}_cand_labels"][order])
        masks = candidates.mask_probs[filled] > 0.5
        areas = stored[f"gaussian{image}_cand_area"][order]
        np.testing.assert_array_equal(masks.sum(axis=(1, 2)), areas)
        for kernel in KERNELS:
            key = f"{kernel}{image}_"
            if kernel == "linear" and f"{key}scores" not in stored:
                continue
            spec = PostprocessSpec(nms=MatrixNms(kernel=kernel))
            scores, kept = select(candidates, spec)
            close(scores[:100], stored[f"{key}scores"], PROBABILITY_TOLERANCE)
            np.testing.assert_array_equal(candidates.labels[kept][:100], stored[f"{key}labels"])
            np.testing.assert_array_equal(order[kept][:100], stored[f"{key}keep_inds"])


def instances_of(
    candidates: Candidates, meta: dict[str, Any], threshold: float = 0.0
) -> list[Detection]:
    canvas_h, canvas_w = meta["batch_input_shape"]
    height, width = meta["ori_shape"]
    tile = Tile(
        np.zeros((canvas_h, canvas_w, 3), np.uint8),
        tuple(meta["img_shape"]),
        Window(0, 0, height, width),
    )
    prepared = Prepared((height, width), (tile,))
    spec = PostprocessSpec(nms=MatrixNms(), max_instances=100)
    return postprocess(prepared, [candidates], spec, score_threshold=threshold).instances


@EVERY_CASE
def test_final_masks(which: ParityModel, case: str) -> None:
    found, stored = candidates_of(which, case)
    for image, (candidates, meta) in enumerate(zip(found, load_metas(which, case), strict=True)):
        instances = instances_of(candidates, meta)
        shape = stored[f"gaussian{image}_masks_shape"]
        packed = stored[f"gaussian{image}_masks_packed"]
        expected = np.unpackbits(packed, axis=-1)[..., : shape[-1]].astype(bool)
        assert len(instances) == len(expected)
        scores = np.array([instance.score for instance in instances])
        close(scores, stored[f"gaussian{image}_scores"], PROBABILITY_TOLERANCE)
        labels = [instance.label for instance in instances]
        np.testing.assert_array_equal(labels, stored[f"gaussian{image}_labels"])
        masks = np.stack([coco_mask.decode(i.rle).astype(bool) for i in instances])
        assert (masks != expected).mean() < DIFFERING_PIXELS


@EVERY_CASE
def test_the_best_soft_mask_at_the_original_size(which: ParityModel, case: str) -> None:
    found, stored = candidates_of(which, case)
    for image, (candidates, meta) in enumerate(zip(found, load_metas(which, case), strict=True)):
        _, kept = select(candidates, PostprocessSpec(nms=MatrixNms()))
        probs = candidates.mask_probs[kept[0]]
        stride = meta["batch_input_shape"][0] // probs.shape[0]
        down, across = (
            axis_matrix(size, stride, valid, original)
            for size, valid, original in zip(
                probs.shape, meta["img_shape"], meta["ori_shape"], strict=True
            )
        )
        soft = down @ probs @ across.T
        close(soft[::2, ::2], stored[f"gaussian{image}_soft_top"][0], PROBABILITY_TOLERANCE)


@EVERY_CASE
def test_nothing_found_is_an_empty_result(which: ParityModel, case: str) -> None:
    found, stored = candidates_of(which, case)
    meta = load_metas(which, case)[0]
    empty = Candidates(np.zeros_like(found[0].scores), found[0].labels, found[0].mask_probs)
    assert len(instances_of(empty, meta)) == stored["none_masks_shape"][0] == 0
