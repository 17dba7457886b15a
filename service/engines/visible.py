"""SOLO_DEVICES: which GPUs this process sees, by the variable that CUDA itself reads.

A process can use several GPUs, but only one MIG slice. With several workers each gets a share.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping

from service.engines.driver import count_gpus
from service.errors import DeviceError

VARIABLE = "CUDA_VISIBLE_DEVICES"
ALL = "all"
MIG = "MIG-"
_DEVICE = re.compile(r"\d{1,4}|(GPU|MIG)-[0-9A-Za-z/-]{4,80}")


def parse_devices(text: str) -> tuple[str, ...]:
    """`all`, or ordinals and UUIDs, comma-separated.

    Raises:
        ValueError: Names what is neither, or a device that is named twice.
    """
    devices = tuple(part.strip() for part in text.split(","))
    if devices == (ALL,):
        return devices
    for device in devices:
        if not _DEVICE.fullmatch(device):
            raise ValueError(
                f"{device!r} is no device: expected all, an ordinal, GPU-<uuid> or MIG-<uuid>"
            )
        if devices.count(device) > 1:
            raise ValueError(f"{device} is named twice")
    return devices


def share_devices(devices: tuple[str, ...], index: int, workers: int) -> tuple[str, ...]:
    """A worker's devices: every n-th, or one that several workers share."""
    return devices[index::workers] or (devices[index % len(devices)],)


def check_shares(devices: tuple[str, ...], workers: int) -> None:
    """Makes sure that no process gets a MIG slice and another device.

    Raises:
        ValueError: One would.
    """
    slices = sum(device.startswith(MIG) for device in devices)
    if slices and (slices < len(devices) or slices > workers):
        raise ValueError(
            f"devices {','.join(devices)}: CUDA gives a process one MIG slice and nothing beside "
            f"it; name slices alone, with workers at least {max(2, slices)}"
        )


def resolve_devices(
    devices: tuple[str, ...], environment: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """The names that CUDA takes; `all` and ordinals count what the environment shows already.

    Raises:
        DeviceError: The environment hides all GPUs, or an ordinal is beyond what it shows.
    """
    visible = [name.strip() for name in environment.get(VARIABLE, "").split(",") if name.strip()]
    if VARIABLE in environment and not visible:
        raise DeviceError(f"devices {','.join(devices)}: {VARIABLE} is empty, which hides all GPUs")
    if devices == (ALL,):
        return tuple(visible) or tuple(map(str, range(max(1, count_gpus()))))
    if not visible:
        return devices
    for device in devices:
        if device.isdigit() and int(device) >= len(visible):
            raise DeviceError(
                f"device {device} is beyond the {len(visible)} of {VARIABLE}={','.join(visible)}"
            )
    return tuple(visible[int(name)] if name.isdigit() else name for name in devices)


def show_devices(
    devices: tuple[str, ...], environment: MutableMapping[str, str] = os.environ
) -> None:
    """Makes CUDA see these devices alone, in this order; before anything of CUDA is called."""
    environment[VARIABLE] = ",".join(devices)
