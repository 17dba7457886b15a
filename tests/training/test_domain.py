"""Fitting a model's domain to its training images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.domain import describe_image, measure_distance
from pipeline.model_config import DomainSpec
from pipeline.types import UInt8
from service.models.repository import read_config
from tests.support.blob_model import publish
from tests.support.tiny import annotation_of, disc, write_image, write_split
from training.domain import LEAST_IMAGES, Described, fit_domain, main, write_domain

HW = (64, 80)


def _picture(rng: np.random.Generator, *, bright: bool) -> UInt8:
    """Discs on a ground; two kinds of images that differ in brightness."""
    grey = np.full(HW, 200 if bright else 20, np.float64)
    for _ in range(6):
        y, x = rng.uniform(0, HW[0]), rng.uniform(0, HW[1])
        grey[disc(*HW, y, x, rng.uniform(4, 9)) > 0] = 110 if bright else 130
    grey += rng.normal(0, 2, HW)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def _noise(rng: np.random.Generator) -> UInt8:
    return rng.integers(0, 256, (*HW, 3), dtype=np.uint8)


def _pictures(count: int, seed: int) -> list[UInt8]:
    rng = np.random.default_rng(seed)
    return [_picture(rng, bright=i % 3 == 0) for i in range(count)]


def _describe(image: UInt8, confidence: float = 0.5) -> Described:
    appearance = describe_image(image)
    assert appearance is not None
    return Described(appearance, confidence)


def _is_usual(described: Described, spec: DomainSpec) -> bool:
    distance = measure_distance(described.appearance, described.confidence, spec)
    return distance <= spec.threshold


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for split, count in (("train", 40), ("val", 20)):
        names = []
        for number, picture in enumerate(_pictures(count, len(split))):
            write_image(root / "images" / f"{split}{number}.png", picture)
            names.append((f"{split}{number}.png", *HW))
        write_split(root, split, names, [annotation_of(disc(*HW, 30, 30, 8), 1, 3)])
    return root


def test_other_images_are_farther_than_those_of_either_kind() -> None:
    spec = fit_domain([_describe(image) for image in _pictures(60, 0)], centres=4)
    usual = [_is_usual(_describe(image), spec) for image in _pictures(60, 1)]
    assert np.mean(usual) > 0.85
    for number in range(10):
        other = _describe(_noise(np.random.default_rng(number)))
        assert measure_distance(other.appearance, 0.5, spec) > 2 * spec.threshold


def test_images_in_which_less_is_found_than_in_any_like_them_are_unusual() -> None:
    """Images of the first kind hold little, those of the second are found with high scores."""
    rng = np.random.default_rng(0)
    sure = [0.3 if number % 3 == 0 else 0.9 for number in range(60)]
    described = [
        _describe(image, confidence + rng.normal(0, 0.01))
        for image, confidence in zip(_pictures(60, 0), sure, strict=True)
    ]
    spec = fit_domain(described, centres=4)
    empty, full = _pictures(2, 1)
    assert _is_usual(_describe(empty, 0.3), spec) and _is_usual(_describe(empty, 0.9), spec)
    assert _is_usual(_describe(full, 0.9), spec) and not _is_usual(_describe(full, 0.1), spec)


def test_the_same_images_give_the_same_domain_and_blank_ones_change_nothing() -> None:
    described = [_describe(image) for image in _pictures(30, 0)]
    assert fit_domain(described) == fit_domain([*described[:7], None, *described[7:]])


def test_equal_images_are_no_fault() -> None:
    described = _describe(_pictures(1, 0)[0])
    assert _is_usual(described, fit_domain([described] * LEAST_IMAGES))


@pytest.mark.parametrize("count", [0, LEAST_IMAGES - 1])
def test_too_few_images_are_refused(count: int) -> None:
    described = [_describe(image) for image in _pictures(count, 0)]
    with pytest.raises(ValueError, match=f"{count} images .* {LEAST_IMAGES} are needed"):
        fit_domain([*described, None])


def test_the_command_prints_shares_and_stores_the_domain(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other = publish(tmp_path / "repo"), tmp_path / "other"
    for number in range(4):
        write_image(other / "a" / f"{number}.png", _noise(np.random.default_rng(number)))
    write_image(other / "white.png", np.full((*HW, 3), 255, np.uint8))
    arguments = [str(folder), "--data", str(data), "--other", str(other)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"{other}: 4 of 4 images are unusual (100.0%), 1 cannot be judged" in printed
    assert "train: " in printed and "val: " in printed
    assert read_config(folder).domain is None
    assert main([*arguments, "--write"]) == 0
    domain = read_config(folder).domain
    assert domain is not None and len(domain.centres) == 10
    content = json.loads((folder / "config.json").read_text())
    assert content["versions"]["1"]["provenance"] == {"made_by": "tests"}


def test_it_is_stored_with_its_version(tmp_path: Path) -> None:
    folder = publish(tmp_path)
    spec = fit_domain([_describe(image) for image in _pictures(30, 0)])
    write_domain(folder, 1, spec)
    assert read_config(folder).domain == spec


@pytest.mark.parametrize("kind", ["empty", "damaged", "missing data"])
def test_a_fault_is_one_line(
    kind: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    if kind == "damaged":
        (other / "a.png").write_bytes(b"nonsense")
    data = tmp_path / "none" if kind == "missing data" else data
    assert main([str(publish(tmp_path / "repo")), "--data", str(data), "--other", str(other)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("domain: ") and error.count("\n") == 1
    assert {"empty": "has no images", "damaged": "a.png", "missing data": "none"}[kind] in error
