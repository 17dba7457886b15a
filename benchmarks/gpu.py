"""python -m benchmarks.gpu: the paper's networks on one GPU, stage by stage and end to end.

    python -m benchmarks.gpu --out benchmarks/results/gpu

writes gpu.json and gpu.png within about `--minutes`: what does not fit is named, not measured.
Beside the numbers stand what this GPU can do at most (copies, bf16 matrix products) and the paper's
V100. Latency of a batch is `infer_ms` (copy, engine, and what the backend does with its outputs);
`engine_ms` is the engine alone on inputs that are on the device. ONNX Runtime and TensorRT get the
float32 graph. See gpu_models.py for how candidates are forced.

`--device cpu --quick` runs the same code on tiny networks, to see that all of it works.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.gpu_engines import ENGINES, Engine, build_engine
from benchmarks.gpu_models import (
    IMAGE_HW,
    MODELS,
    OBJECTS,
    PAPER_FPS,
    QUICK_MODELS,
    Subject,
    build_subject,
)
from benchmarks.gpu_plot import plot_rates
from benchmarks.gpu_stages import (
    measure_batch,
    measure_end_to_end,
    measure_host_stages,
    measure_postprocess,
)
from benchmarks.gpu_timing import measure_ceilings
from benchmarks.report import find_versions, this_command
from export.errors import ExportError
from service.engines.aoti_package import PackagePrecision
from service.engines.base import BackendError
from service.errors import ServiceError

BATCHES = (1, 2, 4, 8, 16, 32)
PACKAGES = ("torch", "triton", "onnxruntime", "onnxruntime-gpu", "tensorrt", "cuda-core", "numpy")
Report = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks, batches of 1 and 2")
    parser.add_argument("--models", nargs="+", help=f"default: {' '.join(MODELS)}, in this order")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="default: aoti")
    parser.add_argument("--precision", choices=get_args(PackagePrecision), default="bf16")
    parser.add_argument("--batches", nargs="+", type=int, help=f"default: {BATCHES}")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that decode, in all")
    parser.add_argument("--engine-threads", type=int, help="of an engine on the CPU")
    parser.add_argument("--minutes", type=float, default=10, help="after which no engine is built")
    parser.add_argument("--seconds", type=float, default=2, help="for each number")
    parser.add_argument("--out", type=Path, help="writes this path with .json and .png")
    return parser


def complete(options: argparse.Namespace) -> argparse.Namespace:
    """Fills in the defaults that depend on `--quick`."""
    options.models = options.models or (QUICK_MODELS if options.quick else MODELS)
    options.engines = options.engines or (["eager", "ort"] if options.quick else ["aoti"])
    options.batches = sorted(options.batches or ((1, 2) if options.quick else BATCHES))
    if options.quick:
        options.seconds = min(options.seconds, 0.02)
    return options


def describe_machine(device: str) -> Report:
    """The device and the versions of what runs on it."""
    report: Report = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": find_versions(PACKAGES),
    }
    if device == "cuda":
        report["compute_capability"] = torch.cuda.get_device_capability()
        report["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
    return report


def measure_engine(subject: Subject, engine: Engine, options: argparse.Namespace) -> Report:
    """All numbers of one engine; a batch that does not fit into memory is named."""
    batches: list[Report] = []
    for batch in options.batches:
        try:
            batches.append(measure_batch(subject, engine, batch, seconds=options.seconds))
        except (BackendError, RuntimeError) as error:  # torch's out of memory is a RuntimeError
            batches.append({"batch": batch, "error": str(error).splitlines()[0]})
            break
    fitting = [row["batch"] for row in batches if "error" not in row]
    row: Report = {
        "engine": engine.name,
        "precision": engine.precision,
        "reason": engine.backend.reason,
        "build_s": round(engine.build_s, 1),
        "batches": batches,
    }
    if fitting:
        row["postprocess"] = measure_postprocess(subject, engine, seconds=options.seconds)
        row["end_to_end"] = [
            measure_end_to_end(
                subject, engine, batch, options.threads, seconds=10 * options.seconds
            )
            for batch in sorted({min(fitting[-1], 16), 1})
            if batch in fitting
        ]
    return row


def build_and_measure(subject: Subject, kind: str, options: argparse.Namespace) -> Report:
    """One engine, whose memory is free again when this returns.

    Raises:
        BackendError, ExportError, ServiceError: It cannot run here; says why.
    """
    engine = build_engine(kind, subject, options.device, options.precision, options.engine_threads)
    try:
        return measure_engine(subject, engine, options)
    finally:
        engine.backend.close()


def measure(options: argparse.Namespace) -> Report:
    """Every model with every engine, while there is time."""
    end_s = time.monotonic() + 60 * options.minutes
    report: Report = {
        "command": this_command("benchmarks.gpu"),
        "machine": describe_machine(options.device),
        "ceilings": measure_ceilings(options.device, quick=options.quick),
        "picture": {"image_hw": IMAGE_HW, "objects": OBJECTS, "content": "random weights, forced"},
        "paper_v100_fps": PAPER_FPS,
        "rows": [],
        "skipped": [],
    }
    for name in options.models:
        subject = build_subject(name, max(options.batches))
        host = measure_host_stages(subject, seconds=options.seconds)
        for kind in options.engines:
            head = {"model": name, "canvas_hw": subject.canvas_hw}
            if time.monotonic() > end_s:
                reason = f"--minutes {options.minutes:g} were over"
                report["skipped"].append({**head, "engine": kind, "reason": reason})
                continue
            try:
                row = {**head, **host, **build_and_measure(subject, kind, options)}
            except (BackendError, ExportError, ServiceError) as error:
                report["skipped"].append({**head, "engine": kind, "reason": str(error)})
                continue
            report["rows"].append(row)
            print_row(row)
    for entry in report["skipped"]:
        print(f"not measured: {entry['model']} with {entry['engine']}: {entry['reason']}")
    return report


def print_row(row: Report) -> None:
    """One engine of one model in a few lines."""
    print(f"\n{row['model']} {row['canvas_hw']} {row['engine']} {row['precision']}")
    paper = PAPER_FPS.get(row["model"])
    if paper:
        print(f"  paper, V100: {paper} images/s")
    for entry in row["batches"]:
        if "error" in entry:
            print(f"  batch {entry['batch']:3}: {entry['error']}")
            continue
        engine = entry["engine_ms"] or entry["infer_ms"]
        print(
            f"  batch {entry['batch']:3}: copy {entry['copy_ms']['median']:8.2f} ms, engine "
            f"{engine['median']:8.2f} ms ({entry['engine_images_per_s']:.1f} images/s), infer "
            f"{entry['infer_ms']['median']:8.2f} ms"
        )
    if "postprocess" in row:
        after = row["postprocess"]
        print(
            f"  an image: decode {row['decode_ms']['median']:.2f} ms, prepare "
            f"{row['prepare_ms']['median']:.2f} ms, NMS and RLE "
            f"{after['nms_and_rle_ms']['median']:.2f} ms for {after['instances']} instances"
        )
        for entry in row["end_to_end"]:
            print(
                f"  end to end, batch {entry['batch']}, {entry['threads']} threads: "
                f"{entry['images_per_s']:.1f} images/s"
            )


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = complete(build_parser().parse_args(arguments))
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"benchmarks.gpu: torch {torch.__version__} finds no CUDA device; to see that the "
            "benchmark runs at all: --device cpu --quick",
            file=sys.stderr,
        )
        return 1
    if options.threads < 1 or min(options.batches) < 1:
        print("benchmarks.gpu: --threads and --batches must be at least 1", file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = True
    report = measure(options)
    print("\nat most: " + ", ".join(f"{k} {v}" for k, v in report["ceilings"].items()))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        note = plot_rates(report, options.out.with_suffix(".png"))
        if note:
            print(note)
    return 0 if report["rows"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
