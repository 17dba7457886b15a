from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import bare
from benchmarks.bare import run_bare_loop
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


def test_the_command_writes_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = publish(tmp_path / "models"), tmp_path / "bare.json"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(IMAGE)
    arguments = f"--model {folder} --images {tmp_path / 'images'} --seconds 0.1 --warm-up-s 0.1"
    monkeypatch.setattr(
        "sys.argv", ["bare", *arguments.split(), "--threads", "1", "--json", f"{out}"]
    )
    bare.main()
    report = json.loads(out.read_text())
    assert report["model"] == "blobs 1"
    assert report["images_per_s"] > 0
    assert "cores" in report["machine"]
    assert json.loads(capsys.readouterr().out)["images"] == report["images"]
