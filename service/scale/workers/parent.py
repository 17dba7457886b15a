"""The parent: has the ports, gives each connection to the worker with the fewest, watches them."""

from __future__ import annotations

import logging
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

from service.errors import StartupError
from service.grpc.tls import read_tls
from service.http import listeners
from service.http.accept import PAUSE_S, Accepter
from service.http.listeners import bind, listen
from service.http.signals import END_S, EXIT_SIGNALS, handle_signals
from service.observe.rare import RareWarning
from service.scale.workers.channel import ADMIN, MAIN, ChannelClosed, Order, State
from service.scale.workers.child import run_child
from service.scale.workers.process import WorkerProcess
from service.scale.workers.shares import share
from service.settings import Settings

logger = logging.getLogger(__name__)

WHAT = {MAIN: listeners.MAIN, ADMIN: listeners.ADMIN}
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
TICK_S = 0.25
"""Longest time between two checks of the workers."""
STALL_S = 1.0
"""A longer time between two checks means that this process did not run, so workers may not have."""
_LAST_S = 5.0
"""How long a worker may take to end after it has closed its channel."""


def run_workers(settings: Settings) -> int:
    """Serves with several processes until a signal; returns when all have ended.

    Returns:
        The exit status: 0 after a drain, 1 if a worker had to be killed, 128 and the number of a
        second signal.

    Raises:
        StartupError: A port cannot be had, a certificate not be used, or a worker cannot start.
    """
    read_tls(settings)  # before each worker does
    with ExitStack() as stack:
        main = bind(settings.host, settings.port, "requests")
        sockets = {MAIN: stack.enter_context(main)}
        if settings.admin_port is not None:
            admin = bind(settings.admin_host, settings.admin_port, WHAT[ADMIN])
            sockets[ADMIN] = stack.enter_context(admin)
        if settings.grpc_port is not None:
            # Keeps other servers off the port; the workers listen on it.
            reserved = stack.enter_context(bind(settings.host, settings.grpc_port, "gRPC"))
            port = reserved.getsockname()[1]
            settings = settings.model_copy(update={"grpc_port": port})
        parent = Parent(settings, sockets)
        stack.enter_context(handle_signals(parent.take_signal))
        return parent.run()


