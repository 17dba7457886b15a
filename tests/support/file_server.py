"""A local HTTP server whose files, headers and failures a test chooses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FileServer:
    """Serves `files`; what each request does can be changed while it runs.

    Attributes:
        url: Base URL, e.g. http://127.0.0.1:40000.
        files: Content by path without the leading slash.
        etag, modified: Headers sent with a file; "" sends none.
        ranges: Whether Range is obeyed.
        ignore_if_range: Answers a Range request although If-Range names another version.
        cut_after: Body bytes after which each of the next responses breaks off.
        statuses: Status of each of the next responses, before files are served again.
        send_length: Whether Content-Length is sent.
        requests: Path and headers of every request so far.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    etag: str = '"one"'
    modified: str = ""
    ranges: bool = True
    ignore_if_range: bool = False
    cut_after: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    send_length: bool = True
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)


@contextmanager
def serve_files(files: dict[str, bytes] | None = None) -> Iterator[FileServer]:
    """A running server."""
    state = FileServer(files=dict(files or {}))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests.append((self.path, dict(self.headers)))
            content = state.files.get(self.path.split("?")[0].rpartition("/")[2])
            status = state.statuses.pop(0) if state.statuses else 200
            if status != 200 or content is None:
                self.send_error(status if status != 200 else 404)
                return
            _send(self, state, content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield state
        server.shutdown()


def _send(handler: BaseHTTPRequestHandler, state: FileServer, content: bytes) -> None:
    wanted = handler.headers.get("Range")
    same = handler.headers.get("If-Range") in (None, state.etag, state.modified)
    body = content
    if wanted and state.ranges and (same or state.ignore_if_range):
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start >= len(content):
            handler.send_error(416)
            return
        body = content[start:]
        handler.send_response(206)
        last = len(content) - 1
        handler.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
    else:
        handler.send_response(200)
    if state.send_length:
        handler.send_header("Content-Length", str(len(body)))
    if state.etag:
        handler.send_header("ETag", state.etag)
    if state.modified:
        handler.send_header("Last-Modified", state.modified)
    handler.end_headers()
    handler.wfile.write(body[: state.cut_after.pop(0)] if state.cut_after else body)
