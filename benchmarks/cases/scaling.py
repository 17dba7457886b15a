"""The cost of an image over its size, its instances, the batch, the clients and the models.

Prints each curve (medians over the rounds) and where its costs bend. The exponent of a curve is the
slope of its logarithms: 0 where the cost stays, 1 where it is proportional. A bend is the inner
point before and after which the exponents differ most. The points of a curve take turns. Times of
an image are CPU time of one thread; clients ask a server with its default settings in a closed loop
from the same machine.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import cv2
import numpy as np

from benchmarks.harness.plots import Panel
from benchmarks.harness.report import Report, Row
from benchmarks.harness.rounds import Samples, take_turns
from benchmarks.harness.server import Server, measure_load, require_success, serve_ours
from benchmarks.inputs import NUCLEI, NUCLEI_IMAGE
from benchmarks.scaling_image import (
    Costs,
    Points,
    plan_batch,
    plan_canvas,
    plan_instances,
    plan_tiles,
)
from pipeline.decode import decode_image
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.slow_model import ONE_CANVAS

LEAST_CHANGE = 0.5
"""Of the exponent; less is not called a bend."""
CLIENTS = (1, 2, 4, 8, 16, 32, 64)
MODELS = (1, 2, 4, 8, 16)
MODEL_CLIENTS = 16
"""Shared evenly by the models."""
Topic = Literal["size", "instances", "batch", "clients", "models"]


class Bend(NamedTuple):
    """Where a curve bends: its exponents from the first point to this and from this to the last."""

    at: float
    before: float
    after: float


@dataclass(frozen=True)
class Curve:
    """Measured costs.

    Attributes:
        title: Of the curve.
        unit: Of its horizontal axis.
        samples: A variant for each place on that axis.
    """

    title: str
    unit: str
    samples: Samples

    @property
    def places(self) -> list[float]:
        """On the horizontal axis, ascending."""
        return [float(place) for place in self.samples.values]

    @property
    def costs(self) -> dict[str, list[float]]:
        """Medians by cost, one for each place."""
        rows = [self.samples.medians(place) for place in self.samples.values]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def find_bends(self) -> dict[str, Bend]:
        """By cost, where it bends, if it does."""
        found = {name: find_bend(self.places, costs) for name, costs in self.costs.items()}
        return {name: bend for name, bend in found.items() if bend is not None}


def scaling(
    *,
    curves: Annotated[tuple[Topic, ...], "what is varied"] = (
        *("size", "instances"),
        *("batch", "clients", "models"),
    ),
    model: Annotated[Path, "folder of the model"] = NUCLEI,
    picture: Annotated[Path, "an image for it"] = NUCLEI_IMAGE,
    rounds: Annotated[int, "that count"] = 3,
    seconds: Annotated[float, "of each load on a server"] = 1.5,
) -> Report:
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as scratch:
        found = [
            *measure_image(curves, model, picture, rounds),
            *measure_servers(curves, model, picture, rounds, seconds, Path(scratch)),
        ]
    notes = [
        f"{curve.title}: {cost} bends at {bend.at:.3g} {curve.unit}: exponent {bend.before:.2f} "
        f"before, {bend.after:.2f} after"
        for curve in found
        for cost, bend in curve.find_bends().items()
    ]
    data: list[dict[str, Any]] = [
        {
            "title": curve.title,
            "unit": curve.unit,
            "values": curve.samples.values,
            "bends": {cost: bend._asdict() for cost, bend in curve.find_bends().items()},
        }
        for curve in found
    ]
    tables = {curve.title: build_rows(curve) for curve in found}
    return Report(
        data={"curves": data}, tables=tables, notes=notes, panels=[build_panel(c) for c in found]
    )


def measure(
    title: str,
    unit: str,
    points: Mapping[float, Callable[[], Mapping[str, float]]],
    rounds: int,
    warm_ups: int = 1,
) -> Curve:
    """Measures the points of a curve in turns."""
    variants = {f"{place:g}": points[place] for place in sorted(points)}
    return Curve(title, unit, take_turns(variants, rounds, warm_ups=warm_ups))


def find_bend(places: Sequence[float], costs: Sequence[float]) -> Bend | None:
    """The bend of a curve; None if the exponents differ by less than `LEAST_CHANGE` everywhere, or
    a cost is not above 0."""
    if min(costs) <= 0:
        return None

    def exponent(first: int, last: int) -> float:
        return math.log(costs[last] / costs[first]) / math.log(places[last] / places[first])

    end = len(places) - 1
    bends = [Bend(places[i], exponent(0, i), exponent(i, end)) for i in range(1, end)]
    sharpest = max(bends, key=lambda bend: abs(bend.after - bend.before), default=None)
    if sharpest is None or abs(sharpest.after - sharpest.before) < LEAST_CHANGE:
        return None
    return sharpest


def measure_image(
    topics: Sequence[str], model: Path, picture: Path, rounds: int
) -> Iterator[Curve]:
    """The curves of an image in this process."""
    if "size" in topics:
        title = "Image size, tiles (the bundled model)"
        yield measure(title, "megapixels", plan_tiles(model, picture), rounds)
        title = "Image size, one canvas of 800 px, 100 instances"
        yield measure(title, "megapixels", plan_canvas(), rounds)
    if "instances" in topics:
        yield measure("Instances, in 1920x1080 px", "instances", plan_instances(), rounds)
    if "batch" in topics:
        title = "Batch (the bundled model)"
        yield measure(title, "canvases", plan_batch(model, picture), rounds)


def measure_servers(
    topics: Sequence[str], model: Path, picture: Path, rounds: int, seconds: float, scratch: Path
) -> Iterator[Curve]:
    """The curves of servers."""
    pixels = decode_image(picture.read_bytes())
    one_tile = encode_picture(np.ascontiguousarray(pixels[:144, :144]), "JPEG")
    if "clients" in topics:
        tiny = publish(scratch / "tiny", input=ONE_CANVAS)
        served = {
            "a tiny model": (tiny.parent, encode_picture(draw_picture(256, 256), "JPEG")),
            "one tile of the bundled model": (model.parent, one_tile),
        }
        for name, (repository, body) in served.items():
            flags = "--model-repo", f"{repository}", "--device", "cpu"
            with serve_ours(scratch / "server.log", *flags) as server:
                points: Points = {
                    n: partial(load_server, server, body, n, seconds) for n in CLIENTS
                }
                yield measure(f"Clients, {name}", "clients", points, rounds)
    if "models" in topics:
        title = f"Models (copies of the bundled one, {MODEL_CLIENTS} clients)"
        plan = plan_models(model, scratch, one_tile, seconds)
        yield measure(title, "models", plan, rounds, warm_ups=0)  # a new process each time


def load_server(
    server: Server,
    body: bytes,
    clients: int,
    seconds: float,
    paths: Sequence[str] = ("/segment",),
) -> Costs:
    """A closed loop of clients, shared evenly by the paths."""
    costs = measure_load(server, [body], clients=clients, seconds=seconds, paths=paths)
    require_success(costs, server)
    return {
        "images/s": costs["images_per_s"],
        "p50, ms": costs["p50_ms"],
        "p95, ms": costs["p95_ms"],
        "CPU ms a request": costs["cpu_ms_per_image"],
        "memory, MB": costs["peak_memory_mb"],
    }


def plan_models(model: Path, scratch: Path, body: bytes, seconds: float) -> Points:
    """For each number of models, a new server with as many copies of one."""

    def run(count: int) -> Costs:
        repository = scratch / f"models-{count}"
        names = [f"{model.name}-{index}" for index in range(count)]
        if not repository.exists():
            copy_model(model, repository, names)
        began_s = time.monotonic()
        flags = "--model-repo", f"{repository}", "--device", "cpu"
        with serve_ours(scratch / f"models-{count}.log", *flags) as server:
            start_s = time.monotonic() - began_s
            paths = [f"/segment?model={name}" for name in names]
            return {"start, s": start_s, **load_server(server, body, MODEL_CLIENTS, seconds, paths)}

    return {count: partial(run, count) for count in MODELS}


def copy_model(folder: Path, repository: Path, names: Sequence[str]) -> None:
    """Copies of a model under other names."""
    for name in names:
        shutil.copytree(folder, repository / name)
        file = repository / name / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**config, "name": name}), encoding="utf-8")


def build_rows(curve: Curve) -> list[Row]:
    """A row for each place: medians, with ranges where there are several rounds."""

    def show(values: Sequence[float]) -> str:
        low, middle, high = (f"{v:.3g}" for v in np.percentile(values, [0, 50, 100]))
        return middle if len(values) == 1 else f"{middle} ({low}-{high})"

    return [
        {curve.unit: place, **{cost: show(values) for cost, values in costs.items()}}
        for place, costs in curve.samples.values.items()
    ]


def build_panel(curve: Curve) -> Panel:
    """Medians over the places; a ring marks a bend."""
    lines = {
        name: list(zip(curve.places, costs, strict=True)) for name, costs in curve.costs.items()
    }
    rings = {
        name: [point for point in lines[name] if point[0] == bend.at]
        for name, bend in curve.find_bends().items()
    }
    return Panel(title=curve.title, x=curve.unit, lines=lines, rings=rings, log="xy")
