from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.engines.base import BackendOptions
from service.errors import ModelRefused, StartupError
from service.jobs.files import LocalFile, build_folder
from service.models.repository import read_config
from service.predict import main
from service.work.request import RequestOptions
from tests.support.blob_model import draw_picture, encode_picture, poisoned_picture, publish
from tests.support.processes import free_port

ray = pytest.importorskip("ray", reason="Ray is not installed: the extra ray")
pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra ray")

from service.predict.ray_job import Plan, Pool, RaySegmenter, connect, read_images  # noqa: E402


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    folder = publish(tmp_path / "repo", poisonable=True)
    options = BackendOptions(device="cpu", threads=1)
    config = read_config(folder)
    return Plan(folder=folder, config=config, options=options, asked=RequestOptions(), draw=False)


@pytest.fixture
def own_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80_000_000)
    yield
    ray.shutdown()


def predict(repo: Path, out: Path, *arguments: str) -> tuple[str, bytes]:
    """The error that ends the command, and the file that it writes."""
    same = ["--model-repo", str(repo), "--out", str(out), "--quiet"]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, *same])
    return str(caught.value), out.read_bytes()


def test_ray_finds_and_draws_what_this_process_does_and_names_the_same_failures(
    tmp_path: Path,
    plan: Plan,
    own_ray: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, more = tmp_path / "images", tmp_path / "more"
    for folder in (images, more / "deeper"):
        folder.mkdir(parents=True)
        for index in range(4):
            boxes = {"red": (4, 8, 12 + index, 16), "green": (40, 2 + index, 10, 20)}
            (folder / f"{index}.png").write_bytes(encode_picture(draw_picture(90, 70, boxes)))
    (images / "1b.png").write_bytes(b"no image")
    (images / "1c.png").write_bytes(b"")
    (images / "1d.png").symlink_to("gone.png")
    (more / "0.png").write_bytes(encode_picture(poisoned_picture()))
    repo, drawn = tmp_path / "repo", [tmp_path / name for name in ("drawn", "drawn_on_ray")]
    for folder in drawn:
        (folder / "00009_0.png").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # Ray's processes work in another folder
    local = ["images", "more", "--device", "cpu", "--overlays", "drawn"]
    on_ray = ["images", f"file://{more}", "--ray", "--overlays", "drawn_on_ray"]
    limit = ("--max-instances", "2")
    expected, expected_out = predict(repo, tmp_path / "local.json", *local, *limit)
    found, found_out = predict(repo, tmp_path / "on_ray.json", *on_ray, *limit)
    assert capsys.readouterr().err.count("warning: 7 images reached the limit") == 2
    assert "5 images failed" in expected
    assert found.replace(str(more), "more").replace("drawn_on_ray", "drawn") == expected
    assert found_out == expected_out
    names = [result["file_name"] for result in json.loads(found_out)]
    assert len(names) == 14
    assert {"images/1.png", "more/deeper/1.png"} < {*names}
    first, second = ({p.name: p.read_bytes() for p in f.iterdir() if p.is_file()} for f in drawn)
    assert first == second
    assert len(first) == 7


def test_files_are_read_or_the_reason_is_given(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"data")
    folder = build_folder(str(tmp_path))
    files = [LocalFile(folder, "a"), LocalFile(folder, "missing")]
    rows = [{"number": n, "file": pickle.dumps(file)} for n, file in enumerate(files, 5)]
    read = read_images(pa.Table.from_pylist(rows)).to_pylist()
    assert read[0] == {"number": 5, "data": b"data", "error": None}
    assert (read[1]["number"], read[1]["data"]) == (6, None)
    assert "No such file" in read[1]["error"]


def test_an_actor_refuses_a_model_that_is_not_the_runs(plan: Plan) -> None:
    other = replace(plan, config=plan.config.model_copy(update={"candidates": 2}))
    with pytest.raises(StartupError, match=r"config\.json differs"):
        RaySegmenter(other)
    (plan.folder / "1" / "model.onnx").write_bytes(b"other")
    with pytest.raises(ModelRefused, match=r"model\.onnx"):
        RaySegmenter(plan)


@pytest.mark.parametrize(
    ("pool", "count"),
    [
        (Pool(), 10),
        (Pool(cpus=2), 5),
        (Pool(cpus=3), 2),
        (Pool(gpus=1), 3),
        (Pool(gpus=0.5), 6),
        (Pool(cpus=8, gpus=0.25), 1),
        (Pool(actors=50, gpus=1), 50),
    ],
)
def test_as_many_actors_as_there_is_room_for_on_each_node(pool: Pool, count: int) -> None:
    nodes: list[dict[str, Any]] = [{"CPU": 8.0, "GPU": 3.0}, {"CPU": 2.0}, {"memory": 5e9}]
    assert pool.count_actors(nodes) == count


def test_no_room_for_an_actor_is_said() -> None:
    with pytest.raises(StartupError, match=r"4 CPUs and 0\.5 GPUs.*\[\(2\.0, 0\)\]"):
        Pool(cpus=4, gpus=0.5).count_actors([{"CPU": 2.0}])


def test_no_cluster_at_the_address_is_said_at_once() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(StartupError, match=f"Ray at {address}: .*refused"), connect(address):
        pass
