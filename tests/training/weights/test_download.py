"""Downloads from a local server that breaks off, changes its mind, refuses or lies."""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.file_server import FileServer, serve_files
from training.weights.download import DownloadError, RetryPolicy, cache_folder, fetch, hash_file

CONTENT = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
QUICK = RetryPolicy(timeout_s=5, attempts=3, backoff_s=0.01)
ONCE = RetryPolicy(timeout_s=5, attempts=1, backoff_s=0.01)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve_files({"model.pth": CONTENT}) as running:
        yield running


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def get(server: FileServer, folder: Path, **options: Any) -> Path:
    options = {"retry": QUICK, "progress": False, **options}
    return fetch(f"{server.url}/a/model.pth?download=true", "model.pth", folder=folder, **options)


def ranges(server: FileServer) -> list[str | None]:
    return [headers.get("Range") for _, headers in server.requests]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"model.pth.lock"}


@pytest.mark.parametrize("sha256", ["", SHA256[:8], SHA256, SHA256.upper()])
def test_a_file_is_fetched_once(server: FileServer, tmp_path: Path, sha256: str) -> None:
    path = get(server, tmp_path / "new" / "cache", sha256=sha256)
    assert path == tmp_path / "new" / "cache" / "model.pth"
    assert path.read_bytes() == CONTENT and hash_file(path) == SHA256
    assert names(path.parent) == {"model.pth"}
    assert get(server, path.parent, sha256=sha256) == path
    assert [name for name, _ in server.requests] == ["/a/model.pth?download=true"]


