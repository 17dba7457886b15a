"""The gRPC server of one process."""

from __future__ import annotations

import logging
import os
import socket

from starlette.datastructures import State

from service.errors import StartupError
from service.http.listeners import bind
from service.settings import Settings

# grpc's own log would have a line for each connection that fails; errors are raised all the same.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from grpc import aio

from service.grpc.calls import RpcState
from service.grpc.handler import RpcHandler
from service.grpc.tls import read_tls

logger = logging.getLogger(__name__)
logging.getLogger("grpc").setLevel(logging.INFO)

GRPC = "gRPC"
MAX_STREAMS_OF_CONNECTION = 128
"""RPCs in flight on one connection; clients hold further ones back."""
_IDENTITY = 1  # bit set of the compression algorithms that are enabled


class GrpcServer:
    """Serves gRPC in the event loop of the HTTP server; a `FrontEnd`.

    The port is reserved at once, unless it is shared: then the system divides the connections
    among the processes that listen on it.

    Args:
        settings: Host, port and limits.
        shares_port: Whether other processes listen on the port, too.

    Raises:
        StartupError: The port is not available, or certificate or key cannot be used.
    """

    def __init__(self, settings: Settings, *, shares_port: bool) -> None:
        assert settings.grpc_port is not None
        self._settings = settings
        self._shares_port = shares_port
        self._reserved: socket.socket | None = None
        self._server: aio.Server | None = None
        self._tls = read_tls(settings)
        self.port = settings.grpc_port
        if not shares_port:
            self._reserved = bind(settings.host, settings.grpc_port, GRPC)
            self.port = self._reserved.getsockname()[1]

    async def start(self, state: State) -> None:
        """Listens.

        Args:
            state: Of the HTTP application, which has started.

        Raises:
            StartupError: Another server has begun to listen on the port.
        """
        host = self._settings.host
        shown = f"[{host}]" if ":" in host else host
        options = _build_options(self._settings, shares_port=self._shares_port)
        server = aio.server(options=options)
        server.add_generic_rpc_handlers([RpcHandler(RpcState(state))])
        try:
            if self._tls is None:
                server.add_insecure_port(f"{shown}:{self.port}")
            else:
                server.add_secure_port(f"{shown}:{self.port}", self._tls.build_credentials())
        except RuntimeError as error:
            raise StartupError(f"cannot serve {GRPC} on {host}:{self.port}: {error}") from error
        finally:
            if self._reserved is not None:
                self._reserved.close()
        await server.start()
        self._server = server
        secured = "" if self._tls is None else ", with TLS"
        logger.info("%s on %s:%d%s", GRPC, shown, self.port, secured)

    async def stop(self, limit_s: float) -> None:
        """Takes no more RPCs, and ends those in flight after a time."""
        if self._server is not None:
            await self._server.stop(limit_s)


def _build_options(settings: Settings, *, shares_port: bool) -> list[tuple[str, int]]:
    idle_ms = round(1e3 * settings.keep_alive_s)
    return [
        ("grpc.so_reuseport", int(shares_port)),
        ("grpc.max_receive_message_length", settings.max_body_bytes),
        ("grpc.max_send_message_length", -1),
        # A compressed message could be a thousand times as large; images do not get smaller.
        ("grpc.compression_enabled_algorithms_bitset", _IDENTITY),
        ("grpc.max_concurrent_streams", MAX_STREAMS_OF_CONNECTION),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.max_connection_idle_ms", idle_ms),
        # Finds clients that are gone without a word.
        ("grpc.keepalive_time_ms", idle_ms),
        ("grpc.keepalive_timeout_ms", round(1e3 * settings.write_timeout_s)),
        ("grpc.server_handshake_timeout_ms", round(1e3 * settings.head_timeout_s)),
    ]
