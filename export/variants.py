"""Builds a version's graph in other precisions and compares each with float32.

    model.fp16.onnx, parity.fp16.json     typed, for GPUs
    model.bf16.onnx, parity.bf16.json     typed, for GPUs
    model.int8.onnx, parity.int8.json     QDQ, for the CPU

Typed graphs are for GPU engines; here their emulation (`export.emulate`) is compared, which the
report states. The int8 graph itself is compared.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnxruntime as ort

from export.agreement import INT8, TYPED, check_thresholds, compare_graphs
from export.config_json import describe_file
from export.emulate import emulate
from export.errors import ExportError, ParityError
from export.measure import data_cases, measure_ap
from export.parity import Case, build_cases, canvas_sizes
from export.precision import LowPrecision, lower_precision
from export.publish import Artefact
from export.quantize import quantize, require_disjoint, sample_calibration
from pipeline.model_config import ModelConfig
from training.data.coco import CocoDataset

VariantPrecision = Literal["fp16", "bf16", "int8"]
PRECISIONS: tuple[VariantPrecision, ...] = ("fp16", "bf16", "int8")
DATA_IMAGES = 16
"""Images of the data set used in the comparison with float32."""
EMULATED = (
    "emulated: run in float32 by ONNX Runtime on the CPU, every low-precision result rounded to "
    "its type; the file itself was not run on a GPU"
)


@dataclass(frozen=True, kw_only=True)
class VariantInputs:
    """The graph and data sets from which variants are built.

    Attributes:
        model: The version's configuration.
        graph: Its model.onnx.
        evaluation: Annotated split for the AP, or None.
        calibration: Split for int8 calibration, or None.
        calibration_images: Number of its images to use.
        measured: `measure_ap` of `graph` on `evaluation`; None if not measured yet.
    """

    model: ModelConfig
    graph: bytes
    evaluation: CocoDataset | None = None
    calibration: CocoDataset | None = None
    calibration_images: int
    measured: dict[str, float] | None = None


def build_variants(
    precisions: Sequence[VariantPrecision],
    inputs: VariantInputs,
    *,
    provenance: dict[str, Any] | None = None,
    accept_unrun: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Artefact]:
    """Builds variants and verifies them against float32.

    Args:
        precisions: Precisions to build.
        inputs: Graph and data sets.
        provenance: Added to every report.
        accept_unrun: Accept files that no engine on this machine can run.
        progress: Called with a line of text at every step.

    Raises:
        ExportError: int8 has no calibration images, or they are also evaluation images.
        ParityError: A variant deviates too much from float32, or cannot be run here and
            `accept_unrun` is False.
    """
    cases = list(build_cases(canvas_sizes(inputs.model.input)))
    if inputs.evaluation is not None:
        cases = data_cases(inputs.evaluation, inputs.model.input, DATA_IMAGES)
    ap = inputs.measured
    built = []
    for precision in dict.fromkeys(precisions):
        data, runnable, facts = _build(precision, inputs)
        if facts["file_run"] is not True and not accept_unrun:
            raise ParityError(
                f"{precision} cannot be run on this machine ({facts['file_run']}), only its "
                "emulation can be compared; --accept-unrun publishes it nevertheless"
            )
        if inputs.evaluation is not None and ap is None:
            progress("measuring the AP of fp32")
            ap = measure_ap(inputs.model, inputs.graph, inputs.evaluation)
        progress(f"comparing {precision} with fp32 ({len(data) / 1e6:.1f} MB)")
        report = _compare(precision, inputs, runnable, cases, ap)
        head = {"precision": precision, "graph": describe_file(data), **facts}
        report = {**head, **report, **(provenance or {})}
        _require_passed(report)
        progress(f"{precision}: {_describe(report)}")
        built.append(Artefact(f"model.{precision}.onnx", data, report))
    return built


def _build(
    precision: VariantPrecision, inputs: VariantInputs
) -> tuple[bytes, bytes, dict[str, Any]]:
    """A variant's file, the graph to run for the comparison, and entries of the report."""
    if precision == "int8":
        calibration, evaluation = inputs.calibration, inputs.evaluation
        if calibration is None:
            raise ExportError(
                "int8 requires --data: it is calibrated on images of a training split"
            )
        if evaluation is not None:
            require_disjoint(calibration, evaluation)
        cases = sample_calibration(calibration, inputs.model.input, inputs.calibration_images)
        data = quantize(inputs.graph, cases)
        facts = {
            "file_run": True,
            "checked": "the file, by ONNX Runtime on the CPU",
            "calibration": {
                "split": calibration.annotation_file.stem,
                "canvases": len(cases),
                "method": "minmax",
            },
        }
        return data, data, facts
    data = lower_precision(inputs.graph, precision)
    facts = {"file_run": _try_to_run(data, precision), "checked": EMULATED}
    return data, emulate(data, precision), facts


def _try_to_run(data: bytes, precision: LowPrecision) -> bool | str:
    """True if ONNX Runtime's CPU provider runs a typed file; else the start of its error."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        case = next(iter(build_cases([(64, 64)], (1,))))
        # NumPy has no bfloat16, so the masks cannot be returned.
        session.run(["scores"], {"images": case.images, "valid_hw": case.valid_hw})
    except Exception as error:  # the runtime's exceptions have no common base
        return f"not run: {str(error).splitlines()[0][:160]}"
    return True


def _compare(
    precision: VariantPrecision,
    inputs: VariantInputs,
    runnable: bytes,
    cases: Sequence[Case],
    ap: dict[str, float] | None,
) -> dict[str, Any]:
    least_score = inputs.model.postprocess.update_threshold
    numbers = compare_graphs(inputs.graph, runnable, cases, least_score)
    measured = None
    if inputs.evaluation is not None and ap is not None:
        own = measure_ap(inputs.model, runnable, inputs.evaluation)
        measured = {"fp32": ap["AP"], "variant": own["AP"]}
    thresholds = INT8 if precision == "int8" else TYPED
    report: dict[str, Any] = check_thresholds(numbers, measured, thresholds)
    report["reference"] = describe_file(inputs.graph)
    report["comparison"] = {
        "content": sorted({case.content for case in cases}),
        "canvases": sum(len(case.images) for case in cases),
        "least_score": least_score,
        **numbers,
    }
    report["AP"] = None
    if measured is not None and inputs.evaluation is not None:
        split = inputs.evaluation
        head = {"split": split.annotation_file.stem, "images": len(split)}
        report["AP"] = {**head, "max_dets": inputs.model.postprocess.max_instances, **measured}
    report["runtimes"] = {"onnxruntime": ort.__version__, "machine": platform.machine()}
    return report


def _require_passed(report: dict[str, Any]) -> None:
    if not report["passed"]:
        raise ParityError(
            f"{report['precision']} deviates too much from fp32: {'; '.join(report['failures'])}"
        )


def _describe(report: dict[str, Any]) -> str:
    numbers = report["comparison"]
    text = (
        f"mask IoU {numbers['mean_mask_iou']:.4f}, {numbers['matched_share']:.1%} of "
        f"{numbers['candidates']} candidates matched, scores within "
        f"{numbers['mean_score_difference']:.1e} on average"
    )
    if report["AP"] is not None:
        text += f", AP {report['AP']['variant']:.4f} (fp32 {report['AP']['fp32']:.4f})"
    return text
