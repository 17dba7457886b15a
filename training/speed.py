"""Images per second of a network as the paper measures them (table 6); time of a training step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from itertools import islice
from statistics import median

import torch

from training import distributed
from training.termination import Interrupted, Terminated
from training.trainer import Trainer

MAX_IMAGES = 50
MAX_SECONDS = 20.0
STEPS = 3


def measure_fps(predict: Callable[[bytes], object], images: list[bytes]) -> float:
    """Images per second from the encoded file to the instances; the median of up to 50 images.

    Args:
        predict: Returns only when its device has finished.
        images: Encoded files, at least one; the first one is not measured if there are others.
    """
    predict(images[0])
    seconds: list[float] = []
    started = time.perf_counter()
    for image in islice(images[1:] or images, MAX_IMAGES):
        before = time.perf_counter()
        predict(image)
        now = time.perf_counter()
        seconds.append(now - before)
        if now - started > MAX_SECONDS:
            break
    return 1 / median(seconds)


def measure_step(trainer: Trainer) -> float:
    """Median time of `STEPS` steps with their data, s, after one that is not counted.

    Changes the weights.

    Raises:
        Terminated: A process received SIGTERM.
    """
    times: list[float] = []
    trainer.model.train()
    try:
        with (
            trainer.termination as termination,
            termination.shared(),
            contextlib.closing(trainer.batches()) as batches,
        ):
            while len(times) <= STEPS:
                started = time.monotonic()
                step = next(batches, None)
                if step is None:
                    break
                trainer.train_step(*step)
                times.append(time.monotonic() - started)
                if any(distributed.any_process(termination.received)):
                    raise Interrupted
    except Interrupted:
        raise Terminated("stopped by SIGTERM while a step was timed") from None
    return median(times[1:] or times)


def device_name(device: str) -> str:
    """The GPU's name, or `CPU (n threads)`."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"
