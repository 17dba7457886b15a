"""Exported tiny networks; an export takes seconds, so each is made once for all tests.

Where several processes share the tests, tests/conftest.py gives these modules to one of them.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

from export.onnx_graph import build_onnx
from tests.support.tiny_solo import tiny_config, tiny_network
from training.configs.schema import HeadKind
from training.model.solo import Solo

Recipe = Literal["paper", "published"]


@cache
def exported(kind: HeadKind, recipe: Recipe, opset: int) -> tuple[Solo, bytes]:
    """A network and its ONNX graph."""
    network = tiny_network(tiny_config(kind, recipe))
    return network, build_onnx(network, opset=opset)
