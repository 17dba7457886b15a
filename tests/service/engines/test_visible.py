from __future__ import annotations

import pytest

from service.engines import visible
from service.engines.visible import (
    VARIABLE,
    check_shares,
    parse_devices,
    resolve_devices,
    share_devices,
    show_devices,
)
from service.errors import DeviceError

SLICES = ("MIG-2b1c0000-aaaa", "MIG-2b1c0000-bbbb")


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("all", ("all",)),
        ("0", ("0",)),
        (" 1, 0 ", ("1", "0")),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",)),
        (",".join(SLICES), SLICES),
        ("MIG-GPU-8932f937/1/0", ("MIG-GPU-8932f937/1/0",)),
    ],
)
def test_devices_are_ordinals_and_uuids(text: str, devices: tuple[str, ...]) -> None:
    assert parse_devices(text) == devices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no device"),
        ("0,", "'' is no device"),
        ("-1", "'-1' is no device"),
        ("0,all", "'all' is no device"),
        ("cuda:0", "'cuda:0' is no device"),
        ("99999", "'99999' is no device"),
        ("GPU-", "'GPU-' is no device"),
        ("0,1,0", "0 is named twice"),
    ],
)
def test_what_is_no_device_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_devices(text)


@pytest.mark.parametrize(
    ("devices", "workers", "shares"),
    [
        ("0", 1, ["0"]),
        ("0", 3, ["0", "0", "0"]),
        ("0 1", 1, ["0 1"]),
        ("0 1", 2, ["0", "1"]),
        ("0 1", 3, ["0", "1", "0"]),
        ("0 1 2 3 4", 2, ["0 2 4", "1 3"]),
    ],
)
def test_workers_share_all_devices(devices: str, workers: int, shares: list[str]) -> None:
    names = tuple(devices.split())
    found = [share_devices(names, index, workers) for index in range(workers)]
    assert [" ".join(share) for share in found] == shares


@pytest.mark.parametrize(
    ("devices", "workers", "works"),
    [
        (SLICES[:1], 1, True),
        (SLICES, 2, True),
        (SLICES, 3, True),
        (SLICES, 1, False),
        ((*SLICES[:1], "0"), 2, False),
        (("0", "1"), 1, True),
    ],
)
def test_a_process_has_one_mig_slice(devices: tuple[str, ...], workers: int, works: bool) -> None:
    if works:
        check_shares(devices, workers)
        return
    with pytest.raises(ValueError, match=r"one MIG slice.*workers at least 2"):
        check_shares(devices, workers)


@pytest.mark.parametrize(
    ("devices", "shown", "found"),
    [
        ("1 0", None, "1 0"),
        ("1 0", "5,GPU-abcd", "GPU-abcd 5"),
        ("GPU-ef12", "5,GPU-abcd", "GPU-ef12"),
        ("all", "5, 7", "5 7"),
        ("all", None, "0 1 2"),
    ],
)
def test_ordinals_count_what_the_environment_shows(
    monkeypatch: pytest.MonkeyPatch, devices: str, shown: str | None, found: str
) -> None:
    monkeypatch.setattr(visible, "count_gpus", lambda: 3)
    environment = {} if shown is None else {VARIABLE: shown}
    assert resolve_devices(tuple(devices.split()), environment) == tuple(found.split())


def test_devices_that_are_hidden_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="device 2 is beyond the 2 of CUDA_VISIBLE_DEVICES=5,7"):
        resolve_devices(("0", "2"), {VARIABLE: "5,7"})
    with pytest.raises(DeviceError, match="CUDA_VISIBLE_DEVICES is empty, which hides all GPUs"):
        resolve_devices(("all",), {VARIABLE: ""})
    monkeypatch.setattr(visible, "count_gpus", lambda: 0)
    assert resolve_devices(("all",), {}) == ("0",)  # whose absence is reported later


def test_cuda_sees_the_devices_in_their_order() -> None:
    environment = {VARIABLE: "0", "OTHER": "x"}
    show_devices(("3", "1"), environment)
    assert environment == {VARIABLE: "3,1", "OTHER": "x"}
