"""What a network computes and moves, counted on meta tensors: GFLOP, MB of masks, a roofline.

Floating-point operations (a multiply-add is two) of one image, part by part, of the graph that is
exported; bytes of the candidates' masks. The roofline is an ESTIMATE for a GPU of the given rates:
the least time that the operations and the mask bytes would take. With --layers the convolutions are
listed part by part, beside those of the paper's network, which computes the masks of all cells.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.subjects import find_config
from benchmarks.harness.report import Report
from export.onnx_graph import num_candidates
from training.model.solo import Solo

CANVASES = {"solo_r50": (800, 1344), "solo_512_r50": (512, 864)}
PARTS = ("backbone", "neck", "head")


def flops(
    *,
    models: Annotated[tuple[str, ...], "configurations"] = tuple(CANVASES),
    tflop_s: Annotated[float, "matrix rate of the GPU, H200 by default"] = 790,
    gb_s: Annotated[float, "memory rate of the GPU, H200 by default"] = 4000,
    layers: Annotated[bool, "list the convolutions too"] = False,
) -> Report:
    rows = [build_row(name, tflop_s, gb_s) for name in models]
    listed = {}
    for name in models if layers else ():
        counts = count_layers(name, find_canvas(name))
        listed[f"{name}: half precision, one image"] = tabulate_layers(counts, tflop_s, gb_s)
    parts = ("gflop", "mask_mb_half", "estimate")
    table = [
        {"model": row["model"], **{k: v for part in parts for k, v in row[part].items()}}
        for row in rows
    ]
    return Report(
        data={"rows": rows, "layers": listed},
        tables={"GFLOP; MB of half-precision masks": table, **listed},
    )


def count_flops(name: str, canvas_hw: tuple[int, int]) -> dict[str, float]:
    """GFLOP of each part for one image; `masks` is the product for the chosen candidates."""
    config = find_config(name)
    with torch.device("meta"):
        network = Solo(config.model, config.num_classes).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network.candidates(
            torch.empty(1, *canvas_hw, 3, dtype=torch.uint8, device="meta"),
            torch.empty(1, 2, dtype=torch.int64, device="meta"),
        )
    counts = {part: sum(ops.values()) / 1e9 for part, ops in counter.get_flop_counts().items()}
    found = {part: counts[f"Solo.{part}"] for part in PARTS}
    category = sum(v for k, v in counts.items() if k.startswith("Solo.head.category") and _leaf(k))
    total = counts["Global"]
    return {
        "backbone": found["backbone"],
        "neck": found["neck"],
        "head_category": category,
        "head_mask": found["head"] - category,
        "masks": total - sum(found.values()),
        "total": total,
    }


def find_canvas(name: str) -> tuple[int, int]:
    """The canvas of the paper's size of image."""
    return CANVASES["solo_512_r50" if "512" in name else "solo_r50"]


@dataclass
class LayerCount:
    """Convolutions of one part of the network, for one image.

    Attributes:
        calls: Their number.
        gflop: Of the graph that is exported.
        paper_gflop: Of the paper's network.
        values: Numbers read and written: inputs, weights, outputs, in millions.
    """

    calls: int = 0
    gflop: float = 0.0
    paper_gflop: float = 0.0
    values: float = 0.0


def count_layers(name: str, canvas_hw: tuple[int, int]) -> dict[str, LayerCount]:
    """The convolutions of each part; `mask output` is that of the chosen candidates."""
    config = find_config(name)
    with torch.device("meta"):
        network = Solo(config.model, config.num_classes).eval()
    found: dict[str, LayerCount] = defaultdict(LayerCount)

    def count(part: str, conv: nn.Conv2d, x: Tensor, y: Tensor) -> None:
        layer = found[part]
        assert conv.bias is None or conv.bias.numel() == conv.out_channels
        flop = 2 * y.numel() * conv.weight[0].numel()
        layer.calls += 1
        layer.gflop += flop / 1e9
        layer.paper_gflop += flop / 1e9
        layer.values += (x.numel() + conv.weight.numel() + y.numel()) / 1e6

    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            part = _part_of(path)
            module.register_forward_hook(
                lambda conv, given, y, part=part: count(part, conv, given[0], y)
            )
    images = torch.empty(1, *canvas_hw, 3, dtype=torch.uint8, device="meta")
    with torch.no_grad():
        network.candidates(images, torch.empty(1, 2, dtype=torch.int64, device="meta"))
    if config.model.head.kind == "vanilla":
        found["mask output"] = _count_vanilla_masks(network, canvas_hw)
    return dict(found)


