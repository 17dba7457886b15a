from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from pipeline.model_config import MaskNms, MatrixNms
from training.configs import get_config, list_configs
from training.configs.recipes import apply_recipe
from training.model.head import SoloHead


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
    assert (paper.model.head.category_kernel, paper.model.head.mask_kernel) == (1, 1)
    assert paper.schedule.skip_empty_images and published.schedule.skip_empty_images
    # Nothing else moves: not the network, the data or the response's own limits.
    head = replace(paper.model.head, category_kernel=3, mask_kernel=3)
    assert head == published.model.head == config.model.head
    assert published.model == replace(config.model, recipe="published")
    assert paper.input == config.input and published.augment == config.augment
    assert paper.postprocess.score_threshold == config.postprocess.score_threshold
    assert paper.postprocess.max_instances == config.postprocess.max_instances


def test_the_published_models_follow_the_published_recipe() -> None:
    config = get_config("solo_r50")
    assert apply_recipe(config, "published") == config


def test_the_paper_recipe_has_one_by_one_output_convolutions_only() -> None:
    for name in ("solo_r50", "decoupled_solo_r50"):
        head = SoloHead(apply_recipe(get_config(name), "paper").model.head, 256, 80)
        kernels = {
            key: module.kernel_size[0]
            for key, module in head.named_modules()
            if isinstance(module, nn.Conv2d)
        }
        outputs = {key for key in kernels if "_out" in key}
        assert len(outputs) in (6, 11)
        assert {kernels[key] for key in outputs} == {1}
        assert {kernels[key] for key in kernels.keys() - outputs} == {3}


def test_the_jitter_of_the_paper_at_512_is_that_of_800_scaled() -> None:
    low, high = get_config("solo_r50").augment.short_sides
    assert (low, high) == (640, 800)
    for name in ("solo_512_r50", "solo_512_r101"):
        config = get_config(name)
        assert config.augment.short_sides == (352, 512)
        paper = apply_recipe(config, "paper").augment.short_sides
        assert paper == (round(low * 512 / high), 512)
    assert apply_recipe(get_config("solo_r50"), "paper").augment.short_sides == (640, 800)


def test_contours_have_the_papers_inference_only_in_the_papers_recipe() -> None:
    config = get_config("solo_r50_contour")
    paper = apply_recipe(config, "paper")
    assert paper.postprocess.compare == "masks"
    assert paper.postprocess.mask_threshold == paper.model.mask_threshold == 0.5
    back = apply_recipe(paper, "published")
    assert back.postprocess.compare == "enclosed"
    assert back.postprocess.mask_threshold == back.model.mask_threshold == 0.2
    assert back == apply_recipe(config, "published")


def test_another_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="recipe is 'papers', expected one of paper, published"):
        apply_recipe(get_config("nuclei"), "papers")  # type: ignore[arg-type]
