from __future__ import annotations

import pytest

from pipeline.repository_config import RepositoryConfig
from service.engines.state import EngineState
from service.errors import AmbiguousModel, ModelUnavailable, UnknownModel, UnknownVersion
from service.protocol import ModelState, Segmenter, choose_default, find_model
from service.scale.cluster.front import ClusterSegmenter
from service.segmenter import LocalSegmenter
from tests.support.blob_model import build_graph, model_config

SERVED = {"b": {1: "b1", 3: "b3", 2: "b2"}, "a": {7: "a7"}, "c": {1: "c1"}}


@pytest.mark.parametrize(
    ("default", "name", "version", "found"),
    [
        ("b", None, None, "b3"),  # the highest version, wherever it stands
        ("b", None, 2, "b2"),
        (None, "b", None, "b3"),
        ("c", "b", 1, "b1"),
        ("gone", "c", None, "c1"),
    ],
)
def test_a_model_is_found(
    default: str | None, name: str | None, version: int | None, found: str
) -> None:
    assert find_model(SERVED, {}, default, name, version) == found


@pytest.mark.parametrize("version", [4, 0, -1])
def test_another_version_is_named_with_those_that_are_served(version: int) -> None:
    with pytest.raises(UnknownVersion, match=rf"'b' is served in version 1, 2, 3, not {version}"):
        find_model(SERVED, {}, None, "b", version)


@pytest.mark.parametrize(("default", "name"), [(None, "cats"), ("cats", None), (None, "")])
def test_an_unknown_model_is_named_with_those_that_are_served(
    default: str | None, name: str | None
) -> None:
    with pytest.raises(UnknownModel, match=r"there is no model .*, only \['a', 'b', 'c'\]"):
        find_model(SERVED, {"broken": "why"}, default, name, None)


@pytest.mark.parametrize(("default", "name"), [(None, "broken"), ("broken", None)])
def test_a_model_that_is_not_served_is_another_error(default: str | None, name: str | None) -> None:
    with pytest.raises(ModelUnavailable, match="'broken' is not served; see GET /v2/models"):
        find_model(SERVED, {"broken": "why"}, default, name, 3)


def test_a_newer_version_that_was_refused_does_not_hide_what_is_served() -> None:
    assert find_model(SERVED, {"b": "version 4 is broken"}, None, "b", None) == "b3"


def test_a_request_without_a_model_is_refused_where_several_are_served_and_none_is_chosen() -> None:
    with pytest.raises(AmbiguousModel, match=r"none of \['a', 'b', 'c'\] is the default"):
        find_model(SERVED, {}, None, None, None)
    with pytest.raises(AmbiguousModel):
        find_model(SERVED, {}, None, None, 7)


@pytest.mark.parametrize("unavailable", [{}, {"broken": "why"}])
def test_a_single_model_is_the_default(unavailable: dict[str, str]) -> None:
    assert find_model({"b": {1: "b1", 3: "b3"}}, unavailable, None, None, None) == "b3"


def test_a_default_model_that_is_not_served_is_not_replaced_by_the_only_one() -> None:
    with pytest.raises(ModelUnavailable, match="'b' is not served"):
        find_model({"a": {7: "a7"}}, {"b": "unloaded"}, "b", None, None)
    with pytest.raises(UnknownModel, match="no model 'b'"):
        find_model({"a": {7: "a7"}}, {}, "b", None, None)


def test_a_server_without_models_has_no_default() -> None:
    with pytest.raises(ModelUnavailable, match="no model is served"):
        find_model({}, {}, None, None, None)


@pytest.mark.parametrize(
    ("served", "named", "default"),
    [([], None, None), (["a"], None, "a"), (["a", "b"], None, None), (["a", "b"], "b", "b")],
)
def test_the_default_is_the_one_that_was_chosen_or_the_only_one(
    served: list[str], named: str | None, default: str | None
) -> None:
    assert choose_default(served, named) == default


def test_a_models_state_has_the_name_and_version_of_its_configuration() -> None:
    config = RepositoryConfig.model_validate(model_config(build_graph(), "cells", 5)).for_version(5)
    state = ModelState(config, EngineState("onnxruntime", "cpu", "fp32", "asked for"), 8)
    assert (state.name, state.version, state.max_batch) == ("cells", 5, 8)


@pytest.mark.parametrize("implementation", [LocalSegmenter, ClusterSegmenter])
def test_both_segmenters_have_all_that_the_http_layer_asks_for(implementation: type) -> None:
    """What mypy says of their types; `metrics` and `admission` are set when one is made."""
    wanted = {name for name in vars(Segmenter) if not name.startswith("_")}
    assert wanted - set(dir(implementation)) == {"metrics", "admission"}
