"""Stops training within seconds on SIGTERM, which cloud machines and job queues send."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.util  # registers its own exit handler
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store

from training import distributed

TERMINATED_STATUS = 143
"""Exit status after SIGTERM (128 + 15); not 0, because the run is not finished."""
_RECEIVED, _KNOWN, _READY = "received", "known", "ready"
_LOOK_S = 0.2
_LEAVE_S = 5.0
_PARENT_LOOK_S = 1.0


class Terminated(Exception):
    """Training was stopped by SIGTERM; its checkpoint is written if it had begun."""


class Interrupted(BaseException):
    """SIGTERM arrived in an interruptible part; not an `Exception`, so that no library hides it."""


class TerminationRequest:
    """Context manager in which the first SIGTERM sets `received`, and a second one kills.

    Of several processes one that receives it is enough: a thread of each looks into a store that
    they share, and sends SIGTERM to its own process once another has received it. The thread also
    learns of the signal while the main thread waits for another process, where no Python runs.
    Further signals are then ignored, because job queues and torchrun may each send one; no process
    leaves before all know, or `_LEAVE_S` have passed.

    Python sets signal handlers only in the main thread; in any other, `received` stays false.

    Args:
        store: Shared by the processes; None: there is only this one.
        processes: Number of processes.
        rank: That of this process; the first one leaves last.
    """

    def __init__(self, store: Store | None = None, processes: int = 1, rank: int = 0) -> None:
        self.received = False
        self._store, self._processes, self._rank = store, processes, rank
        self._interruptible = False
        self._process = os.getpid()
        self._before: Any = None
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None
        self._wakeup: tuple[socket.socket, socket.socket] | None = None
        self._wakeup_before = -1

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loading process that has just been forked
            return
        self.received = True
        if self._store is None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._interruptible:
            self._interruptible = False  # a further signal must not interrupt the way out
            raise Interrupted

    @contextlib.contextmanager
    def interruptible(self, enabled: bool = True) -> Iterator[None]:
        """Context in which SIGTERM raises `Interrupted` at once, if it is enabled.

        What runs in it must not change the state of the run.
        """
        if enabled and self.received:
            raise Interrupted
        self._interruptible = enabled
        try:
            yield
        finally:
            self._interruptible = False

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Context in which another process that leaves after SIGTERM raises `Interrupted` here."""
        try:
            yield
        except RuntimeError as error:
            if not (self.received and distributed.is_lost_peer(error)):
                raise
            raise Interrupted from error

    def __enter__(self) -> TerminationRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)
            if self._store is not None:
                self._start_watching(self._store)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._watcher is not None and self._wakeup is not None:
            self._watcher.join()
            signal.set_wakeup_fd(self._wakeup_before)
            for end in self._wakeup:
                end.close()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _start_watching(self, store: Store) -> None:
        reader, writer = self._wakeup = socket.socketpair()
        writer.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, args=(store, reader), daemon=True)
        self._watcher.start()

    def _watch(self, store: Store, wakeup: socket.socket) -> None:
        """Tells the other processes of a SIGTERM, or this process of theirs."""
        with contextlib.suppress(RuntimeError):  # the process that has the store has left
            while not (self.received or self._ended.is_set()):
                if select.select([wakeup], [], [], _LOOK_S)[0]:
                    self.received |= signal.SIGTERM in wakeup.recv(100)  # a byte for each signal
                elif store.check([_RECEIVED]):
                    self.received = True
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            if self.received:
                store.set(_RECEIVED, "1")
                self._agree(store, _KNOWN)
                self._agree(store, _READY, wait=self._rank == 0)  # the store may be its own

    def _agree(self, store: Store, key: str, *, wait: bool = True) -> None:
        """Counts this process; waits for the others, `_LEAVE_S` at most."""
        count = store.add(key, 1)
        deadline = time.monotonic() + _LEAVE_S
        while wait and count < self._processes and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            count = store.add(key, 0)


def interrupt_backward(model: nn.Module) -> None:
    """Lets signals be handled during a backward pass on the CPU, once for each parameter.

    Python handles a signal only between operations of its own, and a backward pass is one.
    """

    def return_to_python(parameter: Tensor) -> None:
        pass

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(return_to_python)  # type: ignore[no-untyped-call]


def init_worker(worker: int) -> None:
    """Makes a data loading process end with the main process, and only with it.

    It ignores signals that are sent to the whole job, because the main process may need it to
    finish a step.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    watch = threading.Thread(
        target=_end_with_parent, args=(os.getppid(),), name="parent", daemon=True
    )
    watch.start()


def _end_with_parent(parent_id: int) -> None:
    """Ends this process without the exit handlers once its parent has ended.

    One of them waits until batches are written to a pipe that nobody reads any more. The end of the
    parent closes the sentinel, but a worker that was forked later may keep it open.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    while parent.is_alive() and os.getppid() == parent_id:
        parent.join(_PARENT_LOOK_S)
    os._exit(1)


def _kill_workers() -> None:
    if hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would raise an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


# Exit handlers run in reverse order of registration: this one runs before that of multiprocessing,
# which sends SIGTERM to data loading processes that are left after an error and waits for them.
atexit.register(_kill_workers)
