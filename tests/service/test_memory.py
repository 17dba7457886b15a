"""Bounds of memory follow the limit of the control group; what cannot fit is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from service import cores
from service.errors import StartupError
from service.memory import PROCESS_BYTES, find_memory_limit, fit_memory
from service.settings import MIB, Settings


def build_cgroup(root: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    monkeypatch.setattr(cores, "_CGROUP", root)
    monkeypatch.setattr(cores, "_OWN_CGROUP", root / "own")
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory_dot_max": "268435456\n"}, 256 * MIB),
        ({"memory_dot_max": "max\n"}, None),
        ({"memory__memory_dot_limit_in_bytes": "268435456\n"}, 256 * MIB),
        ({"memory__memory_dot_limit_in_bytes": "9223372036854771712\n"}, None),
        ({"memory_dot_max": "nonsense"}, None),
        ({}, None),
        (
            {
                "own": "0::/a/b\n",
                "a__memory_dot_max": "268435456",
                "a__b__memory_dot_max": "536870912",
            },
            256 * MIB,
        ),
        (
            {
                "own": "4:memory:/a\n3:cpu,cpuacct:/b\n",
                "memory__a__memory_dot_limit_in_bytes": "268435456",
                "memory__b__memory_dot_limit_in_bytes": "1024",
            },
            256 * MIB,
        ),
    ],
)
def test_the_least_limit_of_the_groups_counts(
    files: dict[str, str], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_cgroup(tmp_path, monkeypatch, **files)
    assert find_memory_limit() == expected


def test_without_a_limit_nothing_changes() -> None:
    settings = Settings()
    assert fit_memory(settings, None) is settings


@pytest.mark.parametrize(("workers", "limit"), [(1, 256 * MIB), (4, 1024 * MIB)])
def test_a_limit_without_room_for_one_request_is_refused(workers: int, limit: int) -> None:
    with pytest.raises(StartupError) as caught:
        fit_memory(Settings(workers=workers), limit)
    message = str(caught.value)
    assert f"{limit // MIB} MiB is below" in message
    assert "max_body_bytes" in message
    assert "max_image_pixels" in message


def test_the_least_limit_that_is_named_is_enough() -> None:
    settings = Settings(max_image_pixels=1_000_000, max_body_bytes=MIB)
    needed = PROCESS_BYTES + MIB + 3_000_000
    fitted = fit_memory(settings, needed)
    assert (fitted.max_decoded_pixels, fitted.max_bodies_bytes) == (1_000_000, MIB)
    with pytest.raises(StartupError):
        fit_memory(settings, needed - 1)


@pytest.mark.parametrize("limit", [512 * MIB, 700 * MIB, 1024 * MIB, 1400 * MIB])
def test_what_is_admitted_stays_within_the_limit(limit: int) -> None:
    settings = Settings()
    fitted = fit_memory(settings, limit)
    assert PROCESS_BYTES + 3 * fitted.max_decoded_pixels + fitted.max_bodies_bytes <= limit
    assert fitted.max_image_pixels <= fitted.max_decoded_pixels <= settings.max_decoded_pixels
    assert fitted.max_body_bytes <= fitted.max_bodies_bytes <= settings.max_bodies_bytes


def test_images_and_bodies_share_what_the_process_leaves(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "service.memory"):
        fitted = fit_memory(Settings(), 1024 * MIB)
    assert 3 * fitted.max_decoded_pixels == fitted.max_bodies_bytes == 384 * MIB
    assert caplog.messages == []  # exactly the limit is within it


def test_a_bound_that_just_fits_is_not_lowered(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings()
    with caplog.at_level(logging.INFO, "service.memory"):
        fitted = fit_memory(settings, PROCESS_BYTES + 6 * settings.max_decoded_pixels)
    assert fitted.max_decoded_pixels == settings.max_decoded_pixels
    assert caplog.messages == []


def test_a_generous_limit_lowers_nothing(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings()
    with caplog.at_level(logging.INFO, "service.memory"):
        fitted = fit_memory(settings, 4096 * MIB)
    assert fitted == settings
    assert caplog.messages == []


def test_a_bound_that_was_set_stays_and_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(max_decoded_pixels=400_000_000)
    with caplog.at_level(logging.INFO, "service.memory"):
        fitted = fit_memory(settings, 1024 * MIB)
    assert fitted.max_decoded_pixels == 400_000_000
    assert fitted.max_bodies_bytes == settings.max_body_bytes
    lowered, warning = caplog.messages
    assert lowered.startswith("max_bodies_bytes is ")
    assert "400000000" in warning
    assert "1024 MiB" in warning
