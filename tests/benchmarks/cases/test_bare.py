from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases.bare import run_bare_loop, run_bare_processes
from benchmarks.inputs import Workload
from pipeline.errors import DecodeError
from pipeline.postprocess import TileCandidates
from pipeline.types import Tile
from service.engines.base import BackendOptions, Precision
from service.models.repository import LoadedModel, load_version
from tests.support.blob_model import draw_picture, encode_picture, publish

IMAGE = encode_picture(draw_picture(100, 48, {"red": (4, 4, 30, 20), "blue": (4, 60, 30, 30)}))


@pytest.fixture
def model(tmp_path: Path) -> Iterator[LoadedModel]:
    options = BackendOptions(device="cpu", threads=1, slots=2)
    loaded = load_version(publish(tmp_path), options=options)
    yield loaded
    loaded.backend.close()


def test_every_image_is_finished_with_all_its_instances(model: LoadedModel) -> None:
    run = run_bare_loop(model, [IMAGE], threads=2, seconds=0.2)
    assert run.images >= 2
    assert run.instances == 2 * run.images
    assert run.cpu_s > 0
    assert run.images_per_s == run.images / run.seconds


def test_a_broken_image_ends_the_run(model: LoadedModel) -> None:
    with pytest.raises(DecodeError):
        run_bare_loop(model, [IMAGE, b"no image"], threads=2, seconds=60)


def test_an_engine_that_fails_ends_the_run(model: LoadedModel) -> None:
    class Broken:
        name, device, reason, concurrency = "broken", "cpu", "a test", 1
        precision: Precision = "fp32"

        def infer(self, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
            raise RuntimeError("out of order")

        def close(self) -> None:
            pass

    with pytest.raises(RuntimeError, match="out of order"):
        run_bare_loop(replace(model, backend=Broken()), [IMAGE], threads=3, seconds=60)


@pytest.mark.parametrize(("bodies", "threads"), [([], 1), ([IMAGE], 0)])
def test_there_must_be_images_and_threads(
    model: LoadedModel, bodies: list[bytes], threads: int
) -> None:
    with pytest.raises(ValueError, match=f"{len(bodies)} images and {threads} threads"):
        run_bare_loop(model, bodies, threads=threads, seconds=1)


def test_the_command_writes_its_numbers(tmp_path: Path, run_case: Callable[..., Any]) -> None:
    folder = publish(tmp_path / "models")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(IMAGE)
    flags = f"--images {tmp_path / 'images'} --seconds 0.1 --warm-up-s 0.1 --threads 1"
    report = run_case("bare", "--model", folder, *flags.split())
    assert report["model"] == "blobs 1"
    assert report["images_per_s"] > 0 and report["instances"] == 2 * report["images"]


def test_the_loop_in_processes_adds_up(tmp_path: Path) -> None:
    workload = Workload("blobs", publish(tmp_path / "models"), {"a.png": IMAGE}, {})
    costs = run_bare_processes(workload, 2, 0.1)
    assert costs["images_per_s"] > 0 and costs["cpu_ms_per_image"] > 0
