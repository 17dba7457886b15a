"""recipe="paper": candidates, mask NMS and binary masks, one after another (section 3.4)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from pipeline.postprocess import postprocess, select
from pipeline.types import Candidates, Prepared, Tile, Window
from tests.support.paper import KINDS, cell_probs, paper_config, sigmoid
from tests.support.tiny_solo import tiny_config, tiny_network
from training.configs.recipes import apply_recipe
from training.configs.schema import Config, HeadConfig, HeadKind
from training.model.head import LevelOutput
from training.model.solo import Solo

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
Row = tuple[float, int, NDArray[np.float64]]


def bilinear(mask: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Resizing by half-pixel bilinear interpolation, one output pixel after another."""

    def neighbours(index: int, size: int, new: int) -> tuple[int, int, float]:
        at = min(max((index + 0.5) * size / new - 0.5, 0.0), size - 1.0)
        low = int(at)
        return low, min(low + 1, size - 1), at - low

    if mask.shape == (height, width):
        return mask
    resized = np.zeros((height, width))
    for y in range(height):
        a, b, u = neighbours(y, mask.shape[0], height)
        for x in range(width):
            c, d, v = neighbours(x, mask.shape[1], width)
            top = mask[a, c] * (1 - v) + mask[a, d] * v
            resized[y, x] = top * (1 - u) + (mask[b, c] * (1 - v) + mask[b, d] * v) * u
    return resized


def ranked(model: Solo, outputs: list[LevelOutput], image: int) -> list[Row]:
    """Every cell and class with a score above 0.1, best first, cut at K; masks at stride 4."""
    size = outputs[0].mask_inputs[0].shape[-2:]
    rows: list[tuple[float, int, int, int, int]] = []
    for level, output in enumerate(outputs):
        grid = model.config.head.num_grids[level]
        for i in range(grid):
            for j in range(grid):
                for label in range(model.num_classes):
                    score = sigmoid(output.category_logits[image, label, i, j].item())
                    if score > 0.1:
                        rows.append((score, label, level, i, j))
    rows = sorted(rows, key=lambda row: -row[0])[: model.config.candidates]
    probs = [cell_probs(model, output, level, image) for level, output in enumerate(outputs)]
    if not model.head.decoupled:
        return [(s, c, bilinear(probs[k][i, j], *size)) for s, c, k, i, j in rows]
    found = []  # X and Y are enlarged before their product is taken, as the published code does
    for score, label, level, i, j in rows:
        x, y = (m[image].double().sigmoid().numpy() for m in outputs[level].mask_inputs)
        found.append((score, label, bilinear(x[j], *size) * bilinear(y[i], *size)))
    return found


def overlap(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    both = either = 0
    for p, q in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True):
        both += p > 0.5 and q > 0.5
        either += p > 0.5 or q > 0.5
    return both / either if either else 0.0


def suppressed(rows: list[Row], threshold: float = 0.5) -> list[int]:
    """Mask NMS: indices of what no better kept mask of its class overlaps too much."""
    kept: list[int] = []
    for index, (_, label, mask) in enumerate(rows):
        if not (mask > 0.5).any():
            continue
        better = [k for k in kept if rows[k][1] == label]
        if all(overlap(rows[k][2], mask) <= threshold for k in better):
            kept.append(index)
    return kept


def run(kind: HeadKind, candidates: int) -> tuple[Config, Solo, Tensor, Tensor]:
    config = paper_config(kind)
    config = replace(config, model=replace(config.model, candidates=candidates))
    model = tiny_network(config)
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (2, 64, 64, 3), generator=generator, dtype=torch.uint8)
    return config, model, images, torch.tensor([[64, 64], [50, 60]])


@torch.inference_mode()
@EVERY_KIND
@pytest.mark.parametrize("candidates", [25, 1000], ids=["cut", "all"])
def test_candidates(kind: HeadKind, candidates: int) -> None:
    _, model, images, valid_hw = run(kind, candidates)
    outputs = model(model.normalise(images, valid_hw))
    scores, labels, probs = model.candidates(images, valid_hw)
    for image in range(2):
        rows = ranked(model, outputs, image)
        assert (scores[image] > 0).sum().item() == len(rows)
        for k, (score, label, mask) in enumerate(rows[:25]):
            assert scores[image, k].item() == pytest.approx(score, abs=1e-6)
            assert labels[image, k].item() == label
            np.testing.assert_allclose(probs[image, k].numpy(), mask, rtol=0, atol=1e-5)


