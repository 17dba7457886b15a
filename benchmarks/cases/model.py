"""The exported graph beside eager PyTorch and mmdetection, CPU: a canvas to candidates before NMS.

SOLO-512 R50 with random weights, and the bundled model, in processes of their own: the graph in
ONNX Runtime, the graph with early exits, our network in eager PyTorch, and mmdetection 3.3's SOLO
with the same weights. All must give the same candidates before anything is timed.

mmdetection gives the masks of all cells, not of the candidates alone, and its selection and NMS are
not timed; it has no counterpart of the bundled model. OpenVINO in bf16, where it is installed, is
timed too, and its candidates are counted only. Its interpreter is named by --mmdet-python
(`python -m benchmarks training --help` says how to make one); without it that side is left out.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn

from benchmarks.cases.training import levels_of, run_mmdet
from benchmarks.harness import BenchmarkError
from benchmarks.harness.plots import Panel
from benchmarks.harness.process import ChildProcess
from benchmarks.harness.report import Report, Row
from benchmarks.harness.rounds import Samples, take_turns
from benchmarks.inputs import NUCLEI, NUCLEI_IMAGE, build_jpeg
from benchmarks.sides.model_ours import EAGER, GRAPHS, OPENVINO
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
from training.weights.initial import initialise

TITLES = {
    EAGER: "eager PyTorch",
    "mmdet": "mmdetection, eager",
    "graph": "graph, ONNX Runtime",
    "exits": "graph with early exits",
    OPENVINO: "graph with early exits, OpenVINO in bf16",
}
IMAGE_HW = (800, 1333)
"""Of the image for SOLO-512, on a canvas of 512x864."""
CANDIDATES = 100
"""That the random network is made to find; trained ones find about as many in a full image."""


@dataclass(frozen=True)
class CanvasSubject:
    """A network and its input.

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


def model(
    *,
    models: Annotated[tuple[str, ...], "configurations"] = ("solo_512_r50", "nuclei"),
    mmdet_python: Annotated[Path | None, "interpreter that has mmdetection 3.3"] = None,
    rounds: Annotated[int, "timed runs of each side"] = 5,
    threads: Annotated[int, "of each side"] = 1,
) -> Report:
    data: dict[str, Any] = {}
    rows: list[Row] = []
    panels = []
    for name in models:
        subject = build_subject(name)
        samples, agreement, count = measure(subject, mmdet_python, rounds, threads)
        height, width = subject.images.shape[1:3]
        data[name] = {
            "canvas_hw": [height, width],
            "candidates": count,
            "agreement": agreement,
            **{
                clock: {s: v[clock] for s, v in samples.values.items()}
                for clock in ("cpu_s", "wall_s")
            },
        }
        rows += build_rows(f"{name}, {height}x{width}", samples)
        panels.append(build_panel(name, samples))
    return Report(
        data={"threads": threads, "rounds": rounds, "models": data},
        tables={"": rows},
        notes=[] if mmdet_python else ["mmdetection: not measured, no --mmdet-python"],
        packages=("torch",),
        panels=panels,
    )


def build_subject(name: str) -> CanvasSubject:
    """The bundled model, or one of the paper's by the name of its configuration."""
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
        initialise(network, str(NUCLEI))
    else:
        spread_outputs(network, images, valid_hw)
    return CanvasSubject(config, network, images, valid_hw)


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


