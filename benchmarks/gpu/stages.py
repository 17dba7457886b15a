"""Stage times of one engine, images per second end to end, and the limits of the hardware."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.engines import EngineUnderTest
from benchmarks.gpu.subjects import GpuSubject
from benchmarks.harness.rounds import repeat
from pipeline.decode import decode_image
from pipeline.encode import instance_to_coco
from pipeline.postprocess import TileCandidates, postprocess, select
from pipeline.preprocess import prepare
from pipeline.types import Candidates, Prepared
from service.engines.base import collate

Times = dict[str, float]


def time_ms(step: Callable[[], Any], device: str, *, seconds: float) -> Times:
    """Milliseconds of a step and of the device's work: median and quartiles of calls."""

    def run() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    laps = repeat(run, seconds=seconds)
    low, median, high = (1e3 * np.quantile(laps, [0.25, 0.5, 0.75])).round(6).tolist()
    return {"median": median, "q25": low, "q75": high, "calls": len(laps)}


def measure_limits(device: str, *, quick: bool) -> dict[str, float]:
    """Copies from the host and on the device, GB/s, and matrix products, TFLOP/s."""
    n_bytes = (1 << 20) if quick else (1 << 28)
    side = 256 if quick else 8192
    host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=device == "cuda")
    here = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    factors = {
        name: torch.randn(2, side, side, device=device).to(dtype)
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
    }

    def rate(amount: float, step: Callable[[], Any]) -> float:
        best_s = 1e-3 * time_ms(step, device, seconds=0.1 if quick else 1.0)["q25"]
        return float(f"{amount / best_s:.4g}")

    return {
        "copy_h2d_gb_s": rate(n_bytes / 1e9, lambda: here.copy_(host, non_blocking=True)),
        # Read and written: twice the bytes.
        "copy_d2d_gb_s": rate(2 * n_bytes / 1e9, lambda: there.copy_(here)),
        **{
            f"{name}_matrix_tflop_s": rate(2 * side**3 / 1e12, partial(torch.mm, *pair))
            for name, pair in factors.items()
        },
    }


def measure_host_stages(subject: GpuSubject, *, seconds: float) -> dict[str, Any]:
    """What one image costs one core before the engine."""
    image = decode_image(subject.jpeg)
    return {
        "decode_ms": time_ms(lambda: decode_image(subject.jpeg), "cpu", seconds=seconds),
        "prepare_ms": time_ms(lambda: prepare(image, subject.config.input), "cpu", seconds=seconds),
    }


def measure_batch(
    subject: GpuSubject, engine: EngineUnderTest, batch: int, *, seconds: float
) -> dict[str, Any]:
    """Milliseconds of a batch: its copy to the device alone, and the engine call with that copy."""
    device, tiles = engine.backend.device, [subject.tile] * batch
    images = torch.from_numpy(collate(tiles)[0])
    if device == "cuda":
        images = images.pin_memory()
    target = torch.empty_like(images, device=device)
    copy = time_ms(lambda: target.copy_(images, non_blocking=True), device, seconds=seconds)
    infer = time_ms(lambda: engine.backend.infer(tiles), device, seconds=seconds)
    rate = round(1e3 * batch / infer["median"], 2)
    return {"batch": batch, "copy_ms": copy, "infer_ms": infer, "engine_images_per_s": rate}


def measure_postprocess(
    subject: GpuSubject, engine: EngineUnderTest, *, seconds: float
) -> dict[str, Any]:
    """What one image costs after the engine: NMS, if it runs on the host, and the rest."""
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


def finish(subject: GpuSubject, candidates: TileCandidates) -> int:
    """Instances of an image, encoded as in a response; returns their number."""
    shown = subject.tile.window
    prepared = Prepared((shown.height, shown.width), (subject.tile,))
    found = postprocess(prepared, [candidates], subject.config.postprocess).instances
    return len([instance_to_coco(instance, subject.served) for instance in found])


def measure_end_to_end(
    subject: GpuSubject, engine: EngineUnderTest, batch: int, threads: int, *, seconds: float
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

        def run_batches(end_s: float) -> int:
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

        run_batches(0.0)  # warms up
        laps.clear()
        began_s = time.perf_counter()
        ends = [batches.submit(run_batches, began_s + seconds) for _ in range(coordinators)]
        done = sum(end.result() for end in ends)
        took_s = time.perf_counter() - began_s
    return {
        "batch": batch,
        "threads": threads,
        "images": done,
        "images_per_s": round(done / took_s, 2),
        "batch_latency_ms": round(1e3 * sorted(laps)[len(laps) // 2], 2),
    }
