"""The examples of the OpenAPI descriptions, docs/api.md and README.md, pasted as they are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import ROOT, ServerProcess, run_server

HTTP_METHODS = ("get", "post", "put", "delete")
MUST_HAVE = {
    *("POST /segment", "GET /v2", "GET /v2/models", "GET /v2/models/{name}", "GET /metrics"),
    *("GET /v2/health/ready", "GET /v2/models/{name}/ready", "POST /v2/models/{name}/infer"),
}


def read_blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in found]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    scratch = tmp_path_factory.mktemp("log")
    log, jobs = scratch / "server.log", ("--jobs-dir", f"{scratch / 'jobs'}")
    flags = ("--model-repo", "model_repo", "--device", "cpu", "--threads", "1", *jobs)
    with run_server(log, *flags) as running:
        yield running


@pytest.fixture(scope="module")
def operations(server: ServerProcess) -> dict[str, dict[str, Any]]:
    """Every operation of the server's OpenAPI, by "METHOD path"."""
    paths: dict[str, Any] = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    return {
        f"{method.upper()} {path}": operation
        for path, item in paths.items()
        for method, operation in item.items()
        if method in HTTP_METHODS
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder that looks like the repository's root."""
    for name in ("tests", "model_repo", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(server: ServerProcess, folder: Path, command: list[str]) -> str:
    """What a command writes; it must succeed."""
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    address = server.url.removeprefix("http://")
    command = [part.replace("localhost:8000", address) for part in command]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def run_shell(server: ServerProcess, folder: Path, script: str) -> str:
    return run(server, folder, ["bash", "-euo", "pipefail", "-c", script])


def test_the_openapi_examples_work(
    server: ServerProcess, operations: dict[str, dict[str, Any]], folder: Path
) -> None:
    blocks = {
        name: read_blocks(operation.get("description", ""), "sh")
        for name, operation in operations.items()
    }
    assert {name for name, found in blocks.items() if found} >= MUST_HAVE
    for name, found in blocks.items():
        for block in found:
            assert run_shell(server, folder, block), name
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_openapi_request_bodies_are_taken(
    server: ServerProcess, operations: dict[str, dict[str, Any]]
) -> None:
    posted = []
    for name, operation in operations.items():
        content = operation.get("requestBody", {}).get("content", {})
        example = content.get("application/json", {}).get("example")
        if example is not None:
            method, path = name.split()
            path = path.replace("{name}", "nuclei").replace("{version}", "4")
            response = httpx.request(method, server.url + path, json=example)
            assert response.is_success, response.text
            posted.append(name)
    assert "POST /v2/models/{name}/infer" in posted


def test_the_examples_of_the_documents_work(server: ServerProcess, folder: Path) -> None:
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    shell, python = read_blocks(text, "sh"), read_blocks(text, "python")
    assert len(shell) >= 3
    assert len(python) >= 2
    written = [run_shell(server, folder, block) for block in shell]
    assert written[0].startswith('{"model":"nuclei"')
    for block in python:
        assert run(server, folder, [sys.executable, "-c", block])
    results = json.loads((folder / "results.json").read_bytes())
    assert results == json.loads((folder / "local.json").read_bytes())
    assert len({result["image_id"] for result in results}) == 2
    assert len(list((folder / "drawn").iterdir())) == 2


def test_the_readmes_requests_work(server: ServerProcess, folder: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = read_blocks(text, "sh")
    asking = [block for block in blocks if "curl" in block]
    assert asking
    for block in asking:
        lines = [line for line in block.splitlines() if not line.startswith("make ")]
        assert run_shell(server, folder, "\n".join(lines))
    for block in read_blocks(text, "python"):
        assert run(server, folder, [sys.executable, "-c", block])
