"""The wheel in an empty environment: it serves the bundled model, from any folder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.processes import free_port
from tests.test_serving_without_torch import IMAGE, OFFLINE, clean_environment

ROOT = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]

pytestmark = [pytest.mark.network, pytest.mark.slow]


def run(*command: object, cwd: Path) -> str:
    """What a command writes; skips the test where no package index can be reached."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0 and OFFLINE.search(done.stderr):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder)
    run(*pip, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the commands of an environment with nothing but the wheel's `service` extra."""
    folder = tmp_path_factory.mktemp("empty")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    found = folder / "venv/bin"
    pip = (found / "python", "-m", "pip", "install", "--quiet", "--constraint")
    run(*pip, ROOT / "constraints.txt", f"{wheel}[service]", cwd=folder)
    return found


@pytest.fixture(scope="module")
def url(scripts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("elsewhere")
    address = f"http://127.0.0.1:{(port := free_port())}"
    with (
        open(folder / "log", "wb") as log,
        subprocess.Popen(
            [scripts / "solo-serve", "--port", str(port), "--device", "cpu"],
            cwd=folder,
            env=clean_environment(),
            stdout=log,
            stderr=log,
        ) as server,
    ):
        try:
            deadline_s = time.monotonic() + 60
            while not _is_ready(address):
                assert server.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline_s, (folder / "log").read_text()
                time.sleep(0.2)
            yield address
        finally:
            server.terminate()


def _is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/v2/health/ready", trust_env=False).is_success
    except httpx.TransportError:
        return False


def test_the_wheel_has_the_model_without_what_only_training_needs(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    bundled = {name for name in names if name.startswith("service/bundled_models/")}
    assert "service/bundled_models/nuclei/config.json" in bundled
    assert any(name.endswith("/model.onnx") for name in bundled)
    assert not any(name.endswith("weights.pt") for name in names)
    roots = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert roots == {"pipeline", "service", "solo_client", "training", "export"}


@pytest.mark.parametrize("command", ["solo-serve"])
def test_it_says_its_version(scripts: Path, command: str, tmp_path: Path) -> None:
    said = run(scripts / command, "--version", cwd=tmp_path)
    assert said == f"{command} {VERSION}\n"


def test_the_bundled_model_is_served(url: str) -> None:
    answer = httpx.post(
        f"{url}/segment",
        content=IMAGE.read_bytes(),
        headers={"Content-Type": "image/jpeg"},
        timeout=60,
        trust_env=False,
    )
    assert answer.status_code == 200, answer.text
    (result,) = answer.json()["results"]
    assert answer.json()["model"] == "nuclei"
    assert len(result["instances"]) >= 3
    assert json.loads(httpx.get(f"{url}/v2", trust_env=False).content)["version"] == VERSION
