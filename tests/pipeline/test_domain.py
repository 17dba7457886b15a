"""Warnings for images that are unlike a model's training images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.domain import (
    NOT_JUDGED,
    UNUSUAL,
    check_domain,
    describe_exposures,
    describe_image,
    measure_distance,
)
from pipeline.model_config import STATISTICS, DomainSpec, ModelConfig
from pipeline.types import AnswerWarning, UInt8
from tests.support.tiny import disc


def _discs(height: int = 200, width: int = 260, seed: int = 0) -> UInt8:
    """Smooth bright discs on a dark ground."""
    rng = np.random.default_rng(seed)
    grey = np.full((height, width), 20, np.uint8)
    for _ in range(12):
        y, x, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(6, 14)
        grey[disc(height, width, y, x, radius) > 0] = 120
    return np.repeat(grey[..., None], 3, axis=2)


def _stripes(height: int = 200, width: int = 260) -> UInt8:
    image = np.zeros((height, width, 3), np.uint8)
    image[:, ::4] = (250, 200, 20)
    return image


def _spec(image: UInt8, threshold: float = 1.0) -> DomainSpec:
    """A domain of one typical image, whose confidence is 0.5."""
    appearance = describe_image(image)
    assert appearance is not None
    return DomainSpec(
        statistics=STATISTICS,
        spreads=(0.1,) * len(STATISTICS),
        centres=((9.0,) * len(STATISTICS), (*appearance.tolist(), 0.5)),
        threshold=threshold,
    )


def _check(
    image: UInt8, config: ModelConfig, levels: UInt8 | None = None, confidence: float = 0.5
) -> list[AnswerWarning]:
    return check_domain(describe_exposures(image, config, levels), confidence, config)


def _config(**changes: Any) -> ModelConfig:
    content = {
        "name": "cells",
        "version": 1,
        "input": {"resize": {"rule": "keep_ratio", "short_side": 64, "long_side": 64}},
        "classes": [{"category_id": 1, "name": "cell"}],
        "candidates": 1,
        "mask_stride": 4,
        "postprocess": {"nms": {"kind": "matrix"}},
        "files": {"model.onnx": {"sha256": "0" * 64, "bytes": 1}},
        **changes,
    }
    return ModelConfig.model_validate(content)


def test_an_image_of_another_kind_gets_a_warning_that_says_what_the_model_is_for() -> None:
    config = _config(domain=_spec(_discs(), 3.0), card={"domain": "round cells"})
    assert _check(_discs(), config) == []
    assert _check(_discs(seed=1), config) == []
    (warning,) = _check(_stripes(), config)
    assert warning.code == UNUSUAL
    for text in ("'cells'", "(round cells)", "usually up to 3.0"):
        assert text in warning.message


def test_a_stretched_image_is_judged_as_it_was_recorded() -> None:
    dim = _discs() // 8
    config = _config(domain=_spec(dim, 0.2))
    recorded = np.linspace(0, 15, 256).round().astype(np.uint8)  # of a stretch of 0..15 to 0..255
    levels = np.stack([np.arange(256, dtype=np.uint8), recorded])
    assert _check(dim, config) == _check(dim * 17, config, levels) == []
    assert [w.code for w in _check(dim * 17, config)] == [UNUSUAL]


def test_an_image_in_which_little_is_found_is_unusual_and_one_in_which_more_is_found_is_not() -> (
    None
):
    config = _config(domain=_spec(_discs(), 3.0))
    assert _check(_discs(), config, confidence=1.0) == []
    assert _check(_discs(), config, confidence=0.21) == []
    assert [w.code for w in _check(_discs(), config, confidence=0.19)] == [UNUSUAL]


def test_a_domain_without_confidence_goes_by_the_pixels_alone() -> None:
    spec = _spec(_discs(), 3.0)
    older = DomainSpec(
        statistics=STATISTICS[:-1],
        spreads=spec.spreads[:-1],
        centres=tuple(centre[:-1] for centre in spec.centres),
        threshold=3.0,
    )
    config = _config(domain=older)
    assert _check(_discs(), config, confidence=0.0) == []
    assert [w.code for w in _check(_stripes(), config, confidence=1.0)] == [UNUSUAL]


def test_a_model_without_a_domain_never_warns() -> None:
    assert _check(_stripes(), _config()) == []


@pytest.mark.parametrize(
    "image",
    [
        np.full((300, 300, 3), 255, np.uint8),
        np.zeros((300, 300, 3), np.uint8),
        np.full((300, 300, 3), 128, np.uint8),
        np.full((4000, 30, 3), (250, 20, 20), np.uint8),
        _stripes(1, 1),
        _stripes(23, 900),
    ],
)
def test_what_cannot_be_judged_is_said_and_not_called_unusual(image: UInt8) -> None:
    (warning,) = _check(image, _config(domain=_spec(_discs())))
    assert warning.code == NOT_JUDGED and "too small or too uniform" in warning.message


def test_of_the_hues_only_yellow_counts() -> None:
    bright, dim = _discs()[..., 0], _discs()[..., 0] // 2

    def describe(*channels: UInt8) -> dict[str, float]:
        statistics = describe_image(np.stack(channels, axis=2))
        assert statistics is not None
        return dict(zip(STATISTICS, statistics.tolist(), strict=False))

    grey, red = describe(bright, bright, bright), describe(bright, dim, dim)
    purple, yellow = describe(bright, dim, bright), describe(bright, bright, dim)
    assert grey["saturation"] == 0 < red["saturation"] == purple["saturation"]
    assert yellow["yellow"] > 0 == red["yellow"] == purple["yellow"] == grey["yellow"]


@pytest.mark.parametrize("hw", [(24, 24), (25, 3000), (63, 65), (1000, 24)])
def test_every_size_from_the_least_has_finite_statistics(hw: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 60, (*hw, 3), dtype=np.uint8)
    image[: hw[0] // 2] += 190
    statistics = describe_image(image)
    assert statistics is not None
    assert statistics.shape == (len(STATISTICS) - 1,) and np.isfinite(statistics).all()


def test_texture_is_that_of_the_full_resolution() -> None:
    """A thumbnail alone would not tell fine noise from a smooth image."""
    smooth = np.repeat(np.linspace(0, 255, 800, dtype=np.uint8)[None, :, None], 600, axis=0)
    smooth = np.repeat(smooth, 3, axis=2)
    noise = np.random.default_rng(0).integers(-20, 21, smooth.shape[:2])[..., None]
    noisy = np.clip(smooth + noise, 0, 255).astype(np.uint8)
    place = STATISTICS.index("detail")
    first, second = describe_image(smooth), describe_image(noisy)
    assert first is not None and second is not None
    assert second[place] > 5 * first[place]
    direction = STATISTICS.index("direction")
    stripes = describe_image(_stripes())
    assert stripes is not None
    assert stripes[direction] > 0.9 > 0.5 > second[direction]


def test_the_distance_is_to_the_nearest_centre_in_spreads() -> None:
    count = len(STATISTICS)
    spec = DomainSpec(
        statistics=STATISTICS,
        spreads=(2.0, *(1.0,) * (count - 1)),
        centres=((0.0,) * count, (10.0,) * count),
        threshold=1,
    )
    near_first = np.array([6.0, 4.0, *(0.0,) * (count - 3)])
    assert measure_distance(near_first, 0.0, spec) == pytest.approx(5)
    assert measure_distance(near_first, 7.0, spec) == pytest.approx(5)
    assert measure_distance(near_first, -12.0, spec) == pytest.approx(13)
    assert measure_distance(np.full(count - 1, 10.0), 7.0, spec) == pytest.approx(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"statistics": ["mean", "hue"]}, "this version has"),
        ({"spreads": [0.1]}, "has not 9 values"),
        ({"spreads": [0.0] * 9}, "greater than 0"),
        ({"centres": []}, "at least 1"),
        ({"centres": [[0.0] * 9, [0.0] * 8]}, "centre .* has not 9 values"),
        ({"centres": [[float("nan")] * 9]}, "finite"),
        ({"threshold": 0}, "greater than 0"),
        ({"kind": "gaussian"}, "Extra inputs"),
    ],
)
def test_a_damaged_section_is_refused(change: dict[str, Any], message: str) -> None:
    content = _spec(_discs()).model_dump(mode="json")
    with pytest.raises(ValidationError, match=message):
        DomainSpec.model_validate({**content, **change})
