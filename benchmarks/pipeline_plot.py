"""Times of the stages over the size of the image, as benchmarks/pipeline.py measured them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pipeline_stages import OURS
from benchmarks.plot import NO_PLOT, load_pyplot, use_logarithms

COLUMNS = 4
Row = dict[str, Any]


def plot_stages(stages: Sequence[Row], mmdet: Sequence[Row], file: Path) -> str | None:
    """Draws a panel for each stage, a line for each way.

    Args:
        stages: Rows of the stages, one for each size and other way.
        mmdet: Rows of the whole post-processing beside mmdetection's.
        file: Picture to write.

    Returns:
        Why there is no picture, None if there is one.
    """
    pyplot = load_pyplot()
    if pyplot is None:
        return NO_PLOT
    panels = _collect(stages, mmdet)
    height = -(-len(panels) // COLUMNS)
    figure, grid = pyplot.subplots(
        height, COLUMNS, figsize=(12, 2.5 * height), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        use_logarithms(axes)
        axes.set_title(title, fontsize="small")
        axes.legend(fontsize="x-small")
    figure.supxlabel("image, megapixels")
    figure.supylabel("CPU ms of one thread")
    figure.savefig(file, dpi=80)
    pyplot.close(figure)
    return None


def _collect(
    stages: Sequence[Row], mmdet: Sequence[Row]
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Megapixels and ms of each way, by stage."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}

    def add(stage: str, way: str, row: Row, milliseconds: float) -> None:
        points = panels.setdefault(stage, {}).setdefault(way, [])
        point = row["image_hw"][0] * row["image_hw"][1] / 1e6, milliseconds
        if point not in points:
            points.append(point)

    for row in stages:
        add(row["stage"], OURS, row, row["ours_ms"])
        add(row["stage"], row["other"], row, row["other_ms"])
    for row in mmdet:
        if row["threads"].startswith("one"):
            title = f"NMS to RLE, {row['masks']} masks"
            add(title, OURS, row, row["ours_ms"])
            add(title, "mmdetection", row, row["mmdet_ms"])
    return panels
