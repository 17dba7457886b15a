"""solo-models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.models.command import main
from service.models.folders import read_default, read_repository_config
from tests.support.blob_model import publish
from tests.support.model_folder import add_version, edit_config


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`a` in versions 1 to 3, `b` in version 1."""
    add_version(publish(tmp_path, "a"), 2)
    add_version(tmp_path / "a", 3)
    publish(tmp_path, "b")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], root: Path, *arguments: str) -> tuple[object, str]:
    """Exit status, or the error's text; and what was printed."""
    with pytest.raises(SystemExit) as caught:
        main([arguments[0], "--model-repo", str(root), *arguments[1:]])
    return caught.value.code, capsys.readouterr().out


def served(root: Path, name: str = "a") -> list[int]:
    return read_repository_config(root / name).served_versions


def list_entries(capsys: pytest.CaptureFixture[str], root: Path) -> list[dict[str, Any]]:
    _, text = run(capsys, root, "list", "--json")
    found: list[dict[str, Any]] = json.loads(text)
    return found


def test_versions_are_listed(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    status, text = run(capsys, root, "list")
    assert status == 0
    assert [line.split() for line in text.splitlines()] == [
        ["MODEL", "VERSION", "SERVED", "DEFAULT", "PRECISIONS", "MB", "FILES"],
        ["a", "1", "no", "no", "fp32", "0.0", "verified"],
        ["a", "2", "no", "no", "fp32", "0.0", "verified"],
        ["a", "3", "yes", "no", "fp32", "0.0", "verified"],
        ["b", "1", "yes", "no", "fp32", "0.0", "verified"],
    ]
    columns = [re.search(r"(?:FILES|verified)$", line) for line in text.splitlines()]
    assert len({found and found.start() for found in columns}) == 1
    run(capsys, root, "default", "a")
    assert [entry["is_default"] for entry in list_entries(capsys, root)] == [
        *(False, False, True, False)
    ]


def test_precisions_and_sizes_are_listed(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    graph = (root / "b" / "1" / "model.onnx").read_bytes()
    (root / "b" / "1" / "model.int8.onnx").write_bytes(graph)

    def add(content: dict[str, Any]) -> None:
        files = content["versions"]["1"]["files"]
        files["model.int8.onnx"] = files["model.onnx"]
        content["limits"] = {"precision": "int8"}

    edit_config(root / "b", add)
    entry = list_entries(capsys, root)[-1]
    assert (entry["precisions"], entry["wanted_precision"]) == (["fp32", "int8"], "int8")
    assert entry["size_bytes"] == 2 * len(graph)
    assert "fp32,int8 (asks for int8)" in run(capsys, root, "list")[1]


def test_what_is_damaged_is_named_and_the_status_is_1(
    capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    (root / "a" / "2" / "model.onnx").unlink()
    (root / "b" / "config.json").write_text("[" * 100_000)
    (root / "loop").symlink_to(root / "loop")
    status, _ = run(capsys, root, "list")
    faults = [(e["model"], e["version"], e["fault"]) for e in list_entries(capsys, root)]
    assert status == 1
    assert faults[0] == ("a", 1, "")
    assert faults[1] == ("a", 2, "a/2/model.onnx: No such file or directory")
    assert faults[3][:2] == ("b", None) and "nested deeper" in faults[3][2]
    assert faults[4][:2] == ("loop", None) and "symbolic links" in faults[4][2]


def test_an_empty_repository_has_no_versions(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(capsys, tmp_path, "list")[0] == 0
    assert list_entries(capsys, tmp_path) == []
    status, _ = run(capsys, tmp_path / "missing", "list")
    assert "is not a folder" in str(status)


def test_the_default_is_shown_set_and_cleared(
    capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    assert "no default: requests that name none of ['a', 'b']" in run(capsys, root, "default")[1]
    status, text = run(capsys, root, "default", "b")
    assert (status, read_default(root)) == (0, "b")
    assert "b answers requests that name no model" in text
    assert "curl -X POST http://HOST:PORT/v2/repository/models/b/load" in text
    status, _ = run(capsys, root, "default", "c")
    assert "no model 'c', only ['a', 'b']" in str(status) and read_default(root) == "b"
    run(capsys, root, "default", "--clear")
    assert read_default(root) is None


def test_versions_are_pinned_and_released(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    status, text = run(capsys, root, "serve", "a", "3", "1")
    assert (status, served(root)) == (0, [1, 3])
    assert "a is served in version 1, 3, before in 3" in text
    assert "SOLO_MODEL_POLL_S" in text and "/v2/repository/models/a/load" in text
    add_version(root / "a", 4)
    assert served(root) == [1, 3]
    run(capsys, root, "serve", "a", "all")
    assert served(root) == [1, 2, 3, 4]
    run(capsys, root, "serve", "a", "latest")
    assert served(root) == [4]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["a", "9"], r"served in \[9\], but has only \[1, 2, 3\]"),
        (["a", "1", "latest"], "'1 latest': give version numbers"),
        (["a", "0"], "greater than 0"),
        (["a", "1.5"], "give version numbers"),
        (["a", "9" * 5000], "give version numbers"),
        (["c", "1"], "no model 'c'"),
        (["../a", "1"], "no model"),
    ],
)
def test_what_cannot_be_served_changes_nothing(
    capsys: pytest.CaptureFixture[str], root: Path, arguments: list[str], reason: str
) -> None:
    before = (root / "a" / "config.json").read_bytes()
    status, _ = run(capsys, root, "serve", *arguments)
    assert status not in (0, None)
    assert re.search(reason, str(status))
    assert (root / "a" / "config.json").read_bytes() == before


def test_a_damaged_version_is_not_pinned(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    file = root / "a" / "2" / "model.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    for arguments in (["serve", "a", "1", "2"], ["rollback", "a"]):
        status, _ = run(capsys, root, *arguments)
        assert "2/model.onnx" in str(status) and "truncated or modified" in str(status)
        assert served(root) == [3]


def test_a_version_becomes_the_shadow_of_the_served_one(
    capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    run(capsys, root, "serve", "a", "2")
    status, text = run(capsys, root, "shadow", "a", "3", "--share", "0.5", "--images", "7")
    assert (status, served(root)) == (0, [2])
    assert "a is served in version 2, before in 2" in text
    assert "version 3 is compared with it" in text
    policy = json.loads((root / "a" / "config.json").read_text())["serve"]
    assert (policy["policy"], policy["live"], policy["shadow"]) == ("shadow", 2, 3)
    assert (policy["share"], policy["images"], policy["promote_at"]) == (0.5, 7, 0.95)
    before = (root / "a" / "config.json").read_bytes()
    for arguments, reason in (
        (("2",), "cannot be its own shadow"),
        (("9",), "has only"),
        (("3", "--share", "2"), "share"),
        (("3", "--promote-at", "0.1"), "above promote_at"),
    ):
        status, _ = run(capsys, root, "shadow", "a", *arguments)
        assert reason in str(status)
    damaged = root / "a" / "3" / "model.onnx"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    status, _ = run(capsys, root, "shadow", "a", "3")
    assert "3/model.onnx" in str(status)
    assert (root / "a" / "config.json").read_bytes() == before


def test_a_model_is_rolled_back_version_by_version(
    capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    for expected in (2, 1):
        status, text = run(capsys, root, "rollback", "a")
        assert (status, served(root)) == (0, [expected])
        assert f"a is served in version {expected}, before in {expected + 1}" in text
    status, _ = run(capsys, root, "rollback", "a")
    assert "version 1 is served, and there is none before it" in str(status)
    assert served(root) == [1]


def test_nothing_else_of_config_json_changes(
    capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    before = json.loads((root / "a" / "config.json").read_bytes())
    run(capsys, root, "rollback", "a")
    after = json.loads((root / "a" / "config.json").read_bytes())
    assert after.pop("serve") == {"policy": "specific", "versions": [2]}
    assert after == before


def test_a_missing_version_that_was_pinned_can_be_corrected(
    capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    pinned = {"policy": "specific", "versions": [8]}
    edit_config(root / "a", lambda content: content.update(serve=pinned))
    status, text = run(capsys, root, "serve", "a", "2")
    assert (status, served(root)) == (0, [2])
    assert "before in none" in text


def test_it_runs_without_torch(root: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from service.models.command import main\n"
        f"main(['list', '--model-repo', {str(root)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("verified")) == (0, 4), done.stderr
