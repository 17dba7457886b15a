"""python -m benchmarks.model: the exported graph against eager PyTorch and mmdetection, CPU.

SOLO-512 R50 with random weights, and the bundled model. From one canvas to the candidates before
NMS, in processes of their own: the graph in ONNX Runtime, the graph with early exits, our network
in eager PyTorch, and mmdetection 3.3's SOLO with the same weights. All must give the same
candidates before anything is measured. Then they run in turns, in CPU seconds of the process,
which other work on the machine hardly changes; with one thread that is the time on an idle core.

mmdetection gives the masks of all cells, not of the candidates alone, and what it does with them
afterwards (selection, Matrix NMS) is not measured; it has no counterpart of the bundled model. It
is no dependency: its interpreter is named by --mmdet-python (`python -m benchmarks.training
--help` says how to make one), and without it that side is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.decode import build_jpeg
from benchmarks.model_ours import GRAPHS
from benchmarks.plot import NO_PLOT, load_pyplot
from benchmarks.report import (
    describe_machine,
    markdown_table,
    ratio_quartiles,
    show_quartiles,
    this_command,
    write_report,
)
from benchmarks.training import levels_of
from benchmarks.worker import ROOT, Worker
from export.exit_graph import add_exits
from export.onnx_graph import build_onnx, num_candidates
from export.parity import Difference, match_candidates
from pipeline.decode import decode_image
from pipeline.preprocess import prepare
from pipeline.types import Candidates
from service.engines.base import split_batch
from training.configs import get_config
from training.configs.schema import Config
from training.model.solo import Solo, points_nms
from training.weights.convert import convert_key
from training.weights.importing import initialise

MODELS = ("solo_512_r50", "nuclei")
EAGER = "eager"
TITLES = {
    EAGER: "eager PyTorch",
    "mmdet": "mmdetection, eager",
    "graph": "graph, ONNX Runtime",
    "exits": "graph with early exits",
}
NUCLEI_IMAGE = ROOT / "tests" / "data" / "nuclei" / "images" / "9bb6e39d5f4415bc.jpg"
IMAGE_HW = (800, 1333)
"""Of the drawn picture that SOLO-512 sees, on a canvas of 512x864."""
CANDIDATES = 100
"""That the random network is made to find; trained ones find about as many in a full picture."""


@dataclass(frozen=True)
class Subject:
    """A network and the canvas that it sees.

    Attributes:
        config: Of the network.
        network: In evaluation mode.
        images: [1, H, W, 3] uint8.
        valid_hw: [1, 2] int64.
    """

    config: Config
    network: Solo
    images: torch.Tensor
    valid_hw: torch.Tensor


def build_subject(name: str) -> Subject:
    """A model of `MODELS`, or another of the paper's by the name of its configuration."""
    config = get_config(name)
    if name == "nuclei":
        frozen = replace(config.model.backbone, norm="frozen_bn")  # folded in the graph
        config = replace(config, model=replace(config.model, backbone=frozen))
        content = NUCLEI_IMAGE.read_bytes()
    else:
        content = build_jpeg(*IMAGE_HW)
    tile = prepare(decode_image(content), config.input).tiles[0]
    torch.manual_seed(0)
    network = Solo(config.model, config.num_classes).eval()
    images, valid_hw = torch.from_numpy(tile.image[None]), torch.tensor([tile.valid_hw])
    if name == "nuclei":
        initialise(network, str(ROOT / "model_repo" / "nuclei"))
    else:
        spread_outputs(network, images, valid_hw)
    return Subject(config, network, images, valid_hw)


