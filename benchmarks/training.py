"""python -m benchmarks.training: a training step of our heads against mmdetection 3.3's, CPU.

Head, targets, loss and backward on the same pyramid features, weights and ground truth, both
sides in processes of their own. Losses and gradients must agree before anything is measured.
Then steps are timed in turns, in CPU seconds of the process, which other work on the machine
hardly changes; with one thread that is the step's time on an idle core. Peak memory is what the
first step of a fresh process adds to its resident set.

mmdetection is no dependency. Its interpreter is named by --mmdet-python; to make one:

    python -m venv .venv-mmdet
    .venv-mmdet/bin/pip install torch==2.13.0 mmengine==0.10.7 mmcv-lite==2.1.0 mmdet==3.3.0
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.report import this_command, write_report
from benchmarks.worker import ROOT, Worker
from training.configs.schema import PUBLISHED_SCALE_RANGES
from training.weights.convert import convert_key

KINDS = ("vanilla", "decoupled", "decoupled_light")
LIGHT_SCALE_RANGES = ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048))
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-3
STRIDES = (4, 8, 16, 32, 64)
Report = dict[str, Any]


def levels_of(kind: str) -> dict[str, Any]:
    """The published head by mmdetection's names."""
    light = kind == "decoupled_light"
    return {
        "stacked_convs": 4 if light else 7,
        "strides": [8, 8, 16, 32, 32],
        "scale_ranges": LIGHT_SCALE_RANGES if light else PUBLISHED_SCALE_RANGES,
        "num_grids": [40, 36, 24, 16, 12],
    }


