"""Certificate and key of the gRPC port, which are read again when they have changed.

grpc is imported only to serve: the parent of several workers checks the files too.
"""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from service.errors import StartupError
from service.observe.rare import RareWarning
from service.settings import Settings

if TYPE_CHECKING:
    import grpc

logger = logging.getLogger(__name__)


class TlsFiles:
    """Two PEM files; if a changed one cannot be used, what was read before is.

    Args:
        certificate: The server's, followed by those that lead to its authority.
        key: Without a password.

    Raises:
        StartupError: They cannot be read, are no PEM files, or do not belong together.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._paths = certificate, key
        self._stamp = self._read_stamp()
        self._pair = self._read()
        self._warn = RareWarning(logger)

    def build_credentials(self) -> grpc.ServerCredentials:
        """For a server; each handshake looks whether the files have changed."""
        import grpc

        return grpc.dynamic_ssl_server_credentials(_configure(self._pair), self._find_changed)

    def _find_changed(self) -> grpc.ServerCertificateConfiguration | None:
        """What is new; None if nothing is. Called in threads of gRPC."""
        try:
            stamp = self._read_stamp()
            if stamp == self._stamp:
                return None
            self._pair = self._read()
        except StartupError as error:
            self._warn("the certificate of gRPC stays as it was: %s", error)
            return None
        self._stamp = stamp
        logger.info("gRPC has a new certificate from %s", self._paths[0])
        return _configure(self._pair)

    def _read_stamp(self) -> list[tuple[int, ...]]:
        try:
            found = [os.stat(path) for path in self._paths]
        except OSError as error:
            raise StartupError(f"grpc_tls: {error.filename}: {error.strerror}") from error
        return [(status.st_mtime_ns, status.st_size, status.st_ino) for status in found]

    def _read(self) -> tuple[bytes, bytes]:
        certificate, key = self._paths
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key, password=lambda: "")  # else it would ask
            return key.read_bytes(), certificate.read_bytes()
        except ssl.SSLError as error:
            raise StartupError(
                f"grpc_tls: {certificate} and {key} are no certificate and its key without a "
                f"password: {error.reason or error}"
            ) from error
        except OSError as error:
            name = error.filename or f"{certificate} or {key}"
            raise StartupError(f"grpc_tls: {name}: {error.strerror}") from error


def read_tls(settings: Settings) -> TlsFiles | None:
    """The files of the settings; None if there are none.

    Raises:
        StartupError: See `TlsFiles`.
    """
    if settings.grpc_tls_cert is None or settings.grpc_tls_key is None:
        return None
    return TlsFiles(settings.grpc_tls_cert, settings.grpc_tls_key)


def _configure(pair: tuple[bytes, bytes]) -> grpc.ServerCertificateConfiguration:
    import grpc

    return grpc.ssl_server_certificate_configuration([pair])
