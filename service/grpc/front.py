"""The gRPC front end, if a port is set; grpc is imported only then."""

from __future__ import annotations

from service.errors import StartupError
from service.http.servers import FrontEnd
from service.settings import Settings


def build_front_ends(settings: Settings, *, shares_port: bool | None = None) -> list[FrontEnd]:
    """The front ends beside HTTP.

    Args:
        settings: Of the server.
        shares_port: Whether other processes listen on the port, too; default: with workers.

    Raises:
        StartupError: The port is not available, the extra is not installed, or the certificate
            cannot be used.
    """
    if settings.grpc_port is None:
        return []
    try:
        from service.grpc.server import GrpcServer
    except ImportError as error:
        raise StartupError(
            f"SOLO_GRPC_PORT needs the extra 'grpc' of solo-serve: {error}"
        ) from error
    shares = settings.workers > 1 if shares_port is None else shares_port
    return [GrpcServer(settings, shares_port=shares)]
