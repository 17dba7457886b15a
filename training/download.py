"""Downloads a file once: into a cache, resumable, checked by its SHA-256.

The bytes of an unfinished download wait in `<name>.partial`; what the server called that version
of the file (its ETag or date) stands in `<name>.partial.json`, and only the same version is
continued. Proxies are those of the environment (`https_proxy`, `no_proxy`, ...).
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

CHUNK_BYTES = 1 << 18
PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
CACHE_VARIABLE = "SOLO_CACHE"


class DownloadError(OSError):
    """A file could not be fetched; the message has the URL and what to do by hand."""


class _Passing(Exception):
    """A failure that another attempt may not meet."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a download is tried.

    Attributes:
        timeout_s: Longest silence of the server.
        attempts: Attempts in a row that bring no byte before it is given up.
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
    patience: Patience = Patience(),
    progress: bool = True,
) -> Path:
    """A file of the cache, downloaded if it is not there.

    Args:
        url: Where it lies, http or https.
        file_name: What it is called in the cache.
        sha256: Its SHA-256 or the leading digits of it; "" checks nothing.
        folder: The cache; `cache_folder()` if None.
        patience: Timeouts and attempts.
        progress: Shows a bar.

    Returns:
        Its path. Two processes that ask for the same file download it once.

    Raises:
        DownloadError: It cannot be fetched or its hash is another one.
    """
    target = (folder or cache_folder()) / file_name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(file_name + ".lock")):
            if target.exists():
                if hash_file(target).startswith(sha256.lower()):
                    return target
                target.unlink()
                tqdm.write(f"{target} had another SHA-256 than {sha256}; deleted, fetching it anew")
            _download(url, target, sha256, patience, progress)
    except DownloadError:
        raise
    except OSError as error:  # of the disk; those of the network have become DownloadError
        raise DownloadError(f"{target} cannot be written: {error}") from error
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits until no other process holds the lock."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(url: str, target: Path, sha256: str, patience: Patience, progress: bool) -> None:
    """Fetches to `<name>.partial`, checks and renames.

    Raises:
        DownloadError: As `fetch`.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{url} is neither an http nor an https URL")
    partial = _Partial(target)
    if not partial.complete:
        _try_for_long(url, partial, patience, progress)
    found = hash_file(partial.path)
    if not found.startswith(sha256.lower()):
        partial.discard()
        raise DownloadError(
            f"{url} has the SHA-256 {found}, expected {sha256}{'...' if len(sha256) < 64 else ''}: "
            "it is damaged or another file; what was downloaded is deleted"
        )
    partial.finish()


def _try_for_long(url: str, partial: _Partial, patience: Patience, progress: bool) -> None:
    """Attempts until the file has come or patience ends.

    Raises:
        DownloadError: As `fetch`.
    """
    failures = 0
    while True:
        before = partial.size
        try:
            return _attempt(url, partial, patience.timeout_s, progress)
        except _Passing as error:
            failures = 1 if partial.size > before else failures + 1
            if failures >= patience.attempts:
                raise DownloadError(_advice(url, partial, str(error))) from error
            time.sleep(patience.backoff_s * 2 ** (failures - 1))
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            raise DownloadError(_advice(url, partial, reason)) from error


def _advice(url: str, partial: _Partial, reason: str) -> str:
    kept = f"{partial.size / 1e6:.1f} MB are kept, the same command goes on from there. "
    return (
        f"cannot download {url}: {reason}. {kept if partial.size else ''}"
        f"Without a connection, fetch that URL elsewhere and put the file at {partial.target}"
    )


class _Partial:
    """A file on its way: the bytes that have come and the version they belong to."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".partial")
        self.note = target.with_name(target.name + ".partial.json")

    @property
    def size(self) -> int:
        """Bytes that have come."""
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self) -> dict[str, str]:
        """What `begin` wrote; empty if there is nothing to continue."""
        try:
            content = json.loads(self.note.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) and self.size else {}

    @property
    def complete(self) -> bool:
        """Whether as many bytes have come as the server announced."""
        return self.version().get("total") == str(self.size)

    def begin(self, version: dict[str, str]) -> None:
        """Starts anew with a version of the file."""
        self.path.write_bytes(b"")
        self.note.write_text(json.dumps(version))

    def discard(self) -> None:
        """Deletes what has come."""
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def finish(self) -> None:
        """Gives the complete file its name."""
        os.replace(self.path, self.target)
        self.note.unlink(missing_ok=True)


def _attempt(url: str, partial: _Partial, timeout_s: float, progress: bool) -> None:
    """One request: continues what is there if the server has still the same version.

    Raises:
        _Passing: The connection failed or broke.
        urllib.error.HTTPError: The server refuses for good.
    """
    known = partial.version()
    headers = {"User-Agent": "solo-serve", "Accept-Encoding": "identity"}
    validator = known.get("etag") or known.get("modified")
    if validator:
        headers |= {"Range": f"bytes={partial.size}-", "If-Range": validator}
    try:
        # A new opener each time: it reads the proxies of the environment when it is built.
        request = urllib.request.Request(url, headers=headers)
        response = urllib.request.build_opener().open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the file has become shorter, or nothing of it is left to send
            partial.discard()
            raise _Passing("the server has not the rest of the file") from error
        if error.code in PASSING_STATUS:
            raise _Passing(f"the server answers {error.code} {error.reason}") from error
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _Passing(str(getattr(error, "reason", error)) or repr(error)) from error
    with response:
        _receive(response, partial, known, progress)


def _receive(
    response: http.client.HTTPResponse, partial: _Partial, known: dict[str, str], progress: bool
) -> None:
    """Appends a response's body, or writes it anew where it is not the rest of what is there.

    Raises:
        _Passing: It ended early, or is not what was asked for.
    """
    start, total = _extent(response)
    version = {
        "etag": response.headers.get("ETag", ""),
        "modified": response.headers.get("Last-Modified", ""),
        "total": str(total) if total is not None else "",
    }
    if version["etag"].startswith("W/"):  # a weak one does not promise the same bytes
        version["etag"] = ""
    if start and (start != partial.size or version != known):
        partial.discard()
        raise _Passing("the file on the server has changed")
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
        raise _Passing(f"the connection broke after {partial.size} of {total} bytes")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _Passing(f"the connection broke: {error or repr(error)}") from error


def _extent(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """First byte of the body within the file, and the file's length if the server tells it.

    Raises:
        _Passing: A partial answer that does not say which part it is.
    """
    length = response.headers.get("Content-Length", "")
    if response.status != 206:
        return 0, int(length) if length.isdecimal() else None
    unit, _, extent = response.headers.get("Content-Range", "").partition(" ")
    start, _, total = extent.replace("-", "/").partition("/")
    total = total.rpartition("/")[2]
    if unit != "bytes" or not start.isdecimal():
        raise _Passing("the server's partial answer has no Content-Range")
    return int(start), int(total) if total.isdecimal() else None