@pytest.mark.parametrize(("etag", "modified"), [('"v1"', ""), ("", "Sat, 01 Jan 2022")])
def test_a_cut_connection_is_continued(
    server: FileServer, tmp_path: Path, etag: str, modified: str
) -> None:
    server.etag, server.modified = etag, modified
    server.cut_after = [100_000, 50_000]
    assert get(server, tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=100000-", "bytes=150000-"]
    assert {h.get("If-Range") for _, h in server.requests[1:]} == {etag or modified}


def test_the_next_run_goes_on_where_the_last_was_cut(server: FileServer, tmp_path: Path) -> None:
    server.cut_after = [100_000]
    with pytest.raises(DownloadError, match=r"broke after 100000 of 512000.*0\.1 MB are kept"):
        get(server, tmp_path, retry=ONCE)
    assert names(tmp_path) == {"model.pth.partial", "model.pth.partial.json"}
    version = json.loads((tmp_path / "model.pth.partial.json").read_text())
    assert version == {"etag": '"one"', "modified": "", "total": "512000"}
    assert get(server, tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=100000-"]
    assert names(tmp_path) == {"model.pth"}


def test_a_complete_partial_file_needs_no_request(server: FileServer, tmp_path: Path) -> None:
    get(server, tmp_path).rename(tmp_path / "model.pth.partial")
    (tmp_path / "model.pth.partial.json").write_text(f'{{"total": "{len(CONTENT)}"}}')
    assert get(server, tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_progress_resets_the_attempts(server: FileServer, tmp_path: Path) -> None:
    server.cut_after = [50_000] * 8
    assert get(server, tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert len(server.requests) == 9


def test_a_server_without_ranges_sends_all_again(server: FileServer, tmp_path: Path) -> None:
    server.ranges = False
    server.cut_after = [100_000]
    assert get(server, tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=100000-"]


def test_a_server_without_ranges_that_always_breaks_is_given_up(
    server: FileServer, tmp_path: Path
) -> None:
    server.ranges = False
    server.cut_after = [100_000] * 20
    with pytest.raises(DownloadError, match="broke after 100000"):
        get(server, tmp_path)
    assert len(server.requests) == 3


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_an_unnamed_version_is_not_continued(server: FileServer, tmp_path: Path, etag: str) -> None:
    server.etag = etag
    server.cut_after = [100_000]
    assert get(server, tmp_path, sha256=SHA256).read_bytes() == CONTENT
    assert ranges(server) == [None, None]


@pytest.mark.parametrize("ignores", [False, True])
def test_a_changed_file_is_fetched_anew(server: FileServer, tmp_path: Path, ignores: bool) -> None:
    server.cut_after = [100_000]
    with pytest.raises(DownloadError):
        get(server, tmp_path, retry=ONCE)
    changed = CONTENT[::-1]
    server.files["model.pth"], server.etag, server.ignore_if_range = changed, '"two"', ignores
    assert get(server, tmp_path).read_bytes() == changed


def test_a_changed_length_under_the_same_name_is_fetched_anew(
    server: FileServer, tmp_path: Path
) -> None:
    server.cut_after = [100_000]
    with pytest.raises(DownloadError):
        get(server, tmp_path, retry=ONCE)
    for changed in (CONTENT + b"more", CONTENT[:50_000]):
        server.files["model.pth"] = changed
        assert get(server, tmp_path).read_bytes() == changed
        (tmp_path / "model.pth").rename(tmp_path / "model.pth.partial")
        note = '{"etag": "\\"one\\"", "modified": "", "total": "512000"}'
        (tmp_path / "model.pth.partial.json").write_text(note)


def test_a_damaged_note_starts_anew(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "model.pth.partial").write_bytes(b"old")
    (tmp_path / "model.pth.partial.json").write_text("{")
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert ranges(server) == [None]


def test_an_unknown_length_is_taken_as_it_comes(server: FileServer, tmp_path: Path) -> None:
    server.send_length = False
    assert get(server, tmp_path, sha256=SHA256).read_bytes() == CONTENT


def test_a_wrong_hash_deletes_the_file_and_says_so(server: FileServer, tmp_path: Path) -> None:
    expected = rf"model\.pth.* SHA-256 {SHA256}, expected 0123abcd\.\.\.: .*deleted"
    with pytest.raises(DownloadError, match=expected):
        get(server, tmp_path, sha256="0123abcd")
    assert names(tmp_path) == set()


def test_a_damaged_file_in_the_cache_is_replaced(
    server: FileServer, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "model.pth").write_bytes(b"half of it")
    assert get(server, tmp_path, sha256=SHA256[:8]).read_bytes() == CONTENT
    assert "deleted" in capsys.readouterr().out
    (tmp_path / "model.pth").write_bytes(b"half of it")
    server.statuses = [404]
    with pytest.raises(DownloadError, match="answers 404"):
        get(server, tmp_path, sha256=SHA256[:8])
    assert names(tmp_path) == set()


def test_a_passing_refusal_is_tried_again(server: FileServer, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    assert get(server, tmp_path).read_bytes() == CONTENT
    server.statuses = [500] * 9
    with pytest.raises(DownloadError, match="answers 500"):
        fetch(f"{server.url}/model.pth", "other.pth", folder=tmp_path, retry=QUICK)
    assert len(server.requests) == 3 + QUICK.attempts


@pytest.mark.parametrize("status", [404, 403])
def test_a_final_refusal_is_not_tried_again(
    server: FileServer, tmp_path: Path, status: int
) -> None:
    server.statuses = [status]
    with pytest.raises(DownloadError, match=rf"{re.escape(server.url)}.*answers {status}"):
        get(server, tmp_path)
    assert len(server.requests) == 1


def test_offline_says_what_to_fetch_and_where_to_put_it(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/model.pth"
        with pytest.raises(DownloadError) as caught:
            fetch(url, "model.pth", folder=tmp_path, retry=QUICK, progress=False)
    message = str(caught.value)
    assert url in message and "refused" in message
    assert message.endswith(f"put the file at {tmp_path / 'model.pth'}")


def test_a_file_put_there_by_hand_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(CONTENT)
    path = fetch("http://127.0.0.1:9/model.pth", "model.pth", sha256=SHA256[:8], folder=tmp_path)
    assert path == tmp_path / "model.pth"


def test_a_silent_server_runs_into_the_timeout(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/model.pth"
        patience = RetryPolicy(timeout_s=0.1, attempts=2, backoff_s=0.01)
        with pytest.raises(DownloadError, match="timed out"):
            fetch(url, "model.pth", folder=tmp_path, retry=patience, progress=False)


def test_the_proxy_of_the_environment_is_used(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    url = "http://weights.invalid/model.pth"
    assert fetch(url, "model.pth", folder=tmp_path, progress=False).read_bytes() == CONTENT
    assert [path for path, _ in server.requests] == [url]
    monkeypatch.setenv("no_proxy", "weights.invalid")
    with pytest.raises(DownloadError, match=r"weights\.invalid"):
        fetch(url, "direct.pth", folder=tmp_path, retry=ONCE, progress=False)


@pytest.mark.parametrize("url", ["file:///etc/hosts", "ftp://host/x", "model.pth"])
def test_other_schemes_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError, match=f"{url} is neither an http"):
        fetch(url, "model.pth", folder=tmp_path)


def test_a_cache_that_cannot_be_written_is_named(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match=r"file/model\.pth cannot be written"):
        get(server, tmp_path / "file")


def test_two_at_once_download_once(server: FileServer, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: get(server, tmp_path, sha256=SHA256), range(2))
    assert first == second and first.read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_the_bar_counts_from_where_it_resumed(
    server: FileServer, tmp_path: Path, capsys: Any
) -> None:
    server.cut_after = [256_000]
    get(server, tmp_path, progress=True)
    shown = capsys.readouterr().err
    assert "model.pth" in shown and "50%" in shown and "512k/512k" in shown


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLO_CACHE", "/a/b")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/a/b")
    monkeypatch.delenv("SOLO_CACHE")
    assert cache_folder() == Path("/xdg/solo-serve")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "solo-serve"
