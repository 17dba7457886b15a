"""A worker's process, as the parent has it."""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import SpawnProcess

from service.scale.workers.channel import ChannelClosed, ParentEnd, State
from service.settings import Settings

SILENCE_S = 1.0
"""A worker that has not reported for so long gets no new connections."""
_KILL_S = 5.0
"""How long the end of a killed process is waited for."""


class WorkerProcess:
    """A worker from its start to its end.

    Args:
        target: Its main function; see `run_child`.
        settings: Its share.
        index: Its number.

    Attributes:
        channel: To it.
        process: Its process.
        is_ready: Whether it has reported.
        is_killed: Whether `kill` was called; its end will follow.
        deadline_s: When it is killed, by the monotonic clock; None if it is to go on.

    Raises:
        OSError: There is no process, memory or file descriptor left for it.
    """

    def __init__(self, target: Callable[..., None], settings: Settings, index: int) -> None:
        self.index = index
        self.is_ready = False
        self.is_killed = False
        self.deadline_s: float | None = None
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self.process: SpawnProcess = multiprocessing.get_context("spawn").Process(
                    target=target, args=(settings, index, theirs), name=f"worker-{index}"
                )
                self.process.start()
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        self.channel = ParentEnd(ours)

    @property
    def answers(self) -> bool:
        """Whether it takes connections, as far as is known."""
        is_open = self.is_ready and not self.is_killed and self.channel.state is not State.CLOSED
        return is_open and not self.is_silent_for(SILENCE_S)

    @property
    def rank(self) -> tuple[bool, int]:
        """Order in which workers get connections, first the least."""
        return self.channel.state is not State.SERVES, self.channel.connections

    def is_silent_for(self, limit_s: float) -> bool:
        """Whether it has not reported for longer than a time."""
        return time.monotonic() - self.channel.heard_s > limit_s

    def end_within(self, limit_s: float) -> None:
        """Sets when it is killed, unless that is sooner already."""
        deadline_s = time.monotonic() + limit_s
        self.deadline_s = min(deadline_s, self.deadline_s or deadline_s)

    def bury(self) -> list[tuple[int, socket.socket]]:
        """Frees what it held after it has ended.

        Returns:
            Connections that it has not received, with the numbers of their listeners.
        """
        self.process.join(_KILL_S)
        with suppress(ChannelClosed):
            while self.channel.read() is not None:
                pass
        self.channel.channel.close()
        return self.channel.take_back()

    def kill(self) -> None:
        """Has it end at once."""
        self.is_killed = True
        self.process.kill()

    def destroy(self) -> None:
        """Kills it, and frees what it held."""
        self.kill()
        for _, connection in self.bury():
            connection.close()
