"""report.html of a run: its curves, and predictions beside the ground truth, in one file."""

from __future__ import annotations

import base64
import csv
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipeline.draw import draw_instances
from pipeline.types import Detection
from service.files import replace_text
from training.configs.schema import Config
from training.data.coco import CocoDataset
from training.model.solo import Solo
from training.predictors import CheckpointPredictor
from training.run_log import NOTE

UInt8 = NDArray[np.uint8]
REPORT_FILE = "report.html"
CHARTS = {
    "Loss": ("total", "category", "mask"),
    "Validation": ("val/AP", "val/AP50", "val/AP75"),
    "Learning rate": ("lr",),
}
"""Titles and the metrics of metrics.csv; what a run does not have is left out."""
COLOURS = ("#1668b8", "#c2500c", "#2c8a3d")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 240, 70, 24  # of a chart and its margins, px
_POINTS = 1000  # of a curve; longer ones are thinned out
_SIDE = 400  # longer side of a picture, px
_PICTURES, _MOST_DRAWN = 4, 100  # pictures of a report, and instances of one
_STYLE = (
    "body{font:15px sans-serif;margin:2em auto;max-width:900px;padding:0 1em}"
    "img,svg{max-width:100%;height:auto}figure{margin:1em 0}text{font:12px sans-serif}"
)


@dataclass(frozen=True)
class Picture:
    """An image [H, W, 3] RGB with predictions, and the same with the ground truth."""

    name: str
    predicted: UInt8
    truth: UInt8


Pictures = Callable[[Solo, Config], list[Picture]]


def build_pictures(data: CocoDataset) -> Pictures:
    """Draws the same images of a split each time, spread over those that have objects."""
    indices = [i for i, record in enumerate(data.records) if record.objects]
    places = np.linspace(0, len(indices) - 1, min(_PICTURES, len(indices))).astype(int)
    chosen = [indices[place] for place in places]

    def draw(model: Solo, config: Config) -> list[Picture]:
        predictor = CheckpointPredictor(model, config, max_dets=_MOST_DRAWN)
        pictures = []
        for index in chosen:
            image = data.image(index)
            found = [
                _detection(data.labels[r["category_id"]], r["score"], r["segmentation"])
                for r in predictor(data.image_bytes(index))
                if r["score"] >= config.postprocess.score_threshold
            ]
            truth = [_detection(a.label, 1.0, a.rle) for a in data.records[index].annotations]
            name = data.records[index].file_name
            pictures.append(
                Picture(name, draw_instances(image, found), draw_instances(image, truth))
            )
        return pictures

    return draw


def _detection(label: int, score: float, rle: Mapping[str, object]) -> Detection:
    counts = rle["counts"]
    encoded = {**rle, "counts": counts.encode() if isinstance(counts, str) else counts}
    x, y, w, h = (int(v) for v in coco_mask.toBbox(encoded))
    return Detection(label, score, encoded, (x, y, w, h), int(coco_mask.area(encoded)))


def describe_left(seconds: float | None) -> str:
    """The remaining time of a run in words."""
    if seconds is None:
        return "time left unknown"
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s left"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min left" if hours else f"{minutes} min left"


def read_metrics(path: Path) -> tuple[dict[str, list[tuple[int, float]]], list[tuple[int, str]]]:
    """The curves (step, value) by name and the notes (step, text) of a metrics.csv."""
    curves: dict[str, list[tuple[int, float]]] = {}
    notes = []
    with path.open(newline="") as file:
        for step, name, value in list(csv.reader(file))[1:]:
            if name == NOTE:
                notes.append((int(step), value))
            else:
                curves.setdefault(name, []).append((int(step), float(value)))
    return curves, notes


def draw_chart(title: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """An SVG line chart; empty if no curve has a finite value."""
    finite = {
        name: [(step, value) for step, value in points if np.isfinite(value)]
        for name, points in curves.items()
    }
    points = [point for curve in finite.values() for point in curve]
    if not points:
        return ""
    first, last = min(p[0] for p in points), max(p[0] for p in points)
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    right, bottom = _WIDTH - 10, _HEIGHT - _BOTTOM
    parts = [
        f'<rect x="{_LEFT}" y="10" width="{right - _LEFT}" height="{bottom - 10}" fill="none" '
        'stroke="#999"/>',
        f'<text x="4" y="20">{high:.4g}</text><text x="4" y="{bottom}">{low:.4g}</text>',
        f'<text x="{_LEFT}" y="{_HEIGHT - 6}">step {first}</text>',
        f'<text x="{right}" y="{_HEIGHT - 6}" text-anchor="end">step {last}</text>',
    ]
    shown = [item for item in finite.items() if item[1]]
    for place, ((name, curve), colour) in enumerate(zip(shown, COLOURS, strict=False)):
        thin = curve[:: -(-len(curve) // _POINTS)]
        thin += curve[-1:] if thin[-1] != curve[-1] else []
        line = " ".join(
            f"{_LEFT + (s - first) / max(last - first, 1) * (right - _LEFT):.1f},"
            f"{bottom - (v - low) / ((high - low) or 1) * (bottom - 10):.1f}"
            for s, v in thin
        )
        x, y = line.split()[-1].split(",")
        label = f"{html.escape(name)} {curve[-1][1]:.4g}"
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>'
            f'<text x="{right - 6}" y="{26 + 16 * place}" text-anchor="end" fill="{colour}">'
            f"{label}</text>"
        )
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">'
    return f"<h2>{html.escape(title)}</h2>{head}{''.join(parts)}</svg>"


def _embed(image: UInt8) -> str:
    scale = min(1.0, _SIDE / max(image.shape[:2]))
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR))[1].tobytes()
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'


def write_report(folder: Path, title: str, state: str, pictures: Sequence[Picture]) -> Path:
    """Writes report.html from metrics.csv in one step; it loads nothing from elsewhere.

    Args:
        folder: Folder of the run.
        title: Name of the configuration.
        state: A line on how far the run is.
        pictures: The predictions of the last validation.
    """
    curves, notes = read_metrics(folder / "metrics.csv")
    charts = [
        draw_chart(name, {metric: curves[metric] for metric in metrics if metric in curves})
        for name, metrics in CHARTS.items()
    ]
    events = [f"<li>step {step}: {html.escape(text)}</li>" for step, text in notes]
    figures = [
        f"<figure>{_embed(p.predicted)} {_embed(p.truth)}"
        f"<figcaption>{html.escape(p.name)}: predictions, ground truth</figcaption></figure>"
        for p in pictures
    ]
    content = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(state)}</p>"
        + (f"<ul>{''.join(events)}</ul>" if events else "")
        + "".join(charts)
        + (f"<h2>Predictions</h2>{''.join(figures)}" if figures else "")
        + "</html>\n"
    )
    path = folder / REPORT_FILE
    replace_text(path, content)
    return path
