"""The bare loop in one thread: python -m benchmarks.sides.bare MODEL IMAGES; a line is seconds."""

import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.cases.bare import run_bare_loop
from benchmarks.harness.rounds import answer_lines
from benchmarks.inputs import read_images
from benchmarks.ours import load_model

if __name__ == "__main__":
    model, bodies = load_model(Path(sys.argv[1])), read_images(Path(sys.argv[2]))
    answer_lines(lambda line: asdict(run_bare_loop(model, bodies, threads=1, seconds=float(line))))
