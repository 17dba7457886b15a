"""What the file of API keys holds, and when a change of it is seen."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.errors import StartupError
from service.http.keys import KeyFile, KeyRing, KeySpec, add_key, main
from tests.support.clock import SetClock


def test_a_change_is_looked_for_once_a_second(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file, clock = tmp_path / "keys.json", SetClock()
    add_key(file, "first")
    ring = KeyRing(file, clock)
    second = add_key(file, "second")
    clock.now_s += 0.75
    assert ring.find(second) is None and caplog.text == ""
    clock.now_s += 0.25
    assert ring.find(second) is not None
    clock.now_s += 5
    ring.find(second)
    assert caplog.text.count("2 keys are valid now") == 1


def test_the_file_has_what_was_asked_for_and_no_more(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    keys = [add_key(file, "shop"), add_key(file, "lab", weight=2, admin=True)]
    hashes = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    assert json.loads(file.read_text()) == {
        "keys": [
            {"name": "shop", "sha256": hashes[0]},
            {"name": "lab", "sha256": hashes[1], "weight": 2.0, "admin": True},
        ]
    }
    assert all(len(base64.urlsafe_b64decode(key + "=")) >= 32 for key in keys)


def test_an_entry_cannot_be_changed_by_who_reads_it() -> None:
    spec = KeySpec(name="shop", sha256="0" * 64)
    with pytest.raises(ValidationError, match="frozen"):
        spec.admin = True  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        KeyFile(keys=(spec,)).keys = ()  # type: ignore[misc]


def test_the_file_holds_hashes_and_is_private(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key, other = add_key(file, "shop", max_canvases=3), add_key(file, "lab", admin=True)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text()
    assert key not in text and other not in text
    assert hashlib.sha256(key.encode()).hexdigest() in text
    ring = KeyRing(file)
    shop, lab = ring.find(key), ring.find(other)
    assert shop is not None and lab is not None
    assert (shop.name, shop.max_canvases, lab.admin) == ("shop", 3, True)
    for wrong in ("", key[:-1], key + "x", "ключ"):
        assert ring.find(wrong) is None


def test_the_command_prints_a_key_that_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.json"
    bounds = ["--max-canvases", "2", "--canvases-per-minute", "60", "--weight", "0.5", "--admin"]
    assert main(["shop", "--file", str(file), *bounds]) == 0
    spec = KeyRing(file).find(capsys.readouterr().out.strip())
    assert spec is not None
    assert (spec.max_canvases, spec.canvases_per_minute, spec.weight) == (2, 60, 0.5)
    assert spec.admin
    assert main(["shop", "--file", str(file)]) == 1
    assert "has a key for 'shop' already" in capsys.readouterr().err
    assert main(["a b", "--file", str(file)]) == 1
    with pytest.raises(SystemExit):
        main(["shop"])
    assert "--file" in capsys.readouterr().err


def test_a_changed_file_is_read_again_and_a_broken_one_is_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, clock = tmp_path / "keys.json", SetClock()
    first = add_key(file, "first")
    ring = KeyRing(file, clock)
    spec = ring.find(first)
    assert spec is not None and spec.name == "first"
    second = add_key(file, "second")
    assert ring.find(second) is None  # not looked at yet
    clock.now_s += 2
    assert ring.find(second) is not None
    assert ring.find(first) == spec
    file.write_text('{"keys": [{"name": "x"}]}')
    clock.now_s += 2
    assert ring.find(first) == spec
    assert "keys.0.sha256" in caplog.text and "stay valid" in caplog.text
    file.unlink()
    clock.now_s += 2
    assert ring.find(first) == spec
    add_key(file, "third")
    clock.now_s += 2
    assert ring.find(first) is None


@pytest.mark.parametrize("content", ["", "[]", '{"keys": [{"name": "a", "sha256": "xyz"}]}'])
def test_a_broken_file_stops_the_start(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(StartupError, match=r"keys\.json"):
        KeyRing(file)
    with pytest.raises(StartupError, match="nowhere"):
        KeyRing(tmp_path / "nowhere.json")


def test_the_file_is_replaced_and_never_half_written(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    add_key(file, "a")
    inode = os.stat(file).st_ino
    add_key(file, "b")
    assert os.stat(file).st_ino != inode
    assert [k["name"] for k in json.loads(file.read_text())["keys"]] == ["a", "b"]
    assert os.listdir(tmp_path) == ["keys.json"]
