from __future__ import annotations

import json
import re
from typing import Any

import pytest

from training.configs import get_config, list_configs
from training.configs.io import apply_overrides, config_from_dict, config_to_dict
from training.configs.schema import Config

NUCLEI = get_config("nuclei")


@pytest.mark.parametrize("name", list_configs())
def test_every_configuration_survives_json(name: str) -> None:
    content = json.loads(json.dumps(config_to_dict(get_config(name))))
    assert config_from_dict(content) == get_config(name)


def test_a_field_that_is_missing_has_its_default() -> None:
    content = config_to_dict(NUCLEI)
    del content["model"]["head"]["mask_kernel"]
    assert config_from_dict(content) == NUCLEI


SECTIONS = ["", "model", "model.backbone", "model.head", "targets", "loss", "augment", "schedule"]


@pytest.mark.parametrize("section", [*SECTIONS, "input", "postprocess"])
def test_an_unknown_field_is_named(section: str) -> None:
    content = config_to_dict(NUCLEI)
    node = content
    for name in section.split(".") if section else ():
        node = node[name]
    node["num_gridz"] = 3
    path = f"{section}.num_gridz" if section else "num_gridz"
    with pytest.raises(ValueError, match=rf"not valid: {re.escape(path)}: \w+ .*"):
        config_from_dict(content)


def test_a_wrong_value_is_named() -> None:
    content = config_to_dict(NUCLEI)
    content["schedule"]["lr"] = "fast"
    with pytest.raises(ValueError, match=r"schedule\.lr: Input should be a valid number"):
        config_from_dict(content)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("schedule.lr=0.001", 0.001),
        ("schedule.optimizer=sgd", "sgd"),
        ('schedule.optimizer="sgd"', "sgd"),
        ("schedule.clip_norm=null", None),
        ("schedule.milestones=[1, 2]", [1, 2]),
        ("augment.dihedral=false", False),
        ("model.head.num_grids=[32,16,8]", [32, 16, 8]),
        ("model.backbone.base_width=16", 16),
        ("input.resize.scale=3", 3.0),
        ("postprocess.nms.sigma=1.5", 1.5),
        ("description=a = b", "a = b"),
    ],
)
def test_a_field(override: str, value: Any) -> None:
    changed = config_to_dict(apply_overrides(NUCLEI, [override]))
    node: Any = changed
    for name in override.split("=")[0].split("."):
        node = node[name]
    assert node == value
    before = config_to_dict(NUCLEI)
    differing = {k for k in before if before[k] != changed[k]}
    assert differing <= {override.split("=")[0].split(".")[0]}


def test_none_and_several() -> None:
    assert apply_overrides(NUCLEI, []) == NUCLEI
    changed: Config = apply_overrides(NUCLEI, ["schedule.lr=1", "schedule.lr=2", "name=x"])
    assert changed.schedule.lr == 2 and changed.name == "x"


@pytest.mark.parametrize(
    "override",
    [
        "schedule.learning_rate=1",
        "nope=1",
        "schedule",
        "schedule.lr",
        "=1",
        "schedule.lr.x=1",
        "schedule.lr=fast",
        "model.head.kind=fancy",
        "model.head.num_grids=[8]",
    ],
)
def test_a_bad_override_is_named(override: str) -> None:
    with pytest.raises(ValueError, match="override") as error:
        apply_overrides(NUCLEI, [override])
    assert override in str(error.value)


def test_the_original_is_not_changed() -> None:
    before = config_to_dict(NUCLEI)
    apply_overrides(NUCLEI, ["schedule.lr=7"])
    assert config_to_dict(NUCLEI) == before