def random_objects(
    canvas_hw: tuple[int, int], count: int, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Ellipses anywhere; their sizes are spread evenly over the octaves from 12 px up.

    Returns:
        masks [N, H, W] uint8, boxes_xyxy [N, 4] float32 of the visible parts, labels [N].
    """
    height, width = canvas_hw
    masks: list[NDArray[np.uint8]] = []
    boxes: list[tuple[int, int, int, int]] = []
    while len(masks) < count:
        size = math.exp(rng.uniform(math.log(12), math.log(0.75 * height)))
        aspect = math.exp(rng.uniform(-0.7, 0.7))
        axes = (max(1, round(size * aspect / 2)), max(1, round(size / aspect / 2)))
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        mask = np.zeros(canvas_hw, np.uint8)
        cv2.ellipse(mask, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
        x, y, w, h = cv2.boundingRect(mask)
        if w * h >= 64:
            masks.append(mask)
            boxes.append((x, y, x + w, y + h))
    return {
        "masks": torch.from_numpy(np.stack(masks)),
        "boxes_xyxy": torch.tensor(boxes, dtype=torch.float32),
        "labels": torch.from_numpy(rng.integers(0, 80, count)),
    }


def check_equal(ours: Report, theirs: Report) -> float:
    """Largest relative difference of losses and gradient norms.

    Raises:
        ValueError: They are not the same computation; names the number that differs.
    """
    pairs = {
        f"loss {name}": (value, theirs["losses"][name], LOSS_TOLERANCE)
        for name, value in ours["losses"].items()
    }
    for i, norms in enumerate(zip(ours["feature_grads"], theirs["feature_grads"], strict=True)):
        pairs[f"gradient of P{i + 2}"] = (*norms, GRADIENT_TOLERANCE)
    for name, value in theirs["parameter_grads"].items():
        found = ours["parameter_grads"][convert_key(name)]
        pairs[f"gradient of {name}"] = (found, value, GRADIENT_TOLERANCE)
    worst = 0.0
    for name, (a, b, tolerance) in pairs.items():
        difference = abs(a - b) / max(abs(b), 1e-12)
        worst = max(worst, difference)
        if difference > tolerance and max(abs(a), abs(b)) > 1e-9:
            raise ValueError(f"{name} is {a} here and {b} in mmdetection")
    return worst


def compare(kind: str, inputs: Path, options: argparse.Namespace) -> Report:
    """Memory and equality from the first steps of two fresh processes, then time in turns."""
    commands = {
        "ours": [sys.executable, "-m", "benchmarks.training_ours", kind, str(inputs)],
        "mmdet": [
            *(str(options.mmdet_python), "-m", "benchmarks.training_mmdet"),
            *(kind, "steps", str(inputs)),
        ],
    }
    environment = {"OMP_NUM_THREADS": f"{options.threads}"}
    with (
        Worker(commands["ours"], environment) as ours,
        Worker(commands["mmdet"], environment) as mmdet,
    ):
        workers = {"ours": ours, "mmdet": mmdet}
        first = {side: worker.ask("step") for side, worker in workers.items()}
        difference = check_equal(first["ours"], first["mmdet"])
        laps: dict[str, list[Report]] = {side: [] for side in workers}
        for _ in range(options.repeats):
            for side, worker in workers.items():
                laps[side].append(worker.ask("step"))
    peaks = {side: report["peak_bytes"] / 2**20 for side, report in first.items()}
    ratios = sorted(
        a["cpu_s"] / b["cpu_s"] for a, b in zip(laps["ours"], laps["mmdet"], strict=True)
    )
    return {
        "losses": first["ours"]["losses"],
        "largest_relative_difference": difference,
        "step_s": {s: statistics.median(r["cpu_s"] for r in rows) for s, rows in laps.items()},
        "wall_s": {s: statistics.median(r["wall_s"] for r in rows) for s, rows in laps.items()},
        "step_ratio": statistics.median(ratios),
        "step_ratio_range": [ratios[0], ratios[-1]],
        "peak_mib": peaks,
        "peak_ratio": peaks["ours"] / peaks["mmdet"],
    }


def prepare(kind: str, folder: Path, options: argparse.Namespace) -> Path:
    """Writes what both sides read: features, ground truth and mmdetection's initial weights.

    Raises:
        RuntimeError: The interpreter has no mmdetection that works.
    """
    height, width = options.size
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    content: dict[str, Any] = {
        "threads": options.threads,
        "levels": levels_of(kind),
        "canvas_hw": (height, width),
        "features": [
            torch.randn(options.batch, 256, -(-height // s), -(-width // s)) for s in STRIDES
        ],
        "objects": [
            random_objects((height, width), options.instances, rng) for _ in range(options.batch)
        ],
    }
    path = folder / "inputs.pt"
    torch.save(content, path)
    command = [str(options.mmdet_python), "-m", "benchmarks.training_mmdet", kind, "weights"]
    done = subprocess.run([*command, str(path)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(
            f"{options.mmdet_python} cannot run mmdetection ({reason[0]}); "
            "python -m benchmarks.training --help says how to install it"
        )
    weights = torch.load(folder / "weights.pt", weights_only=True)
    for name, value in weights.items():
        if "conv_mask_list" in name:  # masks that vary, not 0.01 everywhere
            value.zero_() if name.endswith("bias") else value.mul_(10)
    content["weights"] = weights
    torch.save(content, path)
    return path


def size_of(text: str) -> tuple[int, int]:
    """`512x672` -> (512, 672)."""
    sides = [int(side) for side in text.split("x") if side.isdigit()]
    if len(sides) != 2 or min(sides) < 32 or any(side % 32 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, multiples of 32")
    return sides[0], sides[1]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mmdet-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--size", type=size_of, default=(512, 672), help="canvas, e.g. 800x1344")
    parser.add_argument("--batch", type=int, default=2, help="images a step (2)")
    parser.add_argument("--instances", type=int, default=60, help="objects an image (60)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps a side (5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    return parser


def main() -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args()
    height, width = options.size
    rows = {}
    print(f"batch {options.batch} of {height}x{width}, {options.instances} objects an image")
    print(f"{'head':>16} {'ours':>8} {'mmdet':>8} {'ratio (range)':>20}   peak MiB")
    try:
        for kind in options.kinds:
            with tempfile.TemporaryDirectory() as folder:
                row = compare(kind, prepare(kind, Path(folder), options), options)
            rows[kind] = row
            low, high = row["step_ratio_range"]
            step, peak = row["step_s"], row["peak_mib"]
            print(
                f"{kind:>16} {step['ours']:6.2f} s {step['mmdet']:6.2f} s "
                f"{row['step_ratio']:6.2f} ({low:.2f}-{high:.2f})   "
                f"{peak['ours']:.0f} / {peak['mmdet']:.0f} = {row['peak_ratio']:.2f}"
            )
    except (RuntimeError, ValueError, OSError) as error:
        print(f"benchmarks.training: {error}", file=sys.stderr)
        return 1
    if options.json:
        variables = {str(options.mmdet_python): "$MMDET_PYTHON"}
        command = this_command("benchmarks.training", variables)
        content = {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "rows": rows,
        }
        write_report(options.json, command, content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
