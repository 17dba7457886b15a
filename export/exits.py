"""Builds graphs with early exits as files of a version, and verifies them.

    model.exits.onnx, parity.exits.json              from model.onnx
    model.int8.exits.onnx, parity.int8.exits.json    from model.int8.onnx

They are used by ONNX Runtime on the CPU (`service.engines.choose`). Their candidates must be
bit-identical to those of the plain graphs.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from export.config_json import describe_file
from export.errors import ParityError
from export.exit_graph import add_exits
from export.parity import Case, run_onnx
from export.publish import Artefact
from pipeline.model_config import ModelConfig
from pipeline.types import Candidates
from service.engines.artefacts import ONNX_FILE
from service.engines.choose import exits_file

PLAIN_FILES: dict[str, str] = {
    ONNX_FILE: exits_file("fp32"),
    "model.int8.onnx": exits_file("int8"),
}
"""File names of a version's CPU graphs, and of their graphs with early exits."""


def build_exits(
    model: ModelConfig,
    graphs: Mapping[str, bytes],
    cases: Sequence[Case],
    provenance: dict[str, Any] | None = None,
) -> list[Artefact]:
    """Builds graphs with early exits and verifies them.

    Args:
        model: The version's configuration.
        graphs: Plain graphs by file name; keys of `PLAIN_FILES`.
        cases: Batches to run on both graphs.
        provenance: Added to every report.

    Raises:
        GraphError: A graph does not have the expected structure.
        ParityError: Candidates differ from those of the plain graph, or there are none.
    """
    built = []
    for name, plain in graphs.items():
        data = add_exits(plain, model.mask_stride)
        report = {
            "passed": True,
            "graph": describe_file(data),
            "reference": describe_file(plain),
            "comparison": require_identical(plain, data, cases),
            "runtimes": {"onnxruntime": ort.__version__, "machine": platform.machine()},
            **(provenance or {}),
        }
        built.append(Artefact(PLAIN_FILES[name], data, report))
    return built


def require_identical(plain: bytes, exits: bytes, cases: Sequence[Case]) -> dict[str, Any]:
    """Runs both graphs on the same canvases, one at a time, as the server does.

    Returns:
        Entry `comparison` of the report.

    Raises:
        ParityError: Any candidate differs, or there are no candidates.
    """
    sessions = [_build_session(graph) for graph in (plain, exits)]
    candidates = 0
    for number, case in enumerate(cases):
        for canvas in case.split():
            (one,), (other,) = (run_onnx(session, canvas) for session in sessions)
            candidates += len(one.scores)
            same = compare_bits(one, other)
            if not all(same):
                raise ParityError(
                    f"with early exits, batch {number} ({case.content}) has different candidates: "
                    f"{len(one.scores)} and {len(other.scores)}, scores, labels and masks equal: "
                    f"{same}"
                )
    if not candidates:
        raise ParityError(
            "no candidate was found on the test images, so early exits could not be compared; use "
            "--data to add images with objects of the trained classes"
        )
    return {
        "identical": True,
        "content": sorted({case.content for case in cases}),
        "canvases": sum(len(case.images) for case in cases),
        "candidates": candidates,
    }


def compare_bits(one: Candidates, other: Candidates) -> list[bool]:
    """Whether scores, labels and masks are equal, in this order."""
    return [
        np.array_equal(one.scores, other.scores),
        np.array_equal(one.labels, other.labels),
        np.array_equal(one.mask_probs, other.mask_probs),
    ]


def _build_session(graph: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
