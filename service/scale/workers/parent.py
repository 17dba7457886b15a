"""The parent: has the ports, gives each connection to the worker with the fewest, watches them."""

from __future__ import annotations

import logging
import math
import multiprocessing
import selectors
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any

from service.cores import count_cores
from service.errors import StartupError
from service.http.servers import bind, log_address
from service.scale.workers.channel import ADMIN, MAIN, SIGNALS, ChannelClosed, ParentEnd
from service.scale.workers.child import run_child
from service.settings import Settings

logger = logging.getLogger(__name__)

BACKLOG = 2048
WHAT = {MAIN: "running", ADMIN: "admin endpoints"}
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
_LAST_S = 5.0
"""How long a worker may take to end after it has closed its channel."""
_MOST_AT_ONCE = 64
_PAUSE_S = 0.01
_PAUSES = 100
"""How often, and how long each time, a connection waits until a worker has room for it."""


@dataclass(eq=False)
class _Worker:
    """A worker's process.

    Attributes:
        is_ready: Whether it takes connections.
    """

    index: int
    process: SpawnProcess
    end: ParentEnd
    is_ready: bool = False


def share(settings: Settings) -> Settings:
    """The settings of one worker process: its share of the server's limits.

    Threads that were not set are divided too; engines get twice their share, so that a busy worker
    uses the cores of an idle one. The largest image stays allowed, unless its limit follows from
    a small queue.
    """
    count, cores = settings.workers, count_cores()
    own = math.ceil(cores / count)
    queue, image = math.ceil(settings.max_queue_canvases / count), settings.max_image_canvases
    follows = image < Settings.model_fields["max_image_canvases"].default
    if follows and "max_image_canvases" not in settings.model_fields_set:
        image = max(1, queue // 2)
    queue = max(queue, 2 * image)
    threads = {"pool_threads": own, "threads": min(cores, 2 * own)}
    return settings.model_copy(
        update={name: n for name, n in threads.items() if name not in settings.model_fields_set}
        | {
            "max_queue_canvases": queue,
            "max_image_canvases": image,
            "max_decoded_pixels": math.ceil(settings.max_decoded_pixels / count),
            "max_connections": math.ceil(settings.max_connections / count),
            "max_bodies_bytes": max(
                settings.max_body_bytes, math.ceil(settings.max_bodies_bytes / count)
            ),
        }
    )


def run_workers(settings: Settings) -> None:
    """Serves with several processes until a signal; returns when all have ended.

    Raises:
        StartupError: A port cannot be had, or a worker cannot start.
    """
    with ExitStack() as stack:
        main = bind(settings.host, settings.port, "requests")
        listeners = {MAIN: stack.enter_context(main)}
        if settings.admin_port is not None:
            admin = bind(settings.admin_host, settings.admin_port, WHAT[ADMIN])
            listeners[ADMIN] = stack.enter_context(admin)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="solo-")))
        parent = Parent(settings, listeners, folder)
        stack.enter_context(_pass_signals(parent.handle_signal, parent.woken))
        parent.run()


@contextmanager
def _pass_signals(handle: Callable[[int], None], wake: socket.socket) -> Iterator[None]:
    """Signals are handled by a function, and end a wait for the other end of `wake`."""

    def handler(number: int, frame: FrameType | None) -> None:
        handle(number)

    before = {number: signal.signal(number, handler) for number in SIGNALS}
    descriptor = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, old in before.items():
            signal.signal(number, old)


