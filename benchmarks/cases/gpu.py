"""The paper's networks on one GPU, stage by stage and end to end. NOT RUN ON HARDWARE.

Ends within about --minutes: what does not fit is named, not measured. Beside the numbers stand the
limits of this GPU (copies, bf16 matrix products) and the paper's V100. Each engine is built as the
service builds it. Latency of a batch is `infer_ms`: copy, engine, and what the backend does with
its outputs. ONNX Runtime and TensorRT get the float32 graph. Candidates are forced
(benchmarks/gpu/subjects.py).

`--device cpu --quick` runs the same code on tiny networks, to check that all of it works.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from benchmarks.gpu.engines import EngineName, EngineRecipe, EngineUnderTest, build_engine
from benchmarks.gpu.stages import (
    measure_batch,
    measure_end_to_end,
    measure_host_stages,
    measure_limits,
    measure_postprocess,
)
from benchmarks.gpu.subjects import (
    IMAGE_HW,
    MODELS,
    OBJECTS,
    PAPER_FPS,
    QUICK_MODELS,
    GpuSubject,
    build_subject,
)
from benchmarks.harness import BenchmarkError
from benchmarks.harness.plots import Panel
from benchmarks.harness.report import Report, Row
from export.errors import ExportError
from service.engines.aoti_package import PackagePrecision
from service.engines.base import BackendError
from service.errors import ServiceError

BATCHES = (1, 2, 4, 8, 16, 32)
PACKAGES = ("torch", "triton", "onnxruntime-gpu", "tensorrt", "cuda-core")


def gpu(
    *,
    device: Annotated[Literal["cuda", "cpu"], "where"] = "cuda",
    quick: Annotated[bool, "tiny networks, batches of 1 and 2, ort"] = False,
    models: Annotated[tuple[str, ...] | None, f"default: {' '.join(MODELS)}"] = None,
    engines: Annotated[tuple[EngineName, ...] | None, "default: aoti"] = None,
    precision: Annotated[PackagePrecision, "of aoti and eager"] = "bf16",
    packages: Annotated[Path | None, "folder where compiled packages are kept"] = None,
    batches: Annotated[tuple[int, ...] | None, f"default: {BATCHES}"] = None,
    threads: Annotated[int, "that decode, in all"] = os.cpu_count() or 1,
    engine_threads: Annotated[int | None, "of an engine on the CPU"] = None,
    minutes: Annotated[float, "after which no engine is built"] = 10,
    seconds: Annotated[float, "for each number"] = 2,
) -> Report:
    sizes = sorted(batches or ((1, 2) if quick else BATCHES))
    if threads < 1 or min(sizes) < 1:
        raise BenchmarkError("--threads and --batches must be at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(
            f"torch {torch.__version__} finds no CUDA device; to check that the benchmark runs at "
            "all: --device cpu --quick"
        )
    seconds = min(seconds, 0.02) if quick else seconds
    end_s = time.monotonic() + 60 * minutes
    recipe = EngineRecipe(
        device=device, precision=precision, threads=engine_threads, packages=packages
    )
    limits = measure_limits(device, quick=quick)
    rows: list[Row] = []
    skipped: list[Row] = []
    for name in models or (QUICK_MODELS if quick else MODELS):
        subject = build_subject(name, max(sizes))
        host = measure_host_stages(subject, seconds=seconds)
        for kind in engines or (("ort",) if quick else ("aoti",)):
            head = {"model": name, "canvas_hw": subject.canvas_hw}
            if time.monotonic() > end_s:
                reason = f"the {minutes:g} minutes were over"
                skipped.append({**head, "engine": kind, "reason": reason})
                continue
            try:
                engine = build_engine(kind, subject, recipe)
            except (BackendError, ExportError, ServiceError) as error:
                skipped.append({**head, "engine": kind, "reason": str(error)})
                continue
            try:  # its memory must be free before the next one is built
                measured = measure_engine(subject, engine, sizes, threads, seconds)
            finally:
                engine.backend.close()
            rows.append({**head, **host, **measured})
    return build_report(device, limits, rows, skipped)


def measure_engine(
    subject: GpuSubject,
    engine: EngineUnderTest,
    sizes: Sequence[int],
    threads: int,
    seconds: float,
) -> Row:
    """All numbers of one engine; a batch that does not fit into memory is named."""
    batches: list[Row] = []
    for batch in sizes:
        try:
            batches.append(measure_batch(subject, engine, batch, seconds=seconds))
        except (BackendError, RuntimeError) as error:  # torch's out of memory is a RuntimeError
            batches.append({"batch": batch, "error": str(error).splitlines()[0]})
            break
    fitting = [row["batch"] for row in batches if "error" not in row]
    row: Row = {
        "engine": engine.backend.name,
        "precision": engine.backend.precision,
        "reason": engine.backend.reason,
        "build_s": round(engine.build_s, 1),
        "batches": batches,
    }
    if fitting:
        row["postprocess"] = measure_postprocess(subject, engine, seconds=seconds)
        row["end_to_end"] = [
            measure_end_to_end(subject, engine, batch, threads, seconds=10 * seconds)
            for batch in sorted({min(fitting[-1], 16), 1})
            if batch in fitting
        ]
    return row


def build_report(
    device: str, limits: dict[str, float], rows: Sequence[Row], skipped: Sequence[Row]
) -> Report:
    """The JSON, a table of the batches and one of the images."""
    about: Row = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "cpu_cores": os.cpu_count(),
        "cuda": torch.version.cuda,
    }
    if device == "cuda":
        about["compute_capability"] = torch.cuda.get_device_capability()
        about["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
    tables = {
        "batches": [line for row in rows for line in show_batches(row)],
        "images": [line for row in rows for line in show_images(row)],
    }
    notes = [f"not measured: {s['model']} with {s['engine']}: {s['reason']}" for s in skipped]
    notes.append("limits: " + ", ".join(f"{name} {value}" for name, value in limits.items()))
    data: dict[str, Any] = {
        "gpu": about,
        "ceilings": limits,
        "picture": {"image_hw": IMAGE_HW, "objects": OBJECTS, "content": "random weights, forced"},
        "paper_v100_fps": PAPER_FPS,
        "rows": rows,
        "skipped": skipped,
    }
    return Report(
        data=data,
        tables={title: lines for title, lines in tables.items() if lines},
        notes=notes,
        packages=PACKAGES,
        panels=[build_panel(name, rows) for name in dict.fromkeys(row["model"] for row in rows)],
        failures=[] if rows else ["nothing was measured"],
    )


def show_batches(row: Row) -> list[Row]:
    """A line for each batch size."""
    return [
        {
            "model": row["model"],
            "engine": f"{row['engine']} {row['precision']}",
            "batch": entry["batch"],
            "copy, ms": entry["copy_ms"]["median"] if "error" not in entry else "-",
            "infer, ms": entry["infer_ms"]["median"] if "error" not in entry else entry["error"],
            "images/s": entry.get("engine_images_per_s", "-"),
            "paper, V100": PAPER_FPS.get(row["model"], "-"),
        }
        for entry in row["batches"]
    ]


def show_images(row: Row) -> list[Row]:
    """A line for each way of end to end."""
    return [
        {
            "model": row["model"],
            "engine": f"{row['engine']} {row['precision']}",
            "decode, ms": row["decode_ms"]["median"],
            "prepare, ms": row["prepare_ms"]["median"],
            "NMS and RLE, ms": row["postprocess"]["nms_and_rle_ms"]["median"],
            "instances": row["postprocess"]["instances"],
            "batch": entry["batch"],
            "threads": entry["threads"],
            "end to end, images/s": entry["images_per_s"],
        }
        for entry in row.get("end_to_end", [])
    ]


def build_panel(model: str, rows: Sequence[Row]) -> Panel:
    """The engines' images per second over the batch, and those end to end."""
    lines, crosses = {}, {}
    for row in rows:
        if row["model"] == model:
            label = f"{row['engine']} {row['precision']}"
            measured = [entry for entry in row["batches"] if "error" not in entry]
            lines[label] = [(e["batch"], e["engine_images_per_s"]) for e in measured]
            ends = row.get("end_to_end", [])
            crosses[f"{label}, end to end"] = [(e["batch"], e["images_per_s"]) for e in ends]
    paper = {"paper, V100": PAPER_FPS[model]} if model in PAPER_FPS else {}
    return Panel(
        title=model,
        x="batch",
        y="images/s",
        lines={label: points for label, points in lines.items() if points},
        crosses={label: points for label, points in crosses.items() if points},
        levels=paper,
        log="x",
    )
