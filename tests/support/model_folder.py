"""Changes to a model's folder in a repository."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.blob_model import build_graph


def add_version(folder: Path, version: int, *, graph: bytes | None = None) -> None:
    """Adds a version to a model as publishing does: config.json comes last, in one step."""
    target = folder / str(version)
    target.mkdir()
    (target / "model.onnx").write_bytes(build_graph() if graph is None else graph)
    edit_config(
        folder, lambda content: content["versions"].update({str(version): _first_entry(content)})
    )


def _first_entry(content: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(iter(content["versions"].values()))
    return entry


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Applies `change` to the content of config.json, which is replaced in one step."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    change(content)
    partial = folder / ".config.json.partial"
    partial.write_text(json.dumps(content))
    os.replace(partial, file)