class Parent:
    """Starts the workers, and others in place of those that die.

    Args:
        settings: Of the whole server.
        listeners: Bound sockets by number; they listen as soon as a worker is ready.
        folder: For the workers' sockets.
        target: A worker's main function; see `run_child`.

    Attributes:
        woken: Written to when a signal comes.
    """

    def __init__(
        self,
        settings: Settings,
        listeners: dict[int, socket.socket],
        folder: Path,
        target: Callable[..., None] = run_child,
    ) -> None:
        self._settings = settings
        self._listeners = listeners
        self._folder = folder
        self._target = target
        self._workers: dict[int, _Worker] = {}
        self._due_s: dict[int, float] = dict.fromkeys(range(settings.workers), 0.0)
        self._pauses_s = dict.fromkeys(range(settings.workers), FIRST_PAUSE_S)
        self._has_listened = False
        self._ending = False
        self._selector = selectors.DefaultSelector()
        self._wake, self.woken = socket.socketpair()
        for end in (self._wake, self.woken):
            end.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ, self._drop_wake)

    def run(self) -> None:
        """Serves until a signal.

        Raises:
            StartupError: A worker has ended before any was ready.
        """
        try:
            while self._workers or not self._ending:
                self._start_due()
                for key, _ in self._selector.select(self._next_due()):
                    key.data()
        finally:
            for worker in self._workers.values():
                worker.process.kill()
                worker.process.join()
            self._selector.close()
            self._wake.close()
            self.woken.close()

    def handle_signal(self, number: int) -> None:
        """Passes a signal on to the workers; none is started any more."""
        self._ending = True
        for worker in self._workers.values():
            if worker.is_ready:
                worker.end.pass_signal(number)
            else:
                worker.process.kill()  # it has no work yet

    def _next_due(self) -> float | None:
        if self._ending or not self._due_s:
            return None
        return max(0.0, min(self._due_s.values()) - time.monotonic())

    def _start_due(self) -> None:
        for index, due_s in tuple(self._due_s.items()):
            if due_s <= time.monotonic() and not self._ending:
                del self._due_s[index]
                self._start(index)

    def _start(self, index: int) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        arguments = (share(self._settings), index, theirs, self._folder)
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=self._target, args=arguments, name=f"worker-{index}")
        process.start()
        theirs.close()
        worker = _Worker(index, process, ParentEnd(ours))
        self._workers[index] = worker
        self._watch(ours, partial(self._hear, worker))
        if self._ending:  # the signal came meanwhile
            process.kill()

    def _watch(self, source: Any, act: Callable[[], None]) -> None:
        self._selector.register(source, selectors.EVENT_READ, act)

    def _hear(self, worker: _Worker) -> None:
        try:
            is_report = worker.end.read_reports()
        except ChannelClosed:
            self._bury(worker)
            return
        if is_report and not worker.is_ready:
            logger.info("worker %d is ready", worker.index)
            self._pauses_s[worker.index] = FIRST_PAUSE_S
            worker.is_ready = True
            self._listen()

    def _bury(self, worker: _Worker) -> None:
        """A worker has ended: another takes its place, unless all are to end.

        Raises:
            StartupError: None has ever been ready.
        """
        self._selector.unregister(worker.end.channel)
        worker.end.channel.close()
        worker.process.join(_LAST_S)
        worker.process.kill()  # one that does not end though its channel is closed
        worker.process.join()
        del self._workers[worker.index]
        code = worker.process.exitcode
        if not self._ready:
            self._hold()
        if self._ending:
            return
        if not self._has_listened:
            raise StartupError(
                f"worker {worker.index} cannot start (exit status {code}); see above"
            )
        pause_s = self._pauses_s[worker.index]
        self._pauses_s[worker.index] = min(2 * pause_s, LONGEST_PAUSE_S)
        self._due_s[worker.index] = time.monotonic() + pause_s
        logger.error(
            "worker %d has died (exit status %s), another starts in %g s",
            worker.index,
            code,
            pause_s,
        )

    @property
    def _ready(self) -> list[_Worker]:
        return [worker for worker in self._workers.values() if worker.is_ready]

    def _listen(self) -> None:
        """Accepts connections from now on."""
        for number, listener in self._listeners.items():
            if not self._has_listened:
                listener.listen(BACKLOG)
                listener.setblocking(False)
                log_address(listener, WHAT[number])
            if listener not in self._selector.get_map():
                self._watch(listener, partial(self._accept, number))
        self._has_listened = True

    def _hold(self) -> None:
        """Leaves connections in the system's queue until a worker is ready."""
        for listener in self._listeners.values():
            if listener in self._selector.get_map():
                self._selector.unregister(listener)

    def _accept(self, number: int) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                connection, _ = self._listeners[number].accept()
            except OSError:  # nobody is left; or the client is gone, or there are too many files
                return
            with connection:
                if not self._give(number, connection):
                    logger.error("no worker has had room for a connection for 1 s, it is closed")
                    return

    def _give(self, number: int, connection: socket.socket) -> bool:
        """To the worker with the fewest connections; to the next if it has no room."""
        for _ in range(_PAUSES):
            for worker in sorted(self._ready, key=lambda worker: worker.end.connections):
                if worker.end.pass_connection(number, connection):
                    return True
            time.sleep(_PAUSE_S)
        return False

    def _drop_wake(self) -> None:
        self._wake.recv(4096)
