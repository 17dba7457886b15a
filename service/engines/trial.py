"""Times engines on the CPU with a model's canvases and remembers the result.

    <cache>/engine-times/<digest of the key>.json    the key in full, seconds by candidate

The key is all that decides the times: processor, graphs, versions. Candidates run one call of one
thread, whatever is asked for, so that a server and `solo-predict` choose the same precision on a
machine. Without a folder that can be written, times are remembered until the process ends.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.model_config import InputSpec, ModelConfig
from pipeline.preprocess import prepare
from pipeline.types import Tile, UInt8
from service.engines.artefacts import read_file
from service.engines.base import Backend, BackendOptions
from service.engines.cpu import read_cpu
from service.engines.local_cache import find_local_cache, lock_file
from service.files import replace_bytes

logger = logging.getLogger(__name__)

BASELINE = "onnxruntime fp32"
GAIN = 0.95
"""Of the baseline's time; a candidate that takes more does not replace it."""
SECONDS = 1.0
"""For which each candidate is timed."""
MIN_ROUNDS, MAX_ROUNDS = 1, 200
"""Rounds that count; one before them warms up."""
TILES = 2
PICTURE_HW = (480, 640)
MAX_RECORD_BYTES = 1 << 16
PACKAGES = ("onnxruntime", "openvino", "solo-serve")


class Candidate(NamedTuple):
    """An engine that may be chosen: engine and precision, its graph, and how it is built."""

    name: str
    file: str
    build: Callable[[], Backend]


class TrialKey(BaseModel):
    """What the times depend on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str
    isa: str
    packages: dict[str, str]
    graphs: dict[str, str]
    input: InputSpec

    @property
    def digest(self) -> str:
        """Name of the record."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:32]


class TrialRecord(BaseModel):
    """Seconds of a canvas by candidate; those that failed are missing."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    key: TrialKey
    seconds: dict[str, float] = Field(default_factory=dict)


_remembered: dict[str, TrialRecord] = {}


def measure_candidates(
    candidates: Sequence[Candidate], options: BackendOptions, config: ModelConfig
) -> Mapping[str, float]:
    """Seconds of a canvas by candidate; those that fail are missing.

    Args:
        candidates: The baseline, and others.
        options: Where the times are stored.
        config: The model's.
    """
    key = build_key(candidates, config)
    folder = find_local_cache(options.cache)
    file = None if folder is None else folder / "engine-times" / f"{key.digest}.json"
    with lock_file(file):  # worker processes that start together: one measures, undisturbed
        record = _remembered.get(key.digest) or _read(file, key)
        if record is None:
            record = TrialRecord(key=key, seconds=_measure(candidates, config))
            if BASELINE in record.seconds:
                _write(file, record)
        _remembered[key.digest] = record
    return record.seconds


def rank(seconds: Mapping[str, float]) -> list[str]:
    """What is clearly faster than the baseline, fastest first, and then the baseline."""
    limit = GAIN * seconds.get(BASELINE, math.inf)
    faster = sorted((s, name) for name, s in seconds.items() if s < limit and name != BASELINE)
    return [*(name for _, name in faster), BASELINE]


def use_one_thread(options: BackendOptions) -> BackendOptions:
    """The options of an engine that is timed."""
    return replace(options, threads=1, slots=1, divide="none")


def build_key(candidates: Sequence[Candidate], config: ModelConfig) -> TrialKey:
    """The key of a trial on this machine."""
    name, flags = read_cpu()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    return TrialKey(
        cpu=f"{platform.machine()} {name}".strip(),
        isa=hashlib.sha256(f"{flags} {limit}".encode()).hexdigest(),
        packages={name: found for name in PACKAGES if (found := _find_version(name))},
        graphs={c.name: config.files[c.file].sha256 for c in candidates},
        input=config.input,
    )


def _find_version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def draw_picture(height: int, width: int) -> UInt8:
    """Bright discs of many sizes on noise, so that engines do not leave the graph early.

    Returns:
        [H, W, 3] uint8.
    """
    random = np.random.default_rng(0)
    picture = random.normal(60, 12, (height, width)).astype(np.float32)
    for _ in range(height * width // 1500):
        centre = (int(random.integers(width)), int(random.integers(height)))
        radius, grey = int(random.integers(4, 24)), float(random.integers(100, 240))
        cv2.circle(picture, centre, radius, grey, thickness=cv2.FILLED)
    return np.repeat(picture.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def _measure(candidates: Sequence[Candidate], config: ModelConfig) -> dict[str, float]:
    """Least seconds of a canvas; every round times each candidate once."""
    tiles = list(prepare(draw_picture(*PICTURE_HW), config.input).tiles)[:TILES]
    running: dict[str, Backend] = {}
    try:
        for candidate in candidates:
            try:
                backend = candidate.build()
            except Exception as error:  # it is built again, and its error shown, when it is taken
                logger.info("%s is not timed: %s", candidate.name, error)
            else:
                running[candidate.name] = backend
        return _take_turns(running, tiles)
    finally:
        for backend in running.values():
            backend.close()


def _take_turns(running: Mapping[str, Backend], tiles: Sequence[Tile]) -> dict[str, float]:
    best = dict.fromkeys(running, math.inf)
    deadline_s = time.monotonic() + SECONDS * len(running)
    for number in range(MAX_ROUNDS):
        if number > MIN_ROUNDS and time.monotonic() > deadline_s:
            break
        for name in list(best):
            try:
                seconds = _time(running[name], tiles)
            except Exception as error:  # as above
                logger.info("%s is not timed: %s", name, error)
                del best[name]
            else:
                if number:  # the first round warms up
                    best[name] = min(seconds, best[name])
    return best


def _time(backend: Backend, tiles: Sequence[Tile]) -> float:
    start_s = time.perf_counter()
    for tile in tiles:
        backend.infer([tile])
    return (time.perf_counter() - start_s) / len(tiles)


def _read(file: Path | None, key: TrialKey) -> TrialRecord | None:
    if file is None:
        return None
    try:
        record = TrialRecord.model_validate_json(read_file(file, MAX_RECORD_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        logger.warning("engines are timed again, %s is not valid: %s", file, error)
        return None
    return record if record.key == key else None


def _write(file: Path | None, record: TrialRecord) -> None:
    if file is None:
        return
    try:
        replace_bytes(file, record.model_dump_json(indent=2).encode(), shared=True)
    except OSError as error:
        logger.info("the times of the engines are not stored: %s", error)
