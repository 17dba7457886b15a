"""python -m benchmarks: where the time of one image goes, without HTTP and without company.

Prints, for each image size, the median and the 95th percentile of every stage in milliseconds. The
threads of the engine and the machine are part of the answer: say both where the numbers are quoted.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from service.backends.base import BackendOptions
from service.cores import count_cores
from service.pipeline.decode import decode_image
from service.pipeline.encode import instance_to_coco
from service.pipeline.postprocess import postprocess
from service.pipeline.preprocess import prepare
from service.pipeline.types import Candidates
from service.registry import LoadedModel, infer_tiles, load_version

STAGES = ("decode", "prepare", "infer", "postprocess", "encode", "total")
Times = dict[str, list[float]]


def measure_image(model: LoadedModel, data: bytes, times: Times) -> tuple[int, int]:
    """Sends one file through all stages and notes the seconds of each.

    Returns:
        Height and width of the image.
    """
    marks = [time.perf_counter()]
    image = decode_image(data)
    marks.append(time.perf_counter())
    prepared = prepare(image, model.config.input)
    marks.append(time.perf_counter())
    candidates: list[Candidates] = []
    step = model.config.limits.max_batch
    for start in range(0, len(prepared.tiles), step):
        candidates += infer_tiles(model.backend, prepared.tiles[start : start + step])
    marks.append(time.perf_counter())
    instances = postprocess(prepared, candidates, model.config.postprocess)
    marks.append(time.perf_counter())
    for instance in instances:
        instance_to_coco(instance, model.config, masks="rle")
    marks.append(time.perf_counter())
    for stage, seconds in zip(STAGES, [*np.diff(marks), marks[-1] - marks[0]], strict=True):
        times[stage].append(float(seconds))
    times["instances"].append(len(instances))
    return image.shape[0], image.shape[1]


def measure(model: LoadedModel, files: list[Path], repeats: int) -> dict[tuple[int, int], Times]:
    """All files `repeats` times after one run that does not count; grouped by image size."""
    by_size: dict[tuple[int, int], Times] = defaultdict(lambda: defaultdict(list))
    for file in files:
        data = file.read_bytes()
        size = measure_image(model, data, defaultdict(list))
        for _ in range(repeats):
            measure_image(model, data, by_size[size])
    return by_size


def print_table(by_size: dict[tuple[int, int], Times]) -> None:
    """One row for each size and stage."""
    print("| image | instances | stage | median ms | p95 ms |\n| --- | --- | --- | --- | --- |")
    for (height, width), times in sorted(by_size.items()):
        instances = f"{np.mean(times['instances']):.0f}"
        for stage in STAGES:
            median, p95 = np.percentile(times[stage], (50, 95)) * 1000
            row = (f"{width}x{height}", instances, stage, f"{median:.1f}", f"{p95:.1f}")
            print("| " + " | ".join(row) + " |")


def main() -> int:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("model_repo/nuclei"))
    parser.add_argument("--images", type=Path, default=Path("tests/data/nuclei/images"))
    parser.add_argument("--repeats", type=int, default=10, help="runs of each image (default 10)")
    parser.add_argument("--threads", type=int, default=count_cores(), help="of the engine")
    args = parser.parse_args()
    files = sorted(path for path in args.images.iterdir() if path.is_file())
    if not files:
        parser.error(f"no files in {args.images}")
    model = load_version(args.model, options=BackendOptions(device="cpu", threads=args.threads))
    print(
        f"{model.config.name} version {model.version} on {model.backend.name}, "
        f"{args.threads} threads, {platform.machine()}, Python {platform.python_version()}, "
        f"{len(files)} files x {args.repeats}\n"
    )
    print_table(measure(model, files, args.repeats))
    model.backend.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
