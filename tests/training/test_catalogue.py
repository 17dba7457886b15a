from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.parity import shared_file
from training.architecture import infer_config
from training.catalogue import (
    IMAGENET_RESNETS,
    SOLO_MODELS,
    PublishedModel,
    find_model,
    find_model_of_file,
    get_imagenet,
    get_model,
    list_models,
)
from training.configs import get_config
from training.convert import convert_state_dict
from training.model.solo import Solo

# What the publishers call the networks whose names and shapes are stored.
STORED = {
    "DECOUPLED_SOLO_LIGHT_DCN_R50_3x": "decoupled-solo-light-dcn_r50_fpn_3x_coco",
    "DECOUPLED_SOLO_LIGHT_R50_3x": "decoupled-solo-light_r50_fpn_3x_coco",
    "DECOUPLED_SOLO_R101_3x": "decoupled-solo_r101_fpn_3x_coco",
    "DECOUPLED_SOLO_R50_1x": "decoupled-solo_r50_fpn_1x_coco",
    "DECOUPLED_SOLO_R50_3x": "decoupled-solo_r50_fpn_3x_coco",
    "SOLO_R101_3x": "solo_r101_fpn_3x_coco",
    "SOLO_R50_1x": "solo_r50_fpn_1x_coco",
    "SOLO_R50_3x": "solo_r50_fpn_3x_coco",
    "decoupled_solo_light_r50_fpn_3x_coco": "decoupled-solo-light_r50_fpn_3x_coco",
    "decoupled_solo_r50_fpn_1x_coco": "decoupled-solo_r50_fpn_1x_coco",
    "decoupled_solo_r50_fpn_3x_coco": "decoupled-solo_r50_fpn_3x_coco",
    "solo_r50_fpn_1x_coco": "solo_r50_fpn_1x_coco",
    "solo_r50_fpn_3x_coco": "solo_r50_fpn_3x_coco",
}


def test_every_published_checkpoint_is_there() -> None:
    assert sorted(list_models()) == sorted(STORED)
    assert sum(model.publisher == "authors" for model in SOLO_MODELS) == 8


@pytest.mark.parametrize("model", SOLO_MODELS, ids=list_models())
def test_a_model_is_found_by_its_names(model: PublishedModel) -> None:
    assert get_model(model.name) is get_model(model.file_name) is model
    assert find_model(model.name.swapcase()) is model
    config = model.config()
    assert config.name == model.config_name
    lengths = {
        ("authors", "1x"): (12, (9, 11)),
        ("mmdetection", "1x"): (12, (8, 11)),
        ("authors", "3x"): (36, (27, 33)),
        ("mmdetection", "3x"): (36, (27, 33)),
    }
    found = (config.schedule.epochs, config.schedule.milestones)
    assert found == lengths[model.publisher, model.schedule]
    assert config.description.endswith(model.schedule)
    assert config.model == get_config(model.config_name).model
    assert 30 < model.mask_ap < 40


def test_locations() -> None:
    authors = get_model("SOLO_R101_3x")
    assert authors.location() == (
        "https://huggingface.co/xinlongwang/SOLO/resolve/main/SOLO_R101_3x.pth?download=true"
    )
    assert authors.sha256 == ""
    mmdetection = get_model("decoupled_solo_r50_fpn_3x_coco")
    assert mmdetection.location() == (
        "https://download.openmmlab.com/mmdetection/v2.0/solo/decoupled_solo_r50_fpn_3x_coco/"
        "decoupled_solo_r50_fpn_3x_coco_20210821_042504-7b3301ec.pth"
    )
    assert mmdetection.sha256 == "7b3301ec"
    assert get_imagenet(50).location() == (
        "https://download.pytorch.org/models/resnet50-0676ba61.pth"
    )


def test_the_names_carry_the_hashes() -> None:
    files = [*SOLO_MODELS, *IMAGENET_RESNETS.values()]
    hashed = [file for file in files if file.sha256]
    assert set(hashed) & set(SOLO_MODELS)
    for file in hashed:
        assert len(file.sha256) == 8 and file.file_name.endswith(f"-{file.sha256}.pth")
    assert {depth: file.sha256 for depth, file in IMAGENET_RESNETS.items()} == {
        18: "f37072fd",
        34: "b627a593",
        50: "0676ba61",
        101: "63fe2227",
    }


def test_a_mirror_has_the_files_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLO_MIRROR", "http://mirror/weights/")
    for file in (*SOLO_MODELS, *IMAGENET_RESNETS.values()):
        assert file.location() == f"http://mirror/weights/{file.file_name}"


def test_unknown_names() -> None:
    assert find_model("solo_r18") is None
    with pytest.raises(ValueError, match=r"'solo_r18' is neither a file .* SOLO_R50_1x, "):
        get_model("solo_r18")
    with pytest.raises(ValueError, match=r"ResNet-152; there are those of 18, 34, 50, 101"):
        get_imagenet(152)


def test_a_file_is_known_by_its_publishers_name_alone() -> None:
    model = get_model("SOLO_R50_3x")
    assert find_model_of_file(Path("/some/where/SOLO_R50_3x.pth")) is model
    assert find_model_of_file(Path("/some/where/SOLO_R50_3x")) is None
    assert find_model_of_file(Path("my_solo.pth")) is None


@pytest.mark.parametrize("name", sorted(STORED))
def test_names_and_shapes_of_a_full_size_model_fit_without_a_key_left_over(name: str) -> None:
    stored = json.loads(shared_file("state_keys.json").read_text())
    entry = stored[STORED[name]]
    keys = stored[entry["same_as"]]["keys"] if "same_as" in entry else entry["keys"]
    model = get_model(name)
    published = {
        (spec["authors"] if model.publisher == "authors" else key): torch.empty(
            spec["shape"], dtype=getattr(torch, spec["dtype"]), device="meta"
        )
        for key, spec in keys.items()
    }
    with torch.device("meta"):
        expected = Solo(model.config().model, 80).state_dict()
    converted = convert_state_dict(published, expected, name)
    assert len(converted) == len(published) == len(expected)
    shapes = {key: tuple(value.shape) for key, value in converted.items()}
    inferred, changes = infer_config(shapes)
    assert (inferred.name, changes) == (model.config_name, [])
