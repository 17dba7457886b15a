"""Versions to publish, and what has been published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx

from export.config_json import describe_file
from export.publish import Release
from pipeline.model_config import ModelConfig
from tests.support import blob_model

PASSED = {"passed": True, "cases": []}


def build_graph(name: str) -> bytes:
    """A graph of one node that any engine takes."""
    make = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Identity", ["x"], ["y"], name)
    values = [make(value, onnx.TensorProto.FLOAT, ["n"]) for value in ("x", "y")]
    graph = onnx.helper.make_graph([node], name, values[:1], values[1:])
    opsets = [onnx.helper.make_opsetid("", 18)]
    return bytes(onnx.helper.make_model(graph, opset_imports=opsets).SerializeToString())


GRAPH = build_graph("graph")
OTHER = build_graph("other")


def build_release(version: int = 1, graph: bytes = GRAPH, **changes: Any) -> Release:
    content = blob_model.model_config(graph)
    content.pop("versions")
    content.pop("schema_version")
    files = {"model.onnx": describe_file(graph)}
    config = {**content, "version": version, "files": files, "provenance": {"run": version}}
    return Release(ModelConfig.model_validate({**config, **changes}), graph, PASSED)


def read_config(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "blobs" / "config.json").read_text())
    return content


def files_under(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