def _part_of(path: str) -> str:
    parts = path.split(".")
    if parts[0] == "head":
        return f"{parts[1].partition('_')[0]} {'output' if '_out' in parts[1] else 'tower'}"
    return "pyramid" if parts[0] == "neck" else f"backbone {parts[1]}"


def _count_vanilla_masks(network: Solo, canvas_hw: tuple[int, int]) -> LayerCount:
    """K masks at each level, where the paper's 1x1 convolutions compute S * S."""
    head, found = network.config.head, LayerCount()
    kept = num_candidates(network)
    for stride, grid in zip(head.mask_strides, head.num_grids, strict=True):
        pixels = canvas_hw[0] // stride * (canvas_hw[1] // stride)
        found.calls += 1
        found.gflop += 2 * pixels * head.channels * kept / 1e9
        found.paper_gflop += 2 * pixels * head.channels * grid * grid / 1e9
        found.values += (pixels * (head.channels + kept) + head.channels * kept) / 1e6
    return found


def tabulate_layers(
    counts: dict[str, LayerCount], tflop_s: float, gb_s: float
) -> list[dict[str, Any]]:
    """A line for each part: what it computes and moves, and which of the two takes longer."""
    lines = []
    for part, layer in counts.items():
        compute_ms, memory_ms = layer.gflop / tflop_s, 2 * layer.values / gb_s
        lines.append(
            {
                "part": part,
                "calls": layer.calls,
                "GFLOP": round(layer.gflop, 1),
                "paper": round(layer.paper_gflop, 1),
                "MB": round(2 * layer.values),
                "FLOP/byte": round(1e3 * layer.gflop / (2 * layer.values)),
                "least ms (estimate)": round(max(compute_ms, memory_ms), 3),
                "bound by": "compute" if compute_ms > memory_ms else "memory",
            }
        )
    return lines


def _leaf(name: str) -> bool:
    return name.endswith((".conv", "category_out"))


def count_mask_bytes(name: str, canvas_hw: tuple[int, int], item_bytes: int) -> dict[str, float]:
    """MB of one image's masks.

    `output` is what leaves the graph, [K, h, w]; `logits` is what the vanilla head computes first,
    K masks at the stride of every level, of which `output` keeps the one of each candidate's level.
    """
    config = find_config(name)
    strides = config.model.head.mask_strides
    with torch.device("meta"):
        candidates = num_candidates(Solo(config.model, config.num_classes))
    sizes = [canvas_hw[0] // stride * (canvas_hw[1] // stride) for stride in strides]
    mask_bytes = candidates * item_bytes / 1e6
    logits = sum(sizes) if config.model.head.kind == "vanilla" else 0
    return {"output": max(sizes) * mask_bytes, "logits": logits * mask_bytes}


def build_row(name: str, tflop_s: float, gb_s: float) -> dict[str, Any]:
    """The counts of one network, and the estimate."""
    canvas_hw = find_canvas(name)
    flops = count_flops(name, canvas_hw)
    fp32, half = (count_mask_bytes(name, canvas_hw, size) for size in (4, 2))
    # Fused as far as possible: logits written and read; masks written, read for their scores, read
    # and written when they are sorted.
    traffic_mb = 2 * half["logits"] + 4 * half["output"]
    compute_ms = flops["total"] / tflop_s
    return {
        "model": name,
        "canvas_hw": canvas_hw,
        "gflop": {part: round(value, 1) for part, value in flops.items()},
        "mask_mb_fp32": {key: round(value, 1) for key, value in fp32.items()},
        "mask_mb_half": {key: round(value, 1) for key, value in half.items()},
        "estimate": {
            "compute_ms": round(compute_ms, 3),
            "images_per_s_at_most": round(1e3 / compute_ms),
            "mask_traffic_half_mb": round(traffic_mb),
            "mask_traffic_ms": round(traffic_mb / gb_s, 3),
        },
    }
