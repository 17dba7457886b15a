from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.model_config import MaskNms, MatrixNms
from training.configs import get_config, list_configs
from training.configs.recipes import apply_recipe


@pytest.mark.parametrize("name", list_configs())
def test_the_paper_recipe_changes_every_place_and_back(name: str) -> None:
    config = get_config(name)
    paper = apply_recipe(config, "paper")
    assert (paper.model.recipe, paper.targets.recipe) == ("paper", "paper")
    assert paper.loss.dice_eps == 0 and paper.schedule.clip_norm is None
    assert isinstance(paper.postprocess.nms, MaskNms) and paper.postprocess.update_threshold == 0
    published = apply_recipe(paper, "published")
    assert (published.model.recipe, published.targets.recipe) == ("published", "published")
    assert published.loss.dice_eps == 1e-3 and published.schedule.clip_norm == 35
    assert published.postprocess.nms == MatrixNms()
    # Nothing else moves: not the network, the data or the response's own limits.
    assert replace(paper.model, recipe="published") == replace(config.model, recipe="published")
    assert (paper.input, paper.augment) == (config.input, config.augment)
    assert paper.postprocess.score_threshold == config.postprocess.score_threshold
    assert paper.postprocess.max_instances == config.postprocess.max_instances


def test_the_published_models_follow_the_published_recipe() -> None:
    config = get_config("solo_r50")
    assert apply_recipe(config, "published") == config


def test_another_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="recipe is 'papers', expected one of paper, published"):
        apply_recipe(get_config("nuclei"), "papers")  # type: ignore[arg-type]
