"""Variants of a version: its graph in other precisions, each with a report against float32.

    model.fp16.onnx, parity.fp16.json     typed, for GPUs
    model.bf16.onnx, parity.bf16.json     typed, for GPUs
    model.int8.onnx, parity.int8.json     QDQ, for the CPU

The typed files are for engines that are not here, so what is compared is their emulation
(`export.emulate`); the report says so. int8 runs as it is.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnxruntime as ort

from export.agreement import INT8, TYPED, compare_graphs, judge
from export.emulate import emulate
from export.errors import ExportError, ParityError
from export.measure import data_cases, measure_ap
from export.parity import Case, build_cases, canvas_sizes
from export.precision import LowPrecision, lower_precision
from export.publish import Artefact, describe_file
from export.quantize import draw_calibration, quantize, require_apart
from pipeline.model_config import ModelConfig
from training.data.coco import CocoDataset

VariantPrecision = Literal["fp16", "bf16", "int8"]
PRECISIONS: tuple[VariantPrecision, ...] = ("fp16", "bf16", "int8")
DATA_IMAGES = 16
"""Images of the data set that join the comparison with float32."""
EMULATED = (
    "emulated: run in float32 by ONNX Runtime on the CPU, every low-precision result rounded to "
    "its type; the file itself was not run on a GPU"
)


@dataclass(frozen=True, kw_only=True)
class Material:
    """What variants are made of and measured on.

    Attributes:
        model: The version's configuration.
        graph: Its model.onnx.
        evaluation: Labelled split for the AP, or None.
        calibration: Split for int8's ranges, or None.
        calibration_images: How many of its images are used.
        measured: What `measure_ap` gave for `graph` on `evaluation`, if that is known.
    """

    model: ModelConfig
    graph: bytes
    evaluation: CocoDataset | None = None
    calibration: CocoDataset | None = None
    calibration_images: int
    measured: dict[str, float] | None = None


def build_variants(
    precisions: Sequence[VariantPrecision],
    material: Material,
    *,
    provenance: dict[str, Any] | None = None,
    accept_unrun: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[Artefact]:
    """Builds, compares and judges variants; the files may be published.

    Args:
        precisions: Which.
        material: Of the version.
        provenance: Joins every report.
        accept_unrun: Accept a file that no engine here could run.
        say: Is told of every step.

    Raises:
        ExportError: int8 has no calibration images, or shares them with the evaluation.
        ParityError: A variant is too far from float32, or was not run and that is not accepted.
    """
    cases = list(build_cases(canvas_sizes(material.model.input)))
    if material.evaluation is not None:
        cases = data_cases(material.evaluation, material.model.input, DATA_IMAGES)
    ap = material.measured
    built = []
    for precision in dict.fromkeys(precisions):
        data, runnable, facts = _build(precision, material)
        if facts["file_run"] is not True and not accept_unrun:
            raise ParityError(
                f"{precision} was not run here ({facts['file_run']}); only its emulation can be "
                "compared. --accept-unrun publishes it all the same"
            )
        if material.evaluation is not None and ap is None:
            say("measuring the AP of fp32")
            ap = measure_ap(material.model, material.graph, material.evaluation)
        say(f"comparing {precision} with fp32 ({len(data) / 1e6:.1f} MB)")
        report = _compare(precision, material, runnable, cases, ap)
        head = {"precision": precision, "graph": describe_file(data), **facts}
        report = {**head, **report, **(provenance or {})}
        _require_passed(report)
        say(f"{precision}: {_describe(report)}")
        built.append(Artefact(f"model.{precision}.onnx", data, report))
    return built


def _build(precision: VariantPrecision, material: Material) -> tuple[bytes, bytes, dict[str, Any]]:
    """A variant's file, the graph that is run in its place, and what the report says of it."""
    if precision == "int8":
        calibration, evaluation = material.calibration, material.evaluation
        if calibration is None:
            raise ExportError("int8 needs --data: its ranges come from images of a training split")
        if evaluation is not None:
            require_apart(calibration, evaluation)
        cases = draw_calibration(calibration, material.model.input, material.calibration_images)
        data = quantize(material.graph, cases)
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
    data = lower_precision(material.graph, precision)
    facts = {"file_run": _try_to_run(data, precision), "checked": EMULATED}
    return data, emulate(data, precision), facts


def _try_to_run(data: bytes, precision: LowPrecision) -> bool | str:
    """Whether ONNX Runtime's CPU provider takes a typed file; else its first words why not."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        case = next(iter(build_cases([(64, 64)], (1,))))
        # bfloat16 has no NumPy type of its own, so the masks are left out.
        session.run(["scores"], {"images": case.images, "valid_hw": case.valid_hw})
    except Exception as error:  # the runtime's exceptions have no common base
        return f"not run: {str(error).splitlines()[0][:160]}"
    return True


def _compare(
    precision: VariantPrecision,
    material: Material,
    runnable: bytes,
    cases: Sequence[Case],
    ap: dict[str, float] | None,
) -> dict[str, Any]:
    least_score = material.model.postprocess.update_threshold
    numbers = compare_graphs(material.graph, runnable, cases, least_score)
    measured = None
    if material.evaluation is not None and ap is not None:
        own = measure_ap(material.model, runnable, material.evaluation)
        measured = {"fp32": ap["AP"], "variant": own["AP"]}
    thresholds = INT8 if precision == "int8" else TYPED
    report: dict[str, Any] = judge(numbers, measured, thresholds)
    report["reference"] = describe_file(material.graph)
    report["comparison"] = {
        "content": sorted({case.content for case in cases}),
        "canvases": sum(len(case.images) for case in cases),
        "least_score": least_score,
        **numbers,
    }
    report["AP"] = None
    if measured is not None and material.evaluation is not None:
        split = material.evaluation
        head = {"split": split.annotation_file.stem, "images": len(split)}
        report["AP"] = {**head, "max_dets": material.model.postprocess.max_instances, **measured}
    report["runtimes"] = {"onnxruntime": ort.__version__, "machine": platform.machine()}
    return report


def _require_passed(report: dict[str, Any]) -> None:
    if not report["passed"]:
        raise ParityError(
            f"{report['precision']} is too far from fp32: {'; '.join(report['failures'])}"
        )


def _describe(report: dict[str, Any]) -> str:
    numbers = report["comparison"]
    words = (
        f"mask IoU {numbers['mean_mask_iou']:.4f}, {numbers['matched_share']:.1%} of "
        f"{numbers['candidates']} candidates matched, scores within "
        f"{numbers['mean_score_difference']:.1e} on average"
    )
    if report["AP"] is not None:
        words += f", AP {report['AP']['variant']:.4f} (fp32 {report['AP']['fp32']:.4f})"
    return words
