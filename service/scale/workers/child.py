"""A worker: the whole server, but its connections come from the parent."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time

import uvicorn

from service.background import spawn
from service.engines.visible import share_devices, show_devices
from service.errors import StartupError
from service.grpc.front import build_front_ends
from service.http.accept import serve_connection
from service.http.servers import AdminServer, DrainingServer, build_server, freeze_imports
from service.http.signals import END_S, EXIT_FAILED, SIGNALS, end_process
from service.models.repository import load_repository
from service.observe.gpus import find_gpus
from service.observe.logs import configure_logging
from service.observe.rare import RareWarning
from service.protocol import Segmenter
from service.scale.workers.channel import ADMIN, MAIN, ChannelClosed, Order, State, WorkerEnd
from service.scale.workers.peers import Peers
from service.segmenter import LocalSegmenter
from service.settings import Settings

logger = logging.getLogger(__name__)

BEAT_S = 0.25
"""Time between two reports to the parent, which tell it that the event loop runs."""


def run_child(settings: Settings, index: int, channel: socket.socket) -> None:
    """Serves until the parent says that it is enough, or has ended; the process's main function.

    Args:
        settings: This worker's share.
        index: Its number.
        channel: To the parent.
    """
    for number in SIGNALS:
        # A terminal and service managers signal every process; only the parent's word counts.
        signal.signal(number, signal.SIG_IGN)
    configure_logging(settings.log_level, settings.log_format)
    end_with_parent(settings.drain_timeout_s + END_S)
    freeze_imports()
    if settings.device_names and settings.device != "cpu":
        own = share_devices(settings.device_names, index, settings.workers)
        settings = settings.with_devices(own)
        show_devices(own)
    try:
        repository = load_repository(
            settings.model_repo,
            settings.backend_options(),
            may_be_empty=settings.models_may_change,
        )
        channel.setblocking(False)
        end = WorkerEnd(channel)
        peers = Peers(index, settings.workers, end.ask)
        if settings.device != "cpu" and index == 0:  # one is enough to watch the machine's GPUs
            peers.metrics.watch_gpus(find_gpus())
        segmenter = LocalSegmenter(settings, repository, peers.metrics)
        intake = Intake(end, segmenter, peers)
        fronts = build_front_ends(settings)
        server = build_server(settings, repository, segmenter, intake, fronts)
    except StartupError as error:
        sys.exit(f"solo-serve: error: worker {index}: {error}")
    server.run()
    if segmenter.failure is not None:
        logger.error("the process ends to be replaced: %s", segmenter.failure)
        end_process(EXIT_FAILED)
    end_process(0)


def end_with_parent(limit_s: float) -> None:
    """Ends this process soon after its parent, even if its event loop hangs.

    Args:
        limit_s: Time for the drain that begins when the parent has ended.
    """

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        time.sleep(limit_s)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


class Intake:
    """Where a worker's connections and signals come from, in place of sockets that listen.

    Args:
        channel: To the parent.
        segmenter: Of the servers.
        peers: The other workers.
    """

    has_signals = True

    def __init__(self, channel: WorkerEnd, segmenter: Segmenter, peers: Peers) -> None:
        self._channel = channel
        self._segmenter = segmenter
        self._peers = peers
        self._main: DrainingServer
        self._servers: dict[int, uvicorn.Server] = {}
        self._is_closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._warn = RareWarning(logger)

    async def start(self, main: DrainingServer, admin: AdminServer | None) -> None:
        """Gives the servers the connections that come; needs a running event loop."""
        self._main = main
        self._servers = {MAIN: main} if admin is None else {MAIN: main, ADMIN: admin}
        asyncio.get_running_loop().add_reader(self._channel.channel, self._receive)
        self._beat()

    def stop(self) -> None:
        """Takes no more; signals are still heard, and reports sent."""
        self._is_closed = True
        self._report()

    def _beat(self) -> None:
        self._report()
        asyncio.get_running_loop().call_later(BEAT_S, self._beat)

    def _report(self) -> None:
        """Tells the parent how many connections there are, and what becomes of new ones."""
        served = sum(len(server.server_state.connections) for server in self._servers.values())
        if self._is_closed:
            state = State.CLOSED
        elif self._segmenter.failure is not None:
            state = State.FAILED
        else:
            state = State.SERVES if self._segmenter.is_ready else State.REFUSES
        self._channel.report(served + len(self._tasks), state)

    def _receive(self) -> None:
        try:
            for message in self._channel.receive():
                match message.kind:
                    case Order.CONNECTION:
                        self._take(message.number, message.connection)
                    case Order.SIGNAL:
                        self._main.handle_signal(message.number)
                    case Order.COLLECT:
                        self._peers.write_to(message.connection)
                    case Order.METRICS:
                        self._peers.read_from(message.number, message.tag, message.connection)
        except ChannelClosed:
            asyncio.get_running_loop().remove_reader(self._channel.channel)
            self._main.handle_signal(signal.SIGTERM)
        else:
            self._report()  # before the tasks of new connections read from them

    def _take(self, listener: int, connection: socket.socket | None) -> None:
        if connection is None:
            self._warn("a connection is refused, this process has no file descriptor left for it")
        elif self._is_closed:
            connection.close()
        else:
            # Without a report the parent would give the next ones to others.
            work = serve_connection(self._servers[listener], connection, self._report)
            spawn(work, self._tasks)
