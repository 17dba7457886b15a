"""A local store that speaks as much of S3's protocol as reading needs, and fails as it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nonexistent",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
}
"""Of the client: no other store is asked for anything."""
_NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
_CODES = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}


@dataclass
class StoreServer:
    """Serves the objects of buckets.

    Attributes:
        address: Host and port.
        objects: Content by "bucket/key".
        page: Keys in one answer to a list.
        statuses: Of the next answers for a path "bucket/key", or "bucket" for lists; then it is
            served again. -1: half of the body, then the connection ends.
        always: Status of all answers for a path, as in `statuses`.
        silent: Paths whose requests are never answered.
        requests: Method, path and query of each request so far.
    """

    address: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    page: int = 1000
    statuses: dict[str, list[int]] = field(default_factory=dict)
    always: dict[str, int] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def settings(self) -> str:
        """What is written behind the URI of a root."""
        return f"?scheme=http&endpoint_override={self.address}&region=us-east-1"

    def count(self, method: str, path: str) -> int:
        """Requests of a path so far."""
        return sum(request[:2] == (method, path) for request in self.requests)

    def list_keys(self, bucket: str, query: dict[str, str]) -> str:
        """The answer to ListObjectsV2: keys, and prefixes up to the delimiter, in pages."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        found: dict[str, bytes | None] = {}
        for path, content in sorted(self.objects.items()):
            key = path.removeprefix(f"{bucket}/")
            if key == path or not key.startswith(prefix):
                continue
            head, mark, _ = key[len(prefix) :].partition(delimiter or "\0")
            found[prefix + head + mark] = None if mark else content
        after = query.get("continuation-token", "")
        names = [name for name in found if name > after]
        most = min(self.page, int(query.get("max-keys", "1000")))
        page, rest = names[:most], names[most:]
        parts = [f"<Name>{escape(bucket)}</Name><KeyCount>{len(page)}</KeyCount>"]
        parts.append(f"<IsTruncated>{str(bool(rest)).lower()}</IsTruncated>")
        if rest:
            parts.append(f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>")
        for name in page:
            listed = found[name]
            if listed is None:
                parts.append(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>")
            else:
                parts.append(
                    f"<Contents><Key>{escape(name)}</Key><Size>{len(listed)}</Size>"
                    "<LastModified>2026-01-02T03:04:05.000Z</LastModified></Contents>"
                )
        return f"<ListBucketResult {_NAMESPACE}>{''.join(parts)}</ListBucketResult>"


@contextmanager
def serve_store(objects: dict[str, bytes] | None = None) -> Iterator[StoreServer]:
    """A running server."""
    state = StoreServer(objects=dict(objects or {}))

    class Handler(_Handler):
        store = state

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        state.address = f"127.0.0.1:{server.server_address[1]}"
        try:
            yield state
        finally:
            state.ended.set()
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    store: StoreServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(sends_body=False)

    def do_GET(self) -> None:
        self._answer(sends_body=True)

    def _answer(self, *, sends_body: bool) -> None:
        store, parts = self.store, urlsplit(self.path)
        path = unquote(parts.path).strip("/")
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        store.requests.append((self.command, path, parts.query))
        if path in store.silent:
            store.ended.wait()
            self.close_connection = True
            return
        planned = store.statuses.get(path)
        status = planned.pop(0) if planned else store.always.get(path, 200)
        is_cut, headers = status == -1, {"Content-Type": "binary/octet-stream"}
        if status > 200:
            body = self._describe(status)
        elif "/" not in path:
            status, body = 200, store.list_keys(path, query).encode()
            headers["Content-Type"] = "application/xml"
        elif path not in store.objects:
            status, body = 404, self._describe(404)
        else:
            status, body = 200, store.objects[path]
            headers |= {"ETag": '"1"', "Last-Modified": formatdate(1.7e9, usegmt=True)}
            wanted = self.headers.get("Range", "").removeprefix("bytes=")
            if wanted:
                first, _, last = wanted.partition("-")
                begin, end = int(first), min(int(last or len(body)) + 1, len(body))
                headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(body)}"
                status, body = 206, body[begin:end]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if sends_body:
            self.wfile.write(body[: len(body) // 2] if is_cut else body)
        self.close_connection |= is_cut

    def _describe(self, status: int) -> bytes:
        code = _CODES.get(status, "Unknown")
        return f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()

    def log_message(self, *_: object) -> None:
        pass
