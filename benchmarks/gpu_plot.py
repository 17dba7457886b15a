"""Images per second over the batch size, as benchmarks/gpu.py measured them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.plot import NO_PLOT, load_pyplot


def plot_rates(report: dict[str, Any], file: Path) -> str | None:
    """Draws the engine's and the whole way's rates, one panel for each model.

    Returns:
        Why there is no picture, None if there is one.
    """
    pyplot = load_pyplot()
    if pyplot is None:
        return NO_PLOT
    models = list(dict.fromkeys(row["model"] for row in report["rows"]))
    if not models:
        return "no plot: nothing was measured"
    width = min(4, len(models))
    height = -(-len(models) // width)
    figure, panels = pyplot.subplots(
        height, width, figsize=(4 * width, 3.2 * height), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(models) :]:
        panel.set_axis_off()
    for panel, model in zip(panels.flat, models, strict=False):
        _draw_model(panel, model, report)
    figure.suptitle(f"{report['machine']['device']}: images/s (solid: engine, x: end to end)")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return None


def _draw_model(panel: Any, model: str, report: dict[str, Any]) -> None:
    for row in report["rows"]:
        if row["model"] != model:
            continue
        measured = [entry for entry in row["batches"] if "error" not in entry]
        batches = [entry["batch"] for entry in measured]
        rates = [entry["engine_images_per_s"] for entry in measured]
        label = f"{row['engine']} {row['precision']}"
        (line,) = panel.plot(batches, rates, marker="o", markersize=3, label=label)
        for entry in row.get("end_to_end", []):
            panel.plot(entry["batch"], entry["images_per_s"], "x", color=line.get_color())
    paper = report["paper_v100_fps"].get(model)
    if paper:
        panel.axhline(paper, color="grey", linestyle=":", label="paper, V100")
    panel.set(title=model, xlabel="batch", xscale="log")
    panel.set_ylim(bottom=0)
    panel.legend(fontsize="small")
