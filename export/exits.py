"""Graphs with early exits as files of a version: built, run beside the plain ones, compared.

    model.exits.onnx, parity.exits.json              of model.onnx
    model.int8.exits.onnx, parity.int8.exits.json    of model.int8.onnx

ONNX Runtime takes them on the CPU (`service.engines.choose`). A file whose candidates are not the
plain graph's bit for bit is refused.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from export.errors import ParityError
from export.exit_graph import add_exits
from export.parity import Case, run_onnx
from export.publish import Artefact, describe_file
from pipeline.model_config import ModelConfig
from pipeline.types import Candidates
from service.engines.choose import exits_file
from service.models.artefacts import ONNX_FILE

PLAIN_FILES: dict[str, str] = {
    ONNX_FILE: exits_file("fp32"),
    "model.int8.onnx": exits_file("int8"),
}
"""Graphs of a version that the CPU runs, and the names of those with exits."""


def build_exits(
    model: ModelConfig,
    graphs: Mapping[str, bytes],
    cases: Sequence[Case],
    provenance: dict[str, Any] | None = None,
) -> list[Artefact]:
    """Builds and compares graphs with early exits; the files may be published.

    Args:
        model: The version's configuration.
        graphs: Plain graphs by file name, of `PLAIN_FILES`.
        cases: What both graphs run.
        provenance: Joins every report.

    Raises:
        GraphError: A graph has not the structure that is expected.
        ParityError: A graph's candidates are not those of the plain one, or there are none.
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
    """Runs both graphs on the same canvases; returns what was compared.

    Raises:
        ParityError: A candidate differs in any bit, or there is no candidate at all.
    """
    sessions = [_build_session(graph) for graph in (plain, exits)]
    candidates = 0
    for number, case in enumerate(cases):
        for one, other in zip(*(run_onnx(session, case) for session in sessions), strict=True):
            candidates += len(one.scores)
            same = compare_bits(one, other)
            if not all(same):
                raise ParityError(
                    f"with early exits, batch {number} ({case.content}) has other candidates: "
                    f"{len(one.scores)} and {len(other.scores)}, scores, labels and masks equal: "
                    f"{same}"
                )
    if not candidates:
        raise ParityError(
            "no candidate was found on the test images, so early exits could not be compared; "
            "--data gives images that show what the network was trained for"
        )
    return {
        "identical": True,
        "content": sorted({case.content for case in cases}),
        "canvases": sum(len(case.images) for case in cases),
        "candidates": candidates,
    }


def compare_bits(one: Candidates, other: Candidates) -> list[bool]:
    """Whether the scores, the labels and the masks of two sides are equal, in this order."""
    return [
        np.array_equal(one.scores, other.scores),
        np.array_equal(one.labels, other.labels),
        np.array_equal(one.mask_probs, other.mask_probs),
    ]


def _build_session(graph: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