class Parent:
    """Starts the workers, and others in place of those that die or do not answer.

    Args:
        settings: Of the whole server.
        sockets: Bound, by the listener's number; they listen as soon as a worker is ready.
        target: A worker's main function; see `run_child`.
    """

    def __init__(
        self,
        settings: Settings,
        sockets: dict[int, socket.socket],
        target: Callable[..., None] = run_child,
    ) -> None:
        self._settings = settings
        self._shared = share(settings)
        self._sockets = sockets
        self._target = target
        self._workers: dict[int, WorkerProcess] = {}
        self._due_s: dict[int, float] = dict.fromkeys(range(settings.workers), 0.0)
        self._pauses_s = dict.fromkeys(range(settings.workers), FIRST_PAUSE_S)
        self._accepters: dict[int, Accepter] = {}
        self._waiting: deque[tuple[int, socket.socket]] = deque()
        self._paused_until_s = 0.0
        self._checked_s = time.monotonic()
        self._ending = False
        self._status = 0
        self._warn = RareWarning(logger)
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        self._watch(self._wake, self._read_signals)

    def take_signal(self, number: int) -> None:
        """Handles a signal soon; may be called in a signal handler or another thread."""
        with suppress(OSError):  # it has ended
            self._woken.send(bytes([number]))

    def run(self) -> int:
        """Serves until a signal.

        Returns:
            The exit status, see `run_workers`.

        Raises:
            StartupError: A worker has ended before any was ready.
        """
        try:
            while self._workers or not self._ending:
                self._start_due()
                for key, _ in self._selector.select(TICK_S):
                    key.data()
                self._check()
                self._dispatch()
        finally:
            for worker in self._workers.values():
                worker.destroy()
            for _, connection in self._waiting:
                connection.close()
            for accepter in self._accepters.values():
                accepter.close()
            self._selector.close()
            self._wake.close()
            self._woken.close()
        return self._status

    def _watch(self, source: socket.socket | int, act: Callable[[], None]) -> None:
        self._selector.register(source, selectors.EVENT_READ, act)

    # --- signals --------------------------------------------------------------------------------

    def _read_signals(self) -> None:
        for number in self._wake.recv(4096):
            if number not in EXIT_SIGNALS:  # to reload; those that start now will read it
                self._send_signal(number)
            elif self._ending:
                self._status = 128 + number
                self._kill_all()
            else:
                self._end(number)

    def _end(self, number: int) -> None:
        """Passes a signal on to the workers; none is started any more."""
        self._ending = True
        self._due_s.clear()
        for worker in tuple(self._workers.values()):
            if worker.is_ready:
                worker.end_within(self._settings.drain_timeout_s + END_S)
            else:
                worker.kill()  # it has no work yet
        self._send_signal(number)

    def _send_signal(self, number: int) -> None:
        for worker in self._workers.values():
            worker.channel.send(Order.SIGNAL, number)

    def _kill_all(self) -> None:
        for worker in self._workers.values():
            worker.kill()

    # --- processes ------------------------------------------------------------------------------

    def _start_due(self) -> None:
        for index, due_s in tuple(self._due_s.items()):
            if due_s <= time.monotonic():
                del self._due_s[index]
                self._start(index)

    def _start(self, index: int) -> None:
        try:
            worker = WorkerProcess(self._target, self._shared, index)
        except OSError as error:
            self._postpone(index, f"cannot be started ({error})")
            return
        self._workers[index] = worker
        self._watch(worker.channel.channel, partial(self._hear, worker))
        self._watch(worker.process.sentinel, partial(self._bury, worker))

    def _hear(self, worker: WorkerProcess) -> None:
        if self._workers.get(worker.index) is not worker:
            return  # it was buried just now
        heard_s = worker.channel.heard_s
        try:
            tags = worker.channel.read() or ()
        except ChannelClosed:
            self._selector.unregister(worker.channel.channel)
            worker.channel.state = State.CLOSED
            worker.end_within(_LAST_S)
            return
        for tag in tags:
            self._collect(worker, tag)
        if worker.channel.heard_s == heard_s:
            return
        if not worker.is_ready:
            worker.is_ready = True
            logger.info("worker %d is ready", worker.index)
            self._pauses_s[worker.index] = FIRST_PAUSE_S
            self._listen()
        if worker.channel.state is State.FAILED and worker.deadline_s is None:
            logger.error("worker %d has failed, it is replaced", worker.index)
            worker.channel.send(Order.SIGNAL, signal.SIGTERM)
            worker.end_within(self._settings.drain_timeout_s + END_S)

    def _collect(self, asker: WorkerProcess, tag: int) -> None:
        """Connects a worker with all others, which tell it their metrics."""
        for index in range(self._settings.workers):
            if index == asker.index:
                continue
            other = self._workers.get(index)
            try:
                if other is None or not other.answers:
                    raise OSError("it is not available")
                ours, theirs = socket.socketpair()
                with ours, theirs:
                    other.channel.send(Order.COLLECT, carried=theirs)
                    asker.channel.send(Order.METRICS, index, tag, carried=ours)
            except OSError:
                asker.channel.send(Order.METRICS, index, tag)

    def _check(self) -> None:
        """Kills workers that have not answered, or not ended, in time."""
        now_s = time.monotonic()
        passed_s, self._checked_s = now_s - self._checked_s, now_s
        for worker in self._workers.values():
            if passed_s > STALL_S:  # stopped or starved, as the workers may have been
                worker.channel.heard_s = now_s
            limit_s = self._settings.worker_timeout_s
            if worker.is_killed:
                continue
            if worker.is_ready and worker.is_silent_for(limit_s):
                logger.error(
                    "worker %d has not answered for %g s, it is killed", worker.index, limit_s
                )
            elif worker.deadline_s is not None and now_s > worker.deadline_s:
                logger.error("worker %d has not ended in time, it is killed", worker.index)
                self._status = self._status or int(self._ending)
            else:
                continue
            worker.kill()

    def _bury(self, worker: WorkerProcess) -> None:
        """A worker has ended: another takes its place, unless all are to end.

        Raises:
            StartupError: None has ever been ready.
        """
        for source in (worker.channel.channel, worker.process.sentinel):
            if source in self._selector.get_map():
                self._selector.unregister(source)
        del self._workers[worker.index]
        self._waiting += worker.bury()
        if not self._ending:
            self._postpone(worker.index, f"has died (exit status {worker.process.exitcode})")

    def _postpone(self, index: int, reason: str) -> None:
        """Has another worker started after a pause."""
        if not self._accepters:
            raise StartupError(f"worker {index} {reason} before any was ready; see above")
        pause_s = self._pauses_s[index]
        self._pauses_s[index] = min(2 * pause_s, LONGEST_PAUSE_S)
        self._due_s[index] = time.monotonic() + pause_s
        logger.error("worker %d %s, another starts in %g s", index, reason, pause_s)

    # --- connections ----------------------------------------------------------------------------

    def _listen(self) -> None:
        """Listens from the first call on."""
        if self._accepters:
            return
        for number, listener in self._sockets.items():
            self._accepters[number] = listen(listener, WHAT[number])

    def _dispatch(self) -> None:
        """Hands over the connections that wait, and accepts more only if none is left.

        Others stay in the system's queue, where a worker that dies does not lose them.
        """
        while self._waiting and self._give(*self._waiting[0]):
            self._waiting.popleft()
        is_open = (
            not self._waiting
            and time.monotonic() >= self._paused_until_s
            and any(worker.answers for worker in self._workers.values())
        )
        for number in self._accepters:
            listener = self._sockets[number]
            is_watched = listener in self._selector.get_map()
            if is_open and not is_watched:
                self._watch(listener, partial(self._accept, number))
            elif is_watched and not is_open:
                self._selector.unregister(listener)

    def _accept(self, number: int) -> None:
        try:
            for connection in self._accepters[number].accept():
                if self._waiting or not self._give(number, connection):
                    self._waiting.append((number, connection))
        except OSError as error:
            self._accepters[number].refuse()
            self._paused_until_s = time.monotonic() + PAUSE_S
            self._warn("connections are refused: %s", error)

    def _give(self, number: int, connection: socket.socket) -> bool:
        """To a worker that serves and has the fewest connections, or else to any that answers."""
        workers = [worker for worker in self._workers.values() if worker.answers]
        for worker in sorted(workers, key=lambda worker: worker.rank):
            if worker.channel.pass_connection(number, connection):
                return True
        return False