def measure(
    subject: CanvasSubject, mmdet_python: Path | None, rounds: int, threads: int
) -> tuple[Samples, dict[str, Any], int]:
    """Compares the first runs of fresh processes, then times the sides in turns.

    Returns:
        The times, how far each side's candidates are from eager PyTorch's, and their number.

    Raises:
        BenchmarkError: A side failed, or gives other candidates than eager PyTorch.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        commands = write_inputs(subject, folder, mmdet_python, threads)
        environment = {"OMP_NUM_THREADS": str(threads)}
        sides = {
            side: stack.enter_context(ChildProcess(command, environment=environment))
            for side, command in commands.items()
        }
        for process in sides.values():
            process.ask("step")
        outputs = {side: load_candidates(folder / f"{side}.npz") for side in sides}
        exact = [side for side in sides if side not in (EAGER, OPENVINO)]
        agreement = {side: check_same(side, outputs[EAGER], outputs[side]) for side in exact}
        if OPENVINO in sides:
            agreement[OPENVINO] = {"candidates": len(outputs[OPENVINO].scores)}
        if not np.array_equal(outputs["graph"].mask_probs, outputs["exits"].mask_probs):
            raise BenchmarkError("the graph with early exits gives other masks than the plain one")
        variants = {side: partial(process.ask, "step") for side, process in sides.items()}
        samples = take_turns(variants, rounds, warm_ups=0)
    return samples, agreement, len(outputs[EAGER].scores)


def write_inputs(
    subject: CanvasSubject, folder: Path, mmdet_python: Path | None, threads: int
) -> dict[str, list[str]]:
    """Writes what the sides read: graphs, network, canvas, mmdetection's weights.

    Returns:
        The command of each side.

    Raises:
        BenchmarkError: The interpreter has no mmdetection that works.
    """
    graph = build_onnx(subject.network)
    stride = min(subject.config.model.head.mask_strides)
    (folder / GRAPHS["graph"]).write_bytes(graph)
    (folder / GRAPHS["exits"]).write_bytes(add_exits(graph, stride))
    file = folder / "ours.pt"
    canvas = {"images": subject.images, "valid_hw": subject.valid_hw}
    torch.save({"network": subject.network, "threads": threads, **canvas}, file)
    ours = [sys.executable, "-m", "benchmarks.sides.model_ours"]
    installed = (OPENVINO,) if find_spec("openvino") else ()
    commands = {side: [*ours, side, str(file)] for side in (EAGER, *GRAPHS, *installed)}
    if mmdet_python is not None and subject.config.name == "solo_512_r50":
        mmdet = [str(mmdet_python), "-m", "benchmarks.sides.model_mmdet"]
        weights = write_mmdet(subject, folder / "mmdet.pt", mmdet, threads)
        commands["mmdet"] = [*mmdet, "steps", str(weights)]
    return commands


def write_mmdet(subject: CanvasSubject, file: Path, command: list[str], threads: int) -> Path:
    """mmdetection's weights by its own names, and its input."""
    network = subject.network
    config = network.config
    content: dict[str, Any] = {"threads": threads, "levels": levels_of("vanilla")}
    torch.save(content, file)
    run_mmdet([*command, "keys", str(file)])
    state = network.state_dict()
    keys = json.loads(file.with_name("keys.json").read_text(encoding="utf-8"))
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


def load_candidates(file: Path) -> Candidates:
    """A side's candidates, empty slots dropped."""
    with np.load(file) as content:
        arrays = (content[name] for name in ("scores", "labels", "mask_probs"))
        (candidates,) = split_batch(*arrays)
    return candidates


def check_same(side: str, expected: Candidates, found: Candidates) -> dict[str, Any]:
    """How far a side's candidates are from eager PyTorch's.

    Raises:
        BenchmarkError: Too far for two runtimes that compute the same.
    """
    difference: Difference = match_candidates(expected, found)
    if not len(expected.scores) or difference.unmatched > max(2, 0.02 * len(expected.scores)):
        raise BenchmarkError(
            f"{side}: {difference.unmatched} of {len(expected.scores)} and {len(found.scores)} "
            f"candidates have no partner: {'; '.join(difference.examples)}"
        )
    return {
        "unmatched": difference.unmatched,
        "max_score_difference": difference.max_score_difference,
        "max_mask_difference": difference.max_mask_difference,
    }


def build_rows(title: str, samples: Samples) -> list[Row]:
    """A row for each side that was measured."""
    return [
        {
            "model": title,
            "runs": TITLES[side],
            "CPU s": samples.median(side, "cpu_s"),
            "wall s": samples.median(side, "wall_s"),
            "CPU time of eager PyTorch's (range)": str(samples.ratio(side, EAGER, "cpu_s")),
        }
        for side in TITLES
        if side in samples.values
    ]


def build_panel(title: str, samples: Samples) -> Panel:
    """Bars of the sides' CPU seconds."""

    def quartiles(values: Mapping[str, list[float]]) -> tuple[float, float, float]:
        low, middle, high = np.percentile(values["cpu_s"], [25, 50, 75]).tolist()
        return low, middle, high

    sides = [side for side in reversed(TITLES) if side in samples.values]
    bars = {TITLES[side]: quartiles(samples.values[side]) for side in sides}
    return Panel(title=title, x="CPU s a canvas", bars=bars)