@torch.inference_mode()
@EVERY_KIND
def test_from_candidates_to_instances(kind: HeadKind) -> None:
    """Mask NMS, then the best so many, enlarged to the image and binarised at 0.5."""
    config, model, images, valid_hw = run(kind, 25)
    outputs = model(model.normalise(images, valid_hw))
    found = [t.numpy() for t in model.candidates(images, valid_hw)]
    for image, (height, width) in enumerate(valid_hw.tolist()):
        rows = ranked(model, outputs, image)
        kept = suppressed(rows)
        assert 2 < len(kept) < len(rows), "NMS has something to keep and something to drop"
        candidates = Candidates(*(t[image] for t in found))
        scores, indices = select(candidates, config.postprocess)
        assert indices.tolist() == kept
        np.testing.assert_allclose(scores, [rows[k][0] for k in kept], atol=1e-6)
        full = [bilinear(rows[k][2], 64, 64)[:height, :width] for k in kept]
        seen = [(k, mask) for k, mask in zip(kept, full, strict=True) if (mask > 0.5).any()]
        tile = Tile(images[image].numpy(), (height, width), Window(0, 0, height, width))
        prepared = Prepared((height, width), (tile,))
        for bound in (2, 100):
            instances = postprocess(
                prepared, [candidates], config.postprocess, max_instances=bound
            ).instances
            assert len(instances) == len(seen[:bound])
            for instance, (k, mask) in zip(instances, seen, strict=False):
                assert instance.label == rows[k][1]
                assert instance.score == pytest.approx(rows[k][0], abs=1e-6)
                sure = np.abs(mask - 0.5) > 1e-4
                pixels = coco_mask.decode(instance.rle)
                np.testing.assert_array_equal(pixels[sure], (mask > 0.5)[sure])


def masks_at(*spans: tuple[int, int]) -> NDArray[np.float32]:
    masks = np.zeros((len(spans), 8, 40), np.float32)
    for mask, (first, last) in zip(masks, spans, strict=True):
        mask[2:6, first:last] = 0.9
    return masks


@pytest.mark.parametrize(
    ("spans", "labels", "kept"),
    [
        ([(0, 10), (0, 10), (20, 30)], [0, 0, 0], [0, 2]),
        ([(0, 10), (0, 10), (0, 10)], [0, 1, 0], [0, 1]),  # another class is left alone
        ([(0, 20), (0, 10), (0, 12)], [0, 0, 0], [0, 1]),  # IoU 0.5 stays, 0.6 goes
        ([(0, 10), (4, 16), (9, 20)], [0, 0, 0], [0, 1, 2]),
        ([(0, 12), (3, 15), (6, 18)], [0, 0, 0], [0, 2]),  # what was dropped drops nothing
        ([(0, 0), (0, 10), (5, 5)], [0, 0, 0], [1]),  # empty masks are no instances
        ([(0, 0)], [0], []),
    ],
)
def test_mask_nms_of_nasty_cases(
    spans: list[tuple[int, int]], labels: list[int], kept: list[int]
) -> None:
    masks = masks_at(*spans)
    scores = np.linspace(0.9, 0.3, len(spans)).astype(np.float32)
    rows = [(float(s), c, m.astype(float)) for s, c, m in zip(scores, labels, masks, strict=True)]
    assert suppressed(rows) == kept
    spec = apply_recipe(tiny_config(), "paper").postprocess
    _, found = select(Candidates(scores, np.array(labels), masks), spec)
    assert found.tolist() == kept


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_mask_nms_by_brute_force(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 12))
    ends = [sorted(data.draw(st.tuples(*[st.integers(0, 40)] * 2))) for _ in range(count)]
    labels = [data.draw(st.integers(0, 2)) for _ in range(count)]
    masks = masks_at(*((a, b) for a, b in ends))
    scores = np.linspace(0.9, 0.2, count).astype(np.float32)
    rows = [(float(s), c, m.astype(float)) for s, c, m in zip(scores, labels, masks, strict=True)]
    spec = apply_recipe(tiny_config(), "paper").postprocess
    _, found = select(Candidates(scores, np.array(labels, np.int64), masks), spec)
    assert found.tolist() == suppressed(rows)


def test_the_papers_numbers_are_the_defaults() -> None:
    """Section 3.4: score above 0.1, top 500, binarise at 0.5, top 100; section 3.3: 0.2."""
    config = apply_recipe(Config(name="paper"), "paper")
    assert (config.model.candidate_threshold, config.model.candidates) == (0.1, 500)
    assert (config.postprocess.mask_threshold, config.postprocess.max_instances) == (0.5, 100)
    assert config.targets.centre_scale == 0.2
    assert config.model.head == HeadConfig(category_kernel=1, mask_kernel=1)
