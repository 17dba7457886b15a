from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from service.engines.state import EngineBuild, describe_engine


def build_engine(**changes: Any) -> Any:
    plain = {"name": "onnxruntime", "device": "cpu", "precision": "fp32", "reason": "CPU provider"}
    return SimpleNamespace(**{**plain, **changes})


def test_an_engine_without_a_build_has_none() -> None:
    state = describe_engine(build_engine())
    assert (state.name, state.device, state.precision) == ("onnxruntime", "cpu", "fp32")
    assert state.build is None


def test_an_engine_that_is_built_shows_how_far_it_is() -> None:
    engine = build_engine(status="building the engine", progress=0.4)
    assert describe_engine(engine).build == EngineBuild("building the engine", 0.4)
    engine.name, engine.status, engine.progress = "tensorrt", "switched", 1.0
    state = describe_engine(engine)
    assert (state.name, state.build) == ("tensorrt", EngineBuild("switched", 1.0))
