"""A clock for what takes one as an argument."""

from __future__ import annotations


class SetClock:
    """A clock that tests set by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s
