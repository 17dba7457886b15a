"""What the file of API keys holds, and when a change of it is seen."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.http.keys import KeyFile, KeyRing, KeySpec, add_key


class SetClock:
    """A clock that is set by hand."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


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
