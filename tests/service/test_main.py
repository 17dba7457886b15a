"""What `python -m service` does with SOLO_DEVICES before anything of CUDA is called."""

from __future__ import annotations

import os
from typing import Any

import pytest

from service import __main__ as command
from service.engines.visible import VARIABLE
from service.errors import StartupError
from service.scale.workers import child
from service.settings import Settings


class Reached(StartupError):
    """The repository would be loaded now, or the workers started."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is loaded with which options, and what CUDA sees then."""
    found: dict[str, Any] = {}

    def load(root: object, options: Any, **rest: Any) -> None:
        found.update(gpus=options.gpus, shown=os.environ.get(VARIABLE))
        raise Reached("loaded")

    def check(options: Any) -> None:
        found["checked"] = options.gpus, os.environ.get(VARIABLE)

    def run(settings: Settings) -> None:
        found["workers"] = settings
        raise Reached("workers")

    monkeypatch.setattr(command, "load_repository", load)
    monkeypatch.setattr(child, "load_repository", load)
    monkeypatch.setattr(command, "check_device", check)
    monkeypatch.setattr(command, "run_workers", run)
    monkeypatch.setenv(VARIABLE, "4,5,6,7")
    return found


@pytest.mark.parametrize(
    ("settings", "gpus", "shown"),
    [
        ({}, (0,), "4,5,6,7"),
        ({"devices": "1,3"}, (0, 1), "5,7"),
        ({"devices": "all"}, (0, 1, 2, 3), "4,5,6,7"),
        ({"devices": "1", "device": "cpu"}, (0,), "4,5,6,7"),
    ],
)
def test_one_process_sees_its_devices_alone(
    seen: dict[str, Any], settings: dict[str, Any], gpus: tuple[int, ...], shown: str
) -> None:
    with pytest.raises(Reached):
        command.serve(Settings(**settings))
    assert (seen["gpus"], seen["shown"]) == (gpus, shown)
    assert seen["checked"] == (gpus, shown)


def test_each_worker_sees_its_share(seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Reached):
        command.serve(Settings(devices="all", workers=3))
    settings = seen["workers"]
    assert settings.devices == "4,5,6,7" and os.environ[VARIABLE] == "4,5,6,7"
    monkeypatch.setattr(child, "end_with_parent", lambda limit_s: None)
    monkeypatch.setattr(child, "configure_logging", lambda *arguments: None)
    monkeypatch.setattr(child, "SIGNALS", ())
    for index, (gpus, shown) in enumerate([((0, 1), "4,7"), ((0,), "5"), ((0,), "6")]):
        with pytest.raises(SystemExit, match=f"worker {index}: loaded"):
            child.run_child(settings, index, None)  # type: ignore[arg-type]
        assert (seen["gpus"], seen["shown"]) == (gpus, shown)


def test_too_little_memory_is_refused_before_models_are_loaded(
    seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_memory_limit", lambda: 256 << 20)
    with pytest.raises(StartupError, match="memory limit of 256 MiB"):
        command.serve(Settings())
    assert seen == {}


def test_workers_are_told_what_the_memory_allows(
    seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_memory_limit", lambda: 1024 << 20)
    with pytest.raises(Reached, match="workers"):
        command.serve(Settings(workers=2))
    assert seen["workers"].max_decoded_pixels < Settings().max_decoded_pixels