@torch.no_grad()
def spread_outputs(network: Solo, images: torch.Tensor, valid_hw: torch.Tensor) -> None:
    """Changes the last convolutions so that scores and masks vary and `CANDIDATES` cells score."""
    head = network.head
    for conv in head.mask_out.modules():
        if isinstance(conv, nn.Conv2d) and conv.bias is not None:
            conv.weight.mul_(30)
            conv.bias.zero_()
    assert head.category_out.bias is not None
    head.category_out.bias.zero_()
    outputs = network(network.normalise(images, valid_hw))
    logits = torch.cat([output.category_logits.flatten() for output in outputs])
    head.category_out.weight.div_(logits.std())
    peaks = torch.cat(
        [points_nms((o.category_logits / logits.std()).sigmoid()).flatten() for o in outputs]
    )
    found = min(CANDIDATES, int(peaks.count_nonzero()))
    least = peaks.topk(found).values[-1]
    threshold = torch.tensor(network.config.candidate_threshold)
    head.category_out.bias.fill_(threshold.logit() - least.logit() + 1e-3)


def write_inputs(subject: Subject, folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Writes what the sides read: graphs, network, canvas, mmdetection's weights.

    Returns:
        The file that each side reads.

    Raises:
        RuntimeError: The interpreter has no mmdetection that works.
    """
    network = subject.network
    graph = build_onnx(network)
    (folder / GRAPHS["graph"]).write_bytes(graph)
    stride = min(subject.config.model.head.mask_strides)
    (folder / GRAPHS["exits"]).write_bytes(add_exits(graph, stride))
    ours = folder / "ours.pt"
    canvas = {"images": subject.images, "valid_hw": subject.valid_hw}
    torch.save({"network": network, "threads": options.threads, **canvas}, ours)
    files = {EAGER: ours, **dict.fromkeys(GRAPHS, ours)}
    if options.mmdet_python is not None and subject.config.name == "solo_512_r50":
        files["mmdet"] = _write_mmdet(subject, folder, options)
    return files


def _write_mmdet(subject: Subject, folder: Path, options: argparse.Namespace) -> Path:
    network, file = subject.network, folder / "mmdet.pt"
    config = network.config
    content: dict[str, Any] = {"threads": options.threads, "levels": levels_of("vanilla")}
    torch.save(content, file)
    command = [str(options.mmdet_python), "-m", "benchmarks.model_mmdet", "keys", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"{options.mmdet_python} cannot run mmdetection ({reason[0]})")
    state = network.state_dict()
    keys = json.loads((folder / "keys.json").read_text(encoding="utf-8"))
    content |= {
        "weights": {key: state[convert_key(key)] for key in keys},
        "pixels": network.normalise(subject.images, subject.valid_hw),
        "candidates": num_candidates(network),
        "strides": list(config.head.level_strides),
        "mask_threshold": config.mask_threshold,
        "candidate_threshold": config.candidate_threshold,
    }
    torch.save(content, file)
    return file


def command_of(side: str, file: Path, options: argparse.Namespace) -> list[str]:
    """What runs a side."""
    if side == "mmdet":
        return [str(options.mmdet_python), "-m", "benchmarks.model_mmdet", "steps", str(file)]
    return [sys.executable, "-m", "benchmarks.model_ours", side, str(file)]


def measure(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """Compares the first runs of fresh processes, then times the sides in turns.

    Raises:
        RuntimeError: A side failed.
        ValueError: A side gives other candidates than eager PyTorch.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        files = write_inputs(subject, folder, options)
        environment = {"OMP_NUM_THREADS": str(options.threads)}
        workers = {
            side: stack.enter_context(Worker(command_of(side, file, options), environment))
            for side, file in files.items()
        }
        for worker in workers.values():
            worker.ask("step")
        outputs = {side: load_candidates(folder / f"{side}.npz") for side in files}
        agreement = {
            side: check_same(side, outputs[EAGER], outputs[side]) for side in files if side != EAGER
        }
        if len(outputs["graph"].scores) != len(outputs["exits"].scores) or not np.array_equal(
            outputs["graph"].mask_probs, outputs["exits"].mask_probs
        ):
            raise ValueError("the graph with early exits gives other masks than the plain one")
        laps: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
        for _ in range(options.rounds):
            for side, worker in workers.items():
                laps[side].append(worker.ask("step"))
    cpu_s = {side: [lap["cpu_s"] for lap in rows] for side, rows in laps.items()}
    return {
        "canvas_hw": list(subject.images.shape[1:3]),
        "candidates": len(outputs[EAGER].scores),
        "agreement": agreement,
        "cpu_s": cpu_s,
        "wall_s": {side: [lap["wall_s"] for lap in rows] for side, rows in laps.items()},
        "ratios": {side: ratio_quartiles(values, cpu_s[EAGER]) for side, values in cpu_s.items()},
    }


def load_candidates(file: Path) -> Candidates:
    """A side's candidates, empty slots dropped."""
    with np.load(file) as content:
        arrays = (content[name] for name in ("scores", "labels", "mask_probs"))
        (candidates,) = split_batch(*arrays)
    return candidates


def check_same(side: str, expected: Candidates, found: Candidates) -> dict[str, Any]:
    """How far a side's candidates are from eager PyTorch's.

    Raises:
        ValueError: Too far for two runtimes that compute the same.
    """
    difference: Difference = match_candidates(expected, found)
    if not len(expected.scores) or difference.unmatched > max(2, 0.02 * len(expected.scores)):
        raise ValueError(
            f"{side}: {difference.unmatched} of {len(expected.scores)} and {len(found.scores)} "
            f"candidates have no partner: {'; '.join(difference.examples)}"
        )
    return {
        "unmatched": difference.unmatched,
        "max_score_difference": difference.max_score_difference,
        "max_mask_difference": difference.max_mask_difference,
    }


def table_rows(models: dict[str, Any]) -> list[dict[str, object]]:
    """One row a model and side; what a side was not measured on has no row."""
    rows: list[dict[str, object]] = []
    for name, found in models.items():
        height, width = found["canvas_hw"]
        for side, title in TITLES.items():
            if side not in found["cpu_s"]:
                continue
            rows.append(
                {
                    "model": f"{name}, {height}x{width}",
                    "runs": title,
                    "CPU s": float(np.median(found["cpu_s"][side])),
                    "of eager PyTorch, quartiles": show_quartiles(found["ratios"][side]),
                }
            )
    return rows


def plot_times(models: dict[str, Any], file: Path) -> str | None:
    """Draws a panel of bars for each model.

    Returns:
        Why there is no picture, None if there is one.
    """
    pyplot = load_pyplot()
    if pyplot is None:
        return NO_PLOT
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(5 * len(models), 2.6), squeeze=False, layout="constrained"
    )
    for panel, (name, found) in zip(panels.flat, models.items(), strict=True):
        sides = [side for side in reversed(TITLES) if side in found["cpu_s"]]
        low, middle, high = (
            np.array([np.percentile(found["cpu_s"][side], q) for side in sides])
            for q in (25, 50, 75)
        )
        names = [TITLES[side] for side in sides]
        panel.barh(names, middle, xerr=(middle - low, high - middle), color="#4878a8")
        panel.set(title=name, xlabel="CPU s a canvas")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return None


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--mmdet-python", type=Path, help="interpreter that has mmdetection 3.3")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs a side (5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write FILE.json, FILE.md and FILE.png")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(arguments)
    models = {}
    try:
        for name in options.models:
            models[name] = measure(build_subject(name), options)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"benchmarks.model: {error}", file=sys.stderr)
        return 1
    table = markdown_table(table_rows(models))
    print(table)
    if options.out:
        content = {
            "machine": describe_machine(("torch",)),
            "threads": options.threads,
            "rounds": options.rounds,
            "models": models,
        }
        command = this_command("benchmarks.model", {str(options.mmdet_python): "$MMDET_PYTHON"})
        write_report(options.out.with_suffix(".json"), command, content)
        options.out.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
        print(plot_times(models, options.out.with_suffix(".png")) or "", end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
