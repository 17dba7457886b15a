"""httptools' parser of one connection, without upgrades, and with the errors that clients get."""

from __future__ import annotations

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import InvalidRequest, ServiceError
from service.http.request_head import rebuild_head


class Refused(Exception):
    """Raised in a callback of the parser: the request is not parsed any further."""

    def __init__(self, error: ServiceError) -> None:
        super().__init__(str(error))
        self.error = error


class RequestParser:
    """Calls a protocol's `on_...` methods, as httptools' parser does.

    A request that asks for an upgrade is parsed as one that does not: RFC 9110, section 7.8.

    Args:
        protocol: Collects the `url` and `headers` of the current request.
    """

    def __init__(self, protocol: HttpToolsProtocol) -> None:
        self._protocol = protocol
        self._parser = _build(protocol)

    @property
    def is_upgrade(self) -> bool:
        """Whether the parser stops behind the current head, to parse it again."""
        return self._parser.should_upgrade() and self.get_method() != b"CONNECT"

    def get_method(self) -> bytes:
        """Of the current request, as sent."""
        return self._parser.get_method()

    def get_http_version(self) -> str:
        """Such as "1.1"."""
        return self._parser.get_http_version()

    def should_keep_alive(self) -> bool:
        """Whether the current request allows another one after it."""
        return self._parser.should_keep_alive()

    def should_upgrade(self) -> bool:
        """Never; asked by uvicorn."""
        return False

    def feed(self, data: bytes) -> None:
        """Parses bytes of the connection, whose requests need not end with them.

        Raises:
            ServiceError: They are not valid, or a callback has raised `Refused`.
        """
        rest = data
        try:
            while rest:
                rest = self._feed(rest)
        except httptools.HttpParserError as error:
            raise _explain(error) from error

    def _feed(self, data: bytes) -> bytes:
        """Parses up to the end of a head that asks for an upgrade; returns what follows."""
        try:
            self._parser.feed_data(data)
            return b""
        except httptools.HttpParserUpgrade as upgrade:
            end: int = upgrade.args[0]
        self._ignore_upgrade()  # not in the handler: its errors would get another __context__
        return data[end:]

    def _ignore_upgrade(self) -> None:
        """Parses the head again without the upgrade; llhttp would not read the body."""
        protocol = self._protocol
        version = self.get_http_version()
        head = rebuild_head(self.get_method(), protocol.url, version, protocol.headers)
        self._parser = _build(protocol)
        self._parser.feed_data(head)


def _build(protocol: HttpToolsProtocol) -> httptools.HttpRequestParser:
    parser = httptools.HttpRequestParser(protocol)
    # Data behind the last request of a connection are dropped, not an error of that request.
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


def _explain(error: httptools.HttpParserError) -> ServiceError:
    """The error that a client gets for one of the parser's."""
    cause = error.__context__
    if isinstance(cause, Refused):
        return cause.error
    reason = error if cause is None else "the request target cannot be read"
    return InvalidRequest(f"the request is not valid HTTP/1.1: {reason}")
