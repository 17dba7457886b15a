"""Runs that are killed, asked to stop, or left by one of their processes."""

from __future__ import annotations

import csv
import io
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.processes import finish, signal_groups, start_python, wait_until
from tests.support.shared_training import CHECKPOINT_EVERY, train_long
from tests.support.tiny import (
    CLASSES,
    annotation_of,
    build_tiny_data,
    disc,
    write_image,
    write_split,
)
from training.termination import TERMINATED_STATUS
from training.weights.formats import load_checkpoint

SMALL = [
    "model.backbone.base_width=8",
    "model.neck_channels=16",
    "model.head.channels=16",
    "model.head.num_convs=1",
    "model.head.norm_groups=4",
    "model.head.num_grids=[8,4,2]",
    "model.candidates=20",
    "input.resize.scale=1",
    "input.resize.tile_hw=[64,64]",
    "input.resize.overlap_px=16",
    "schedule.batch_size=2",
    "schedule.epochs=100000",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Bit-equal sums need the same number of threads as the processes have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def long_run(root: Path, out: Path) -> list[str]:
    return ["-m", "tests.support.shared_training", "long", str(root), str(out)]


def endless_run(root: Path, out: Path) -> list[str]:
    sets = [part for setting in SMALL for part in ("--set", setting)]
    options = ["--data", str(root), "--out", str(out), "--val-split", ""]
    return ["-m", "training.train", "nuclei", *options, "--checkpoint-every", "2", *sets]


def last_step(out: Path) -> int:
    """The last step in a run's log, 0 for none."""
    path = out / "metrics.csv"
    if not path.exists():
        return 0
    with path.open(newline="") as file:
        return max((int(row[0]) for row in list(csv.reader(file))[1:] if len(row) == 3), default=0)


def content(out: Path) -> dict[str, Any]:
    return load_checkpoint(out / "last.pt")[1]


def assert_identical(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["step"] == b["step"] == 24
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys() and len(a[part]) > 50
        for key, value in a[part].items():
            assert torch.equal(value, b[part][key]), key
    momenta = [c["optimizer"]["state"] for c in (a, b)]
    assert momenta[0].keys() == momenta[1].keys() and len(momenta[0]) > 50
    for key, state in momenta[0].items():
        assert torch.equal(state["momentum_buffer"], momenta[1][key]["momentum_buffer"])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kill_9_in_an_epoch_loses_an_interval_at_most(
    count: int, root: Path, tmp_path: Path
) -> None:
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    processes = start_python([long_run(root, killed)] * count)
    wait_until(lambda: last_step(killed) >= 8, processes)
    signal_groups(processes, signal.SIGKILL)
    assert all(status == -signal.SIGKILL for status, _ in finish(processes))
    reached, saved = last_step(killed), content(killed)["step"]
    assert 0 < saved < 24 and saved % CHECKPOINT_EVERY == 0
    assert reached - saved <= CHECKPOINT_EVERY
    if count == 1:
        train_long(root, killed)
        train_long(root, unbroken)
    else:
        for out in (killed, unbroken):
            for status, text in finish(start_python([long_run(root, out)] * count)):
                assert status == 0, text
    assert_identical(content(killed), content(unbroken))
    logs = [(out / "metrics.csv").read_text().splitlines() for out in (killed, unbroken)]
    kept = [[line for line in log if ",seconds," not in line] for log in logs]
    assert kept[0] == kept[1] and len(kept[0]) > 24


def assert_stopped(ended: list[tuple[int, str]], step: int) -> None:
    """Every process was stopped by SIGTERM; the first one names the step of its checkpoint."""
    for rank, (status, text) in enumerate(ended):
        assert status == TERMINATED_STATUS, text
        where = "" if rank else f" at step {step}"
        assert f"stopped by SIGTERM{where}" in text
        assert "Traceback" not in text, text


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_saves_and_stops(count: int, root: Path, tmp_path: Path) -> None:
    # To the whole group, data loading processes included, as a job queue sends it.
    processes = start_python([endless_run(root, tmp_path)] * count)
    wait_until((tmp_path / "last.pt").exists, processes)
    signal_groups(processes[:1], signal.SIGTERM)  # one process is enough to stop all
    assert_stopped(finish(processes), content(tmp_path)["step"])


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with so many objects that the targets of a batch do not fit into a pipe."""
    folder, side = tmp_path_factory.mktemp("crowded"), 256
    centres = range(16, side, 32)
    masks = [disc(side, side, y, x, 14) for y in centres for x in centres]
    names = [f"train{index}.png" for index in range(1, 5)]
    image = np.where(np.any(masks, axis=0), 200, 20).astype(np.uint8)
    for name in names:
        write_image(folder / "images" / name, image)
    annotations = [
        annotation_of(mask, index, CLASSES[0].category_id)
        for index in range(1, len(names) + 1)
        for mask in masks
    ]
    write_split(folder, "train", [(name, side, side) for name in names], annotations)
    return folder


CROWDED = ["--workers", "2", "--set", "schedule.batch_size=4"]
CROWDED += ["--set", "input.resize.tile_hw=[256,256]"]


def endless_measurement(root: Path, folder: Path) -> list[str]:
    """`--precision auto`, which stays in a step and then leaves a file in the folder."""
    solo_train = endless_run(root, folder / "run")[2:]
    return ["-m", "tests.support.endless_measurement", str(folder), *solo_train]


@pytest.mark.parametrize("where", ["training", "measurement"])
def test_no_data_loading_process_outlives_a_main_process_that_is_killed(
    where: str, crowded: Path, tmp_path: Path
) -> None:
    command, begun = endless_run(crowded, tmp_path), tmp_path / "last.pt"
    if where == "measurement":
        command = [*endless_measurement(crowded, tmp_path), "--precision", "auto"]
        begun = tmp_path / "in_0"
    processes = start_python([[*command, *CROWDED]])
    wait_until(begun.exists, processes)
    processes[0].kill()
    # The data loading processes have inherited its output, which ends with the last of them.
    ((status, text),) = finish(processes, timeout_s=60)
    assert status == -signal.SIGKILL and "Traceback" not in text


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder with a short path: batches travel through sockets whose paths have 107 bytes."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sent_to", ["main", "group"])
def test_sigterm_ends_a_measurement(
    sent_to: str,
    count: int,
    crowded: Path,
    tmp_path: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", str(temporary))
    command = [*endless_measurement(crowded, tmp_path), "--precision", "auto", *CROWDED]
    processes = start_python([command] * count)
    wait_until(lambda: all((tmp_path / f"in_{i}").exists() for i in range(count)), processes)
    assert list(temporary.glob("tmp*"))
    if sent_to == "main":
        processes[0].terminate()
    else:
        signal_groups(processes[:1], signal.SIGTERM)
    for status, text in finish(processes, timeout_s=60):
        assert status == TERMINATED_STATUS, text
        assert "stopped by SIGTERM while a step was timed; the same command resumes it" in text
        assert "Traceback" not in text, text
    assert not list(temporary.glob("tmp*")) and not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "stuck", "signalled"),
    [
        *(("step", stuck, signalled) for stuck in (0, 1) for signalled in (0, 1)),
        *(("validation", stuck, 1 - stuck) for stuck in (0, 1)),
    ],
)
def test_sigterm_to_one_process_does_not_wait_for_a_long_step(
    where: str, stuck: int, signalled: int, root: Path, tmp_path: Path
) -> None:
    """One process stays for ten minutes in a step or a validation, the other one waits for it."""
    command = ["-m", "tests.support.shared_training", "stuck", str(root), str(tmp_path)]
    processes = start_python([[*command, where, str(stuck)]] * 2)
    wait_until(lambda: all((tmp_path / f"in_{rank}").exists() for rank in (0, 1)), processes)
    started = time.monotonic()
    processes[signalled].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert time.monotonic() - started < 60
    step = 2 if where == "step" else 3
    assert_stopped(ended, step)
    saved = content(tmp_path)
    assert saved["step"] == step and saved["unvalidated"] == (where == "validation")


@pytest.fixture
def unreadable(tmp_path: Path) -> Path:
    """A data set whose images have a header, which is checked at the start, and too few pixels."""
    folder = build_tiny_data(tmp_path / "unreadable")
    for path in (folder / "images").iterdir():
        buffer = io.BytesIO()
        Image.open(path).convert("RGB").save(buffer, "JPEG")
        jpeg = buffer.getvalue()
        path.write_bytes(jpeg[: jpeg.index(b"\xff\xda") + 30])
    return folder


def test_an_error_of_a_data_loading_process_is_one_line(unreadable: Path, tmp_path: Path) -> None:
    ((status, text),) = finish(start_python([endless_run(unreadable, tmp_path / "run")]))
    line = text.strip().splitlines()[-1]
    assert status == 1 and "Traceback" not in text
    assert re.fullmatch(r"solo-train: train\d\.png: .+", line)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_with_one_line(
    root: Path, unreadable: Path, tmp_path: Path
) -> None:
    commands = [endless_run(data, tmp_path / "run") for data in (root, unreadable)]
    (status, text), (failed_status, failed_text) = finish(start_python(commands))
    assert status == failed_status == 1
    assert "solo-train: process 1: train" in failed_text and ".png" in failed_text
    assert "solo-train: process 0: another process has failed" in text
    assert "Traceback" not in text + failed_text


@pytest.mark.slow
def test_processes_that_do_not_divide_the_batch(root: Path, tmp_path: Path) -> None:
    command = [*endless_run(root, tmp_path / "run"), "--set", "schedule.batch_size=3"]
    for status, text in finish(start_python([command] * 2)):
        assert status == 1
        assert "batch_size 3 cannot be split evenly over 2 processes" in text
    assert not (tmp_path / "run").exists()
