"""Downloads a file once into a cache; downloads can be resumed and are checked by SHA-256.

An unfinished download is kept in `<name>.partial`. `<name>.partial.json` stores the version of
the file (its ETag or date); a download is resumed only if the server still has that version.
Proxies are those of the environment (`https_proxy`, `no_proxy`, ...).
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from service.files import locked

CHUNK_BYTES = 1 << 18
TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
CACHE_VARIABLE = "SOLO_CACHE"


class DownloadError(OSError):
    """A file could not be downloaded; the message has the URL and what to do by hand."""


class _TransientError(Exception):
    """A failure after which a retry may succeed."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How long a download is tried.

    Attributes:
        timeout_s: Socket timeout.
        attempts: Consecutive attempts without a new byte before the download fails.
        backoff_s: Pause after the first of them; doubles with each.
    """

    timeout_s: float = 30.0
    attempts: int = 4
    backoff_s: float = 1.0


def cache_folder() -> Path:
    """`$SOLO_CACHE`, else `$XDG_CACHE_HOME/solo-serve`, else `~/.cache/solo-serve`."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "solo-serve"


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(
    url: str,
    file_name: str,
    *,
    sha256: str = "",
    folder: Path | None = None,
    retry: RetryPolicy = RetryPolicy(),
    progress: bool = True,
) -> Path:
    """A file in the cache, downloaded if it is not there.

    Args:
        url: http or https.
        file_name: Its name in the cache.
        sha256: Its SHA-256 or the first digits of it; "" checks nothing.
        folder: The cache; `cache_folder()` if None.
        retry: Timeout and attempts.
        progress: Shows a progress bar.

    Returns:
        Its path. Two processes that need the same file download it once.

    Raises:
        DownloadError: It cannot be downloaded, or has another hash.
    """
    target = (folder or cache_folder()) / file_name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(file_name + ".lock")
        lock.touch()
        with locked(lock):
            if target.exists():
                if hash_file(target).startswith(sha256.lower()):
                    return target
                target.unlink()
                tqdm.write(f"{target} does not have the SHA-256 {sha256}; deleted, downloading it")
            _download(url, _Partial(target), sha256, retry, progress)
    except DownloadError:
        raise
    except OSError as error:  # of the disk: network errors are already a DownloadError
        raise DownloadError(f"{target} cannot be written: {error}") from error
    return target


class _Partial:
    """An unfinished download: the bytes received so far and the version they belong to."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".partial")
        self.note = target.with_name(target.name + ".partial.json")

    @property
    def size(self) -> int:
        """Bytes received."""
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self) -> dict[str, str]:
        """Version that `begin` stored; empty if there is nothing to resume."""
        try:
            content = json.loads(self.note.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) and self.size else {}

    @property
    def complete(self) -> bool:
        """Whether all bytes that the server announced are there."""
        return self.version().get("total") == str(self.size)

    def begin(self, version: dict[str, str]) -> None:
        """Starts the download of a version from the first byte."""
        self.path.write_bytes(b"")
        self.note.write_text(json.dumps(version))

    def discard(self) -> None:
        """Deletes what was received."""
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def finish(self) -> None:
        """Renames the complete file to its final name."""
        os.replace(self.path, self.target)
        self.note.unlink(missing_ok=True)


def _download(url: str, partial: _Partial, sha256: str, retry: RetryPolicy, progress: bool) -> None:
    """Downloads, checks the hash and renames.

    Raises:
        DownloadError: As `fetch`.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{url} is neither an http nor an https URL")
    if not partial.complete:
        _download_with_retries(url, partial, retry, progress)
    found = hash_file(partial.path)
    if not found.startswith(sha256.lower()):
        partial.discard()
        raise DownloadError(
            f"{url} has the SHA-256 {found}, expected {sha256}{'...' if len(sha256) < 64 else ''}: "
            "it is damaged or another file; the downloaded file is deleted"
        )
    partial.finish()


def _download_with_retries(url: str, partial: _Partial, retry: RetryPolicy, progress: bool) -> None:
    failures = 0
    while True:
        before = partial.size
        try:
            return _attempt(url, partial, retry.timeout_s, progress)
        except _TransientError as error:
            failures = 1 if partial.size > before else failures + 1
            if failures >= retry.attempts:
                raise DownloadError(_advice(url, partial, str(error))) from error
            time.sleep(retry.backoff_s * 2 ** (failures - 1))
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            raise DownloadError(_advice(url, partial, reason)) from error


def _advice(url: str, partial: _Partial, reason: str) -> str:
    kept = f"{partial.size / 1e6:.1f} MB are kept, the same command resumes the download. "
    return (
        f"cannot download {url}: {reason}. {kept if partial.size else ''}"
        f"Without a connection, download that URL elsewhere and put the file at {partial.target}"
    )


def _attempt(url: str, partial: _Partial, timeout_s: float, progress: bool) -> None:
    """One request; resumes the download if the server still has the same version.

    Raises:
        _TransientError: The connection failed or broke.
        urllib.error.HTTPError: The server refuses permanently.
    """
    known = partial.version()
    headers = {"User-Agent": "solo-serve", "Accept-Encoding": "identity"}
    validator = known.get("etag") or known.get("modified")
    if validator:
        headers |= {"Range": f"bytes={partial.size}-", "If-Range": validator}
    try:
        # A new opener for every request: it reads the proxies of the environment when it is built.
        request = urllib.request.Request(url, headers=headers)
        response = urllib.request.build_opener().open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the file is shorter now, or no bytes are left to send
            partial.discard()
            raise _TransientError("the server does not have the rest of the file") from error
        if error.code in TRANSIENT_STATUS:
            raise _TransientError(f"the server answers {error.code} {error.reason}") from error
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _TransientError(str(getattr(error, "reason", error)) or repr(error)) from error
    with response:
        _receive(response, partial, known, progress)


def _receive(
    response: http.client.HTTPResponse, partial: _Partial, known: dict[str, str], progress: bool
) -> None:
    """Appends the body of a response, or starts from the first byte if it is a whole file.

    Raises:
        _TransientError: It ended early, or is not the part that was requested.
    """
    start, total = _extent(response)
    etag = response.headers.get("ETag", "")
    version = {
        "etag": "" if etag.startswith("W/") else etag,  # a weak one does not promise equal bytes
        "modified": response.headers.get("Last-Modified", ""),
        "total": str(total) if total is not None else "",
    }
    if start and (start != partial.size or version != known):
        partial.discard()
        raise _TransientError("the file on the server has changed")
    if not start:
        partial.begin(version)
    with (
        partial.path.open("ab") as file,
        tqdm(
            desc=partial.target.name,
            initial=start,
            total=total,
            unit="B",
            unit_scale=True,
            disable=not progress,
        ) as bar,
    ):
        while chunk := _read(response):
            file.write(chunk)
            bar.update(len(chunk))
    if total is not None and partial.size != total:
        raise _TransientError(f"the connection broke after {partial.size} of {total} bytes")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _TransientError(f"the connection broke: {error or repr(error)}") from error


def _extent(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Offset of the body in the file, and the length of the file if the server sends it.

    Raises:
        _TransientError: A partial response without its range.
    """
    length = response.headers.get("Content-Length", "")
    if response.status != 206:
        return 0, int(length) if length.isdecimal() else None
    unit, _, extent = response.headers.get("Content-Range", "").partition(" ")
    start, _, total = extent.replace("-", "/").partition("/")
    total = total.rpartition("/")[2]
    if unit != "bytes" or not start.isdecimal():
        raise _TransientError("the server's partial response has no Content-Range")
    return int(start), int(total) if total.isdecimal() else None
