"""A training step of our heads beside mmdetection 3.3's, CPU: head, targets, loss, backward.

Both sides get the same pyramid features, weights and ground truth, in processes of their own.
Losses and gradients must agree before anything is timed. Peak memory is what the first step of a
fresh process adds to its resident set.

mmdetection is no dependency. Its interpreter is named by --mmdet-python; to make one:

    python -m venv .venv-mmdet
    .venv-mmdet/bin/pip install torch==2.13.0 mmengine==0.10.7 mmcv-lite==2.1.0 mmdet==3.3.0
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import BenchmarkError
from benchmarks.harness.process import ChildProcess
from benchmarks.harness.report import ROOT, Report, Row
from benchmarks.harness.rounds import take_turns
from training.configs.coco import LIGHT_SCALE_RANGES
from training.configs.schema import PUBLISHED_SCALE_RANGES, HeadKind
from training.weights.convert import convert_key

Kind = Literal["vanilla", "decoupled", "decoupled_light"]
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-3
STRIDES = (4, 8, 16, 32, 64)
OURS, MMDET = "ours", "mmdet"


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The inputs of a step: canvas [H, W] px, images, objects of an image."""

    canvas_hw: tuple[int, int]
    images: int
    objects: int


def training(
    *,
    mmdet_python: Annotated[Path, "interpreter that has mmdetection 3.3"] = Path(sys.executable),
    kinds: Annotated[tuple[Kind, ...], "heads"] = ("vanilla", "decoupled", "decoupled_light"),
    size: Annotated[tuple[int, ...], "height and width of the canvas, multiples of 32"] = (
        512,
        672,
    ),
    batch: Annotated[int, "images a step"] = 2,
    instances: Annotated[int, "objects an image"] = 60,
    rounds: Annotated[int, "timed steps of each side"] = 5,
    threads: Annotated[int, "of each side"] = 1,
) -> Report:
    if len(size) != 2 or min(size) < 32 or any(side % 32 for side in size):
        raise BenchmarkError(f"--size {size} is not two multiples of 32")
    shape = StepShape(canvas_hw=(size[0], size[1]), images=batch, objects=instances)
    found = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            inputs = prepare(kind, Path(folder), str(mmdet_python), shape, threads)
            found[kind] = compare(kind, inputs, str(mmdet_python), rounds, threads)
    rows = [
        {
            "head": kind,
            "ours, CPU s": row["step_s"][OURS],
            "mmdetection": row["step_s"][MMDET],
            "ours / mmdetection (range)": row["shown_ratio"],
            "peak, MiB": f"{row['peak_mib'][OURS]:.0f} / {row['peak_mib'][MMDET]:.0f}",
        }
        for kind, row in found.items()
    ]
    return Report(data={**asdict(shape), "rows": found}, tables={"": rows}, packages=("torch",))


def levels_of(kind: HeadKind) -> dict[str, Any]:
    """The published head by mmdetection's names."""
    light = kind == "decoupled_light"
    return {
        "stacked_convs": 4 if light else 7,
        "strides": [8, 8, 16, 32, 32],
        "scale_ranges": LIGHT_SCALE_RANGES if light else PUBLISHED_SCALE_RANGES,
        "num_grids": [40, 36, 24, 16, 12],
    }


def prepare(kind: HeadKind, folder: Path, python: str, shape: StepShape, threads: int) -> Path:
    """Writes what both sides read: features, ground truth and mmdetection's initial weights.

    Raises:
        BenchmarkError: The interpreter has no mmdetection that works.
    """
    height, width = shape.canvas_hw
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    content: dict[str, Any] = {
        "threads": threads,
        "levels": levels_of(kind),
        "canvas_hw": (height, width),
        "features": [
            torch.randn(shape.images, 256, -(-height // s), -(-width // s)) for s in STRIDES
        ],
        "objects": [
            random_objects((height, width), shape.objects, rng) for _ in range(shape.images)
        ],
    }
    path = folder / "inputs.pt"
    torch.save(content, path)
    run_mmdet([python, "-m", "benchmarks.sides.training_mmdet", kind, "weights", str(path)])
    weights = torch.load(folder / "weights.pt", weights_only=True)
    for name, value in weights.items():
        if "conv_mask_list" in name:  # masks that vary, not 0.01 everywhere
            value.zero_() if name.endswith("bias") else value.mul_(10)
    content["weights"] = weights
    torch.save(content, path)
    return path


def run_mmdet(command: list[str]) -> None:
    """Runs a step in mmdetection's interpreter.

    Raises:
        BenchmarkError: It has no mmdetection that works.
    """
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise BenchmarkError(
            f"{command[0]} cannot run mmdetection ({reason[0]}); "
            "python -m benchmarks training --help says how to install it"
        )


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


def compare(kind: str, inputs: Path, python: str, rounds: int, threads: int) -> Row:
    """Memory and equality from the first steps of two fresh processes, then times in turns."""
    environment = {"OMP_NUM_THREADS": f"{threads}"}
    module = "benchmarks.sides.training_"
    ours = [sys.executable, "-m", f"{module}ours", kind, str(inputs)]
    mmdet = [python, "-m", f"{module}mmdet", kind, "steps", str(inputs)]
    with (
        ChildProcess(ours, environment=environment) as a,
        ChildProcess(mmdet, environment=environment) as b,
    ):
        sides = {OURS: a, MMDET: b}
        first = {name: side.ask("step") for name, side in sides.items()}
        difference = check_equal(first[OURS], first[MMDET])
        variants = {name: partial(side.ask, "step") for name, side in sides.items()}
        samples = take_turns(variants, rounds, warm_ups=0)
    ratio = samples.ratio(OURS, MMDET, "cpu_s")
    peaks = {side: report["peak_bytes"] / 2**20 for side, report in first.items()}
    return {
        "losses": first[OURS]["losses"],
        "largest_relative_difference": difference,
        "step_s": {side: samples.median(side, "cpu_s") for side in sides},
        "wall_s": {side: samples.median(side, "wall_s") for side in sides},
        "step_ratio": asdict(ratio),
        "shown_ratio": str(ratio),
        "peak_mib": peaks,
        "peak_ratio": peaks[OURS] / peaks[MMDET],
    }


def check_equal(ours: Row, theirs: Row) -> float:
    """Largest relative difference of losses and gradient norms.

    Raises:
        BenchmarkError: They are not the same computation; names the number that differs.
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
            raise BenchmarkError(f"{name} is {a} here and {b} in mmdetection")
    return worst
