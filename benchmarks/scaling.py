"""What an image costs over its size, its instances, the batch, the clients and the models.

    python -m benchmarks.scaling --out benchmarks/results/scaling.json --plot scaling.svg

Prints a table for each curve, medians over the rounds with their quartiles, and where its costs
bend (`benchmarks/scaling_curve.py` says what that is). The points of a curve are measured in turns.
Times in this process are CPU time of one thread. Clients ask a server with its default settings in
a closed loop from the same machine; what they cost it is in its wall times.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np

from benchmarks.report import describe_machine, markdown_table, this_command, write_report
from benchmarks.scaling_curve import Curve, measure
from benchmarks.scaling_image import (
    load_model,
    plan_batch,
    plan_canvas,
    plan_instances,
    plan_tiles,
)
from benchmarks.scaling_plot import plot_curves
from benchmarks.scaling_server import plan_clients, plan_models
from pipeline.decode import decode_image
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.server import run_server
from tests.support.slow_model import ONE_CANVAS

TOPICS = ("size", "instances", "batch", "clients", "models")


def measure_image(options: argparse.Namespace) -> Iterator[Curve]:
    """The curves of this process."""
    if "size" in options.curves:
        model = load_model(options.model)
        yield measure(plan_tiles(model, options.picture), options.rounds)
        model.backend.close()
        yield measure(plan_canvas(), options.rounds)
    if "instances" in options.curves:
        yield measure(plan_instances(), options.rounds)
    if "batch" in options.curves:
        yield measure(plan_batch(options.model, options.picture), options.rounds)


def measure_servers(options: argparse.Namespace, scratch: Path) -> Iterator[Curve]:
    """The curves of servers."""
    pixels = decode_image(options.picture.read_bytes())
    one_tile = encode_picture(np.ascontiguousarray(pixels[:144, :144]), "JPEG")
    if "clients" in options.curves:
        tiny = publish(scratch / "tiny", input=ONE_CANVAS)
        served = {
            "a tiny model": (tiny.parent, encode_picture(draw_picture(256, 256), "JPEG")),
            "one tile of the bundled model": (options.model.parent, one_tile),
        }
        for name, (repository, body) in served.items():
            flags = "--model-repo", f"{repository}", "--device", "cpu"
            with run_server(scratch / "server.log", *flags) as server:
                plan = plan_clients(name, server.url, body, options.seconds)
                yield measure(plan, options.rounds)
    if "models" in options.curves:
        plan = plan_models(options.model, scratch, one_tile, options.seconds)
        yield measure(plan, options.rounds, warm_ups=0)  # each time a new process


def print_curve(curve: Curve) -> None:
    """Its table and its bends."""
    print(f"\n**{curve.name}**\n\n{markdown_table(curve.rows())}\n")
    for cost, bend in curve.find_bends().items():
        print(
            f"- {cost} bends at {bend.at:.3g} {curve.unit}: exponent {bend.before:.2f} before, "
            f"{bend.after:.2f} after"
        )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--curves", nargs="+", choices=TOPICS, default=list(TOPICS))
    parser.add_argument("--model", type=Path, default=Path("model_repo/nuclei"))
    parser.add_argument(
        "--picture", type=Path, default=Path("tests/data/nuclei/images/9bb6e39d5f4415bc.jpg")
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each load on a server")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="picture to draw, .svg or .png")
    return parser


def main() -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args()
    cv2.setNumThreads(1)
    curves: list[Curve] = []
    with tempfile.TemporaryDirectory() as scratch:
        for source in (measure_image(options), measure_servers(options, Path(scratch))):
            for curve in source:
                print_curve(curve)
                curves.append(curve)
    if options.out:
        rows = [
            {**asdict(curve), "bends": {c: b._asdict() for c, b in curve.find_bends().items()}}
            for curve in curves
        ]
        payload = {"machine": describe_machine(), "curves": rows}
        write_report(options.out, this_command("benchmarks.scaling"), payload)
    if options.plot:
        print(plot_curves(curves, options.plot) or f"drawn: {options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
