"""A worker: the whole server, but its connections come from the parent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import signal
import socket
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from service.errors import StartupError
from service.http.servers import AdminServer, DrainingServer, build_server
from service.models.repository import load_repository
from service.observe.gpus import find_gpus
from service.observe.logs import configure_logging
from service.scale.merged_metrics import MergedMetrics, Report
from service.scale.workers.channel import ADMIN, MAIN, SIGNALS, ChannelClosed, WorkerEnd
from service.segmenter import LocalSegmenter
from service.settings import Settings

logger = logging.getLogger(__name__)

PEER_TIMEOUT_S = 2.0


def run_child(settings: Settings, index: int, channel: socket.socket, folder: Path) -> None:
    """Serves until the parent says that it is enough, or has ended; the process's main function.

    Args:
        settings: This worker's share.
        index: Its number.
        channel: To the parent.
        folder: Where the workers' sockets for metrics are.
    """
    for number in SIGNALS:
        # A terminal and service managers signal every process; only the parent's word counts.
        signal.signal(number, signal.SIG_IGN)
    configure_logging(settings.log_level, settings.log_format)
    try:
        repository = load_repository(
            settings.model_repo,
            settings.backend_options(),
            may_be_empty=settings.models_may_change,
        )
        peers = Peers(folder, index, settings.workers)
        metrics = MergedMetrics(peers.collect_all)
        if settings.device != "cpu" and index == 0:  # one is enough to watch the machine's GPUs
            metrics.watch_gpus(find_gpus())
        segmenter = LocalSegmenter(settings, repository, metrics)
        peers.metrics = metrics
        build_server(settings, repository, segmenter, Intake(channel, peers)).run()
    except StartupError as error:
        sys.exit(f"solo-serve: error: worker {index}: {error}")


class Peers:
    """The metrics of all workers, each asked over a socket of its own.

    Args:
        folder: Where the sockets are; nobody else can read it.
        index: This worker's number.
        count: Of workers.

    Attributes:
        metrics: This worker's.
    """

    metrics: MergedMetrics

    def __init__(self, folder: Path, index: int, count: int) -> None:
        self._folder = folder
        self._index = index
        self._count = count
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Answers the other workers from now on."""
        path = self._path(self._index)
        path.unlink(missing_ok=True)  # of one that has died
        self._server = await asyncio.start_unix_server(self._answer, path)

    def stop(self) -> None:
        """Answers no more."""
        if self._server is not None:
            self._server.close()

    async def collect_all(self) -> Sequence[Report]:
        """Every worker's metrics; one that does not answer is left out."""
        others = [index for index in range(self._count) if index != self._index]
        own, *answers = await asyncio.gather(
            self.metrics.collect(), *(self._ask(index) for index in others)
        )
        reports = [(str(self._index), own)]
        reports += [
            (str(index), answer)
            for index, answer in zip(others, answers, strict=True)
            if answer is not None
        ]
        return sorted(reports, key=lambda report: int(report[0]))

    async def _ask(self, index: int) -> Any:
        try:
            async with asyncio.timeout(PEER_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(self._path(index))
                try:
                    return pickle.loads(await reader.read(-1))
                finally:
                    writer.close()
        except (OSError, TimeoutError, EOFError, pickle.UnpicklingError) as error:
            logger.warning("worker %d does not tell its metrics: %r", index, error)
            return None

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(pickle.dumps(await self.metrics.collect()))
            await writer.drain()
        writer.close()

    def _path(self, index: int) -> Path:
        return self._folder / f"{index}.sock"


class Intake:
    """Where a worker's connections come from, in place of sockets that listen.

    Args:
        channel: To the parent.
        peers: Started and stopped with it.
    """

    def __init__(self, channel: socket.socket, peers: Peers) -> None:
        channel.setblocking(False)
        self._channel = WorkerEnd(channel)
        self._peers = peers
        self._main: DrainingServer
        self._servers: dict[int, uvicorn.Server] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self, main: DrainingServer, admin: AdminServer | None) -> None:
        """Gives the servers the connections that come; needs a running event loop."""
        self._main = main
        self._servers = {MAIN: main} if admin is None else {MAIN: main, ADMIN: admin}
        await self._peers.start()
        asyncio.get_running_loop().add_reader(self._channel.channel, self._receive)

    def report(self) -> None:
        """Tells the parent how many connections there are."""
        served = sum(len(server.server_state.connections) for server in self._servers.values())
        self._channel.report(served + len(self._tasks))

    def stop(self) -> None:
        """Takes no more; signals are still heard."""
        self._servers = {}
        self._peers.stop()

    def _receive(self) -> None:
        try:
            for number, connection in self._channel.receive():
                if connection is None:
                    self._main.handle_exit(number, None)
                elif number in self._servers:
                    self._spawn(self._serve(self._servers[number], connection))
                else:
                    connection.close()
        except ChannelClosed:
            asyncio.get_running_loop().remove_reader(self._channel.channel)
            self._main.handle_exit(signal.SIGTERM, None)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, server: uvicorn.Server, connection: socket.socket) -> None:
        """As uvicorn does with a connection that it has accepted itself."""

        def build() -> asyncio.Protocol:
            protocol: asyncio.Protocol = server.config.http_protocol_class(  # type: ignore[call-arg]
                config=server.config,
                server_state=server.server_state,
                app_state=server.lifespan.state,
            )
            lost = protocol.connection_lost

            def connection_lost(error: Exception | None) -> None:
                lost(error)
                self.report()  # the parent would give others the next ones

            protocol.connection_lost = connection_lost  # type: ignore[method-assign, assignment]
            return protocol

        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(build, connection)
        except OSError as error:  # the client is gone already
            connection.close()
            logger.debug("a connection was lost on its way: %s", error)
