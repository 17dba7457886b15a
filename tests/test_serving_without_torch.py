"""The `service` extra alone, in an environment of its own: no torch, and an image is segmented.

The environment is made by `make install`, as for a user, and kept between runs (`make clean`
removes it). Needs a package index; offline it is skipped unless the environment is already there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv-service-test"
IMAGE = ROOT / "tests/data/nuclei/images/16c3d5935ba94b72.jpg"
MODEL = ROOT / "model_repo/nuclei"

pytestmark = pytest.mark.network

# What pip says when no index can be reached.
OFFLINE = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeoutError|ProxyError|"
    r"Network is unreachable|Temporary failure in name resolution"
)

SEGMENT = """
import importlib.util, json, sys
from pathlib import Path

import service.__main__, service.http.app
from pipeline.decode import decode_image
from service.models.repository import load_version

model = load_version(Path(sys.argv[1]))
image = decode_image(Path(sys.argv[2]).read_bytes())
found = model.segment(image)
installed = [n for n in ("torch", "torchvision", "onnx") if importlib.util.find_spec(n)]
print(json.dumps({
    "installed": installed,
    "foreign": sorted({m.split(".")[0] for m in sys.modules} & {"torch", "training", "export"}),
    "image_hw": image.shape[:2],
    "scores": [float(i.score) for i in found],
    "areas": [int(i.area) for i in found],
    "sizes": [list(i.rle["size"]) for i in found],
}))
"""


def clean_environment() -> dict[str, str]:
    """This process's variables but those of an outer make or a virtual environment."""
    dropped = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
    return {name: value for name, value in os.environ.items() if name not in dropped}


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of an environment with the `service` extra and nothing else."""
    command = ["make", "install", f"VENV={VENV.name}", f"PYTHON={sys.executable}"]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode != 0 and OFFLINE.search(done.stderr):
        pytest.skip("no package index can be reached, and the environment is not there yet")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return VENV / "bin/python"


def test_an_image_is_segmented_and_torch_is_absent(python: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [python, "-c", SEGMENT, MODEL, IMAGE],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["installed"] == []
    assert answer["foreign"] == []
    assert len(answer["scores"]) >= 3, "the bundled model finds next to nothing"
    assert all(0 < score <= 1 for score in answer["scores"])
    assert all(area > 0 for area in answer["areas"])
    assert all(size == answer["image_hw"] for size in answer["sizes"])


def test_the_installed_packages_are_the_pinned_ones(python: Path) -> None:
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format", "json", "--exclude-editable"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    for package in json.loads(listed.stdout):
        name = package["name"].lower().replace("_", "-")
        if name not in ("pip", "setuptools"):
            assert package["version"] == pinned.get(name), name


def test_the_command_explains_itself(python: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [python.with_name("solo-serve"), "--help"],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--model-repo" in done.stdout
    assert "SOLO_PORT" in done.stdout
