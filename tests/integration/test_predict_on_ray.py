"""solo-predict --ray on a real Ray: cut, crashed, on two nodes, from an object store."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.predict import main as predict_main
from tests.support.blob_model import draw_picture, encode_picture
from tests.support.journals import read_keys
from tests.support.processes import free_port
from tests.support.slow_model import build_slow_graph, publish_graph
from tests.support.waiting import poll_until

ray = pytest.importorskip("ray", reason="Ray is not installed: the extra ray")
pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra ray")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MEMORY_BYTES = 80_000_000
"""Of Ray's object store: its least is 75 MB."""
PASSWORDS = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A model that takes some time for an image."""
    publish_graph(tmp_path / "repo", "blobs", build_slow_graph(rounds=2000))
    return tmp_path / "repo"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(40):
        boxes = {"red": (4, 8, 12 + index % 8, 16), "green": (40, 2 + index % 16, 10, 20)}
        (folder / f"{index:02d}.png").write_bytes(encode_picture(draw_picture(90, 70, boxes)))
    return folder


@pytest.fixture
def own_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in PASSWORDS.items():
        monkeypatch.setenv(name, value)
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=MEMORY_BYTES)
    yield
    ray.shutdown()


def predict_here(repo: Path, images: Path, out: Path) -> list[dict[str, Any]]:
    """What one process finds."""
    same = ["--model-repo", str(repo), "--device", "cpu", "--threads", "1", "--quiet"]
    predict_main([str(images), *same, "--out", str(out)])
    found: list[dict[str, Any]] = json.loads(out.read_bytes())
    return found


def start_on_ray(repo: Path, images: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    inputs = [str(images), "--model-repo", str(repo), "--out", str(out), "--quiet"]
    return subprocess.Popen(
        [sys.executable, "-m", "service.predict", *inputs, "--ray", *more],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_notes(journal: Path, count: int, process: subprocess.Popen[str]) -> None:
    def are_there() -> bool:
        assert process.poll() is None, process.communicate()
        return len(read_keys(journal)) >= count

    poll_until(are_there, timeout_s=200, pause_s=0.005)


def spoil(file: Path) -> None:
    """Other bytes of the same size and time: a run that reads them again fails."""
    status = file.stat()
    file.write_bytes(b"x" * status.st_size)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_killed_and_started_again_it_gives_what_one_process_gives(
    repo: Path, images: Path, tmp_path: Path
) -> None:
    expected = predict_here(repo, images, tmp_path / "local.json")
    out = tmp_path / "results.json"
    journal = out.with_name("results.json.partial")
    process = start_on_ray(repo, images, out, "--actors", "2")
    wait_for_notes(journal, 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    done = [Path(key) for key in read_keys(journal)]
    assert 5 <= len(done) < 40
    for file in done:
        spoil(file)
    process = start_on_ray(repo, images, out, "--actors", "1")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert json.loads(out.read_bytes()) == expected
    assert len(expected) == 80
    assert not journal.exists()


def test_a_node_that_goes_away_costs_nothing_but_time(
    repo: Path, images: Path, tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster

    expected = predict_here(repo, images, tmp_path / "local.json")
    out = tmp_path / "results.json"
    node = {"num_cpus": 1, "object_store_memory": MEMORY_BYTES}
    head = {**node, "include_dashboard": False}
    cluster: Any = Cluster(initialize_head=True, head_node_args=head)
    try:
        other = cluster.add_node(**node)
        process = start_on_ray(repo, images, out, "--ray-address", cluster.address)
        wait_for_notes(out.with_name("results.json.partial"), 5, process)
        cluster.remove_node(other, allow_graceful=False)
        output, _ = process.communicate(timeout=300)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, output
    assert json.loads(out.read_bytes()) == expected


def test_an_image_that_ends_its_process_is_named_and_the_others_are_done(
    repo: Path, images: Path, tmp_path: Path, own_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.dying_segmenter import DEADLY, DyingSegmenter

    expected = predict_here(repo, images, tmp_path / "local.json")
    monkeypatch.setattr("service.predict.ray_job.RaySegmenter", DyingSegmenter)
    (images / "99.png").write_bytes(DEADLY)
    out = tmp_path / "results.json"
    same = ["--model-repo", str(repo), "--out", str(out), "--quiet", "--ray"]
    with pytest.raises(SystemExit, match=r"1 images failed:\n.*99\.png: its process ended"):
        predict_main([str(images), *same])
    assert json.loads(out.read_bytes()) == expected


def test_a_model_that_no_actor_can_load_ends_the_run(
    repo: Path, images: Path, tmp_path: Path, own_ray: None
) -> None:
    model = repo / "blobs" / "1" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    same = ["--model-repo", str(repo), "--out", str(tmp_path / "out.json"), "--quiet", "--ray"]
    with pytest.raises(SystemExit, match=r"ModelRefused.*model\.onnx.*the same command continues"):
        predict_main([str(images), *same])


@pytest.fixture
def bucket(images: Path) -> Iterator[str]:
    """The images in an S3 bucket of this machine; its URI, with %s for a path."""
    server = shutil.which("moto_server")
    if server is None:
        pytest.skip("moto_server is not on PATH: pip install 'moto[server]' anywhere")
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen([server, "-p", address.split(":")[1]], stderr=subprocess.DEVNULL)
    try:
        store = httpx.Client(
            base_url=f"http://{address}", transport=httpx.HTTPTransport(retries=9), timeout=60
        )
        store.put("/pictures").raise_for_status()
        for file in [*sorted(images.iterdir())[:6]]:
            store.put(f"/pictures/some/{file.name}", content=file.read_bytes()).raise_for_status()
        store.put("/pictures/some/deeper/bad.png", content=b"no image").raise_for_status()
        store.put("/pictures/some/notes.txt", content=b"no image").raise_for_status()
        yield f"s3://pictures/%s?endpoint_override={address}&scheme=http&region=us-east-1"
    finally:
        process.kill()
        process.wait()


def test_images_of_an_object_store(
    bucket: str, repo: Path, images: Path, tmp_path: Path, own_ray: None
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for file in sorted(images.iterdir())[:6]:
        shutil.copy(file, few)
    expected = predict_here(repo, few, tmp_path / "local.json")
    out = tmp_path / "results.json"
    same = ["--model-repo", str(repo), "--out", str(out), "--quiet", "--restart"]
    for mode in (["--ray"], ["--device", "cpu"]):
        with pytest.raises(SystemExit, match=r"1 images failed:\ns3://pictures/some/deeper/bad"):
            predict_main([bucket % "some", *same, *mode])
        assert json.loads(out.read_bytes()) == expected
    predict_main([bucket % "some/0[1-2].png", *same])
    names = {result["file_name"] for result in json.loads(out.read_bytes())}
    assert names == {"01.png", "02.png"}
