"""Which planes of a stack make a picture: parameters of a request against the axes of a file.

Planes, channels and times are counted from 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import PlaneError

MAXIMUM = "max"
"""As `z`: the brightest value of all planes."""
_COLOURS = ("red", "green", "blue")
_MOST_NAMED = 20


@dataclass(frozen=True)
class PlaneChoice:
    """What a request takes from files with several planes; None: there must be only one.

    Attributes:
        channel: Name or number of a channel.
        z: Number of a plane, or `max` for the maximum projection.
        t: Number of a point in time.
    """

    channel: str | None = None
    z: int | Literal["max"] | None = None
    t: int | None = None

    def named(self) -> dict[str, str | int]:
        """The parameters that are given."""
        given = {"channel": self.channel, "z": self.z, "t": self.t}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Stack:
    """The planes of a file.

    Attributes:
        axes: Names and lengths of the axes before height and width, slowest first: T, Z, C.
        samples: Values of a pixel in one plane.
        is_colour: The first three samples are red, green and blue.
        channels: Names of the channels, or of the samples; empty if the file has none.
    """

    axes: Mapping[str, int]
    samples: int
    is_colour: bool
    channels: Sequence[str] = ()

    @property
    def planes(self) -> int:
        """Number of planes."""
        return math.prod(self.axes.values())

    def locate(self, **position: int) -> int:
        """Index of a plane; axes without a position are at 0."""
        index = 0
        for axis, length in self.axes.items():
            index = index * length + position.get(axis, 0)
        return index


@dataclass(frozen=True)
class ChosenPlanes:
    """The planes that make a picture.

    Attributes:
        planes: For grey one entry, for colours three: the planes whose maximum is taken.
        samples: The samples of a pixel that are used: of each plane, if there is one entry.
    """

    planes: Sequence[Sequence[int]]
    samples: Sequence[int]


def choose_planes(stack: Stack, choice: PlaneChoice) -> ChosenPlanes:
    """The planes of a choice.

    Raises:
        PlaneError: The choice is incomplete, or the file has no such plane; lists what there is.
    """
    times, depth = stack.axes.get("T", 1), stack.axes.get("Z", 1)
    count, is_colour = stack.axes.get("C", 1), stack.axes.get("C") == 3
    if "C" not in stack.axes:
        count, is_colour = stack.samples, stack.is_colour
    _check_complete(stack, choice, count, is_colour)
    time = _check_number("t", "points in time", choice.t or 0, times)
    levels: Sequence[int] = range(depth)
    if choice.z != "max":
        levels = [_check_number("z", "planes", choice.z or 0, depth)]
    channels: Sequence[int] = range(3 if is_colour else 1)
    if choice.channel is not None:
        channels = [_find_channel(stack, choice.channel, count, is_colour)]
    if "C" in stack.axes:
        samples: Sequence[int] = range(3) if stack.is_colour else [0]
    else:
        channels, samples = [0], channels
    return ChosenPlanes(
        [[stack.locate(T=time, Z=z, C=channel) for z in levels] for channel in channels], samples
    )


def _check_complete(stack: Stack, choice: PlaneChoice, count: int, is_colour: bool) -> None:
    """Lists everything that has to be chosen."""
    missing = []
    for name, what, more in (("t", "points in time", ""), ("z", "planes", " or z=max")):
        length = stack.axes.get(name.upper(), 1)
        if length > 1 and getattr(choice, name) is None:
            missing.append(f"{length} {what} (choose one with {name}=0..{length - 1}{more})")
    if count > 1 and not is_colour and choice.channel is None:
        names = _list_channels(stack, count)
        missing.append(f"{count} channels (choose one with channel=: {names})")
    if missing:
        raise PlaneError(f"the image has {' and '.join(missing)}")


def _check_number(name: str, what: str, given: int, length: int) -> int:
    if given >= length:
        raise PlaneError(f"{name}={given}: the image has {length} {what}, counted from 0")
    return given


def _find_channel(stack: Stack, given: str, count: int, is_colour: bool) -> int:
    names = list(stack.channels) or (list(_COLOURS) if is_colour else [])
    same = [index for index, name in enumerate(names) if name.lower() == given.strip().lower()]
    if len(same) == 1:
        return same[0]
    if given.isascii() and given.isdigit() and len(given) < 10 and int(given) < count:
        return int(given)
    raise PlaneError(
        f"channel={given!r}: the image has {count} channels ({_list_channels(stack, count)})"
    )


def _list_channels(stack: Stack, count: int) -> str:
    names = [
        f"{index}: {stack.channels[index]!r}" if index < len(stack.channels) else str(index)
        for index in range(min(count, _MOST_NAMED))
    ]
    return ", ".join(names) + (", ..." if count > _MOST_NAMED else "")
