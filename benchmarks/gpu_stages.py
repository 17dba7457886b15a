"""Stage times of one engine, and images per second from JPEG bytes to run lengths."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.gpu_engines import Engine
from benchmarks.gpu_models import Subject
from benchmarks.gpu_timing import time_ms
from pipeline.decode import decode_image
from pipeline.encode import instance_to_coco
from pipeline.postprocess import TileCandidates, postprocess, select
from pipeline.preprocess import prepare
from pipeline.types import Candidates, Prepared
from service.engines.base import collate


def measure_host_stages(subject: Subject, *, seconds: float) -> dict[str, Any]:
    """What one image costs one core before the engine."""
    image = decode_image(subject.jpeg)
    return {
        "decode_ms": time_ms(lambda: decode_image(subject.jpeg), "cpu", seconds=seconds),
        "prepare_ms": time_ms(lambda: prepare(image, subject.config.input), "cpu", seconds=seconds),
    }


def measure_batch(
    subject: Subject, engine: Engine, batch: int, *, seconds: float
) -> dict[str, Any]:
    """Stage times of one batch size; `copy`, `engine` and `infer` are of the whole batch."""
    device, tiles = engine.backend.device, [subject.tile] * batch
    images = torch.from_numpy(collate(tiles)[0])
    if device == "cuda":
        images = images.pin_memory()
    target = torch.empty_like(images, device=device)
    copy = time_ms(lambda: target.copy_(images, non_blocking=True), device, seconds=seconds)
    infer = time_ms(lambda: engine.backend.infer(tiles), device, seconds=seconds)
    row: dict[str, Any] = {"batch": batch, "copy_ms": copy, "engine_ms": None, "infer_ms": infer}
    if engine.prepare_compute is not None:
        row["engine_ms"] = time_ms(engine.prepare_compute(tiles), device, seconds=seconds)
    alone = row["engine_ms"] or infer
    row["engine_images_per_s"] = round(1e3 * batch / alone["median"], 2)
    return row


def measure_postprocess(subject: Subject, engine: Engine, *, seconds: float) -> dict[str, Any]:
    """What one image costs after the engine: NMS on the host, where it is there, and the rest."""
    (candidates,) = engine.backend.infer([subject.tile])
    spec = subject.config.postprocess
    row: dict[str, Any] = {"nms_ms": None, "on_device": not isinstance(candidates, Candidates)}
    if isinstance(candidates, Candidates):
        row["nms_ms"] = time_ms(lambda: select(candidates, spec), "cpu", seconds=seconds)
    whole = time_ms(lambda: finish(subject, candidates), engine.backend.device, seconds=seconds)
    nms = row["nms_ms"]["median"] if row["nms_ms"] else 0.0
    row["nms_and_rle_ms"] = whole
    row["rle_ms"] = round(whole["median"] - nms, 4)
    row["instances"] = finish(subject, candidates)
    return row


def finish(subject: Subject, candidates: TileCandidates) -> int:
    """Instances of an image, encoded as a response has them; returns their number."""
    shown = subject.tile.window
    prepared = Prepared((shown.height, shown.width), (subject.tile,))
    found = postprocess(prepared, [candidates], subject.config.postprocess)
    return len([instance_to_coco(instance, subject.served) for instance in found])


def measure_end_to_end(
    subject: Subject, engine: Engine, batch: int, threads: int, *, seconds: float
) -> dict[str, Any]:
    """Images per second from JPEG bytes to run lengths.

    Batches overlap: while `backend.concurrency` of them are in the engine, others are decoded and
    post-processed by `threads` threads.
    """
    gate = threading.Semaphore(engine.backend.concurrency)
    coordinators = engine.backend.concurrency + 2
    laps: list[float] = []

    def load() -> Any:
        return prepare(decode_image(subject.jpeg), subject.config.input).tiles[0]

    with (
        ThreadPoolExecutor(threads, thread_name_prefix="work") as workers,
        ThreadPoolExecutor(coordinators, thread_name_prefix="batch") as batches,
    ):

        def run_batch(end_s: float) -> int:
            done = 0
            while True:
                began_s = time.perf_counter()
                tiles = list(workers.map(lambda _: load(), range(batch)))
                with gate:
                    found: Sequence[TileCandidates] = engine.backend.infer(tiles)
                list(workers.map(lambda one: finish(subject, one), found))
                laps.append(time.perf_counter() - began_s)
                done += batch
                if time.perf_counter() > end_s:
                    return done

        run_batch(0.0)  # warms up
        laps.clear()
        began_s = time.perf_counter()
        ends = [batches.submit(run_batch, began_s + seconds) for _ in range(coordinators)]
        done = sum(end.result() for end in ends)
        took_s = time.perf_counter() - began_s
    return {
        "batch": batch,
        "threads": threads,
        "images": done,
        "images_per_s": round(done / took_s, 2),
        "batch_latency_ms": round(1e3 * sorted(laps)[len(laps) // 2], 2),
    }
