from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest

from service.errors import StartupError
from service.jobs import files
from service.jobs.files import (
    LocalFile,
    RemoteFile,
    as_line,
    as_local,
    as_text,
    build_folder,
    is_uri,
    list_store,
)
from service.jobs.inputs import find_files


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "some images"
    for name in ("a.png", "a/b.JPG", "a/deeper/c.png", "d%41.png", "notes.txt", ".hid/e.png"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    return folder


@pytest.fixture
def uri(images: Path) -> str:
    """A store of pyarrow whose files are local."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra ray")
    return f"file://{images}"


def find(uri: str, left_out: dict[str, str] | None = None) -> list[RemoteFile]:
    skipped = {} if left_out is None else left_out
    _, found = list_store(uri, skipped.__setitem__)
    return sorted(found, key=lambda file: Path(file.path))


def names(found: list[RemoteFile], folder: Path) -> list[str]:
    return [Path(file.path).relative_to(folder).as_posix() for file in found]


def test_a_store_gives_what_a_folder_gives(images: Path, uri: str) -> None:
    left_out: dict[str, str] = {}
    remote, local = find(uri, left_out), find_files([str(images)]).files
    assert names(remote, images) == [Path(str(f)).relative_to(images).as_posix() for f in local]
    assert len(remote) == 4
    assert [f.read_stamp() for f in remote] == [f.read_stamp() for f in local]
    assert [f.read() for f in remote] == [f.read() for f in local]
    assert find(uri + "/") == remote
    assert left_out == {
        f"{uri}/notes.txt": "no suffix of a supported image",
        f"{uri}/.hid/e.png": "hidden",
    }


@pytest.mark.parametrize(
    ("pattern", "found", "folder"),
    [
        ("notes.txt", ["notes.txt"], ""),
        ("*.png", ["a.png", "d%41.png"], ""),
        ("**/*.[pJ]*", ["a.png", "a/b.JPG", "a/deeper/c.png", "d%41.png"], ""),
        ("?.png", ["a.png"], ""),
        ("a/**", ["a/b.JPG", "a/deeper/c.png"], "/a"),
        ("a/*/c.*", ["a/deeper/c.png"], "/a"),
        ("missing", [], "/missing"),
        ("missing/*.png", [], "/missing"),
    ],
)
def test_files_and_globs(
    images: Path, uri: str, pattern: str, found: list[str], folder: str
) -> None:
    left_out: dict[str, str] = {}
    searched, files_found = list_store(f"{uri}/{pattern}", left_out.__setitem__)
    assert {Path(f.path).relative_to(images).as_posix() for f in files_found} == {*found}
    assert searched == uri + folder
    assert left_out == ({f"{uri}/.hid/e.png": "hidden"} if pattern.startswith("**") else {})


def test_files_of_a_store_are_among_the_inputs() -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra ray")
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed: the extra ray")
    store = fsspec.filesystem("memory")
    for name in ("b/2.png", "b/10.png", "a/1.png", "a/x.txt"):
        store.pipe(f"/of this test/{name}", name.encode())
    try:
        found = find_files(["memory://of this test/b", "memory://of this test/*/1.*"])
        assert [file.read() for file in found.files] == [b"b/10.png", b"b/2.png", b"a/1.png"]
        assert [found.name_of(file) for file in found.files] == ["b/10.png", "b/2.png", "a/1.png"]
        found = find_files(["memory://of this test/a", "memory://of this test/a/1.png"])
        assert [found.name_of(file) for file in found.files] == ["1.png"]
        assert found.describe_left_out() == [
            "memory://of this test/a/x.txt: no suffix of a supported image"
        ]
        with pytest.raises(StartupError, match="matches none"):
            find_files(["memory://of this test/*.webp"])
        listed = find_files([], ["memory://of this test/a/1.png", "memory://of this test/gone.png"])
        assert [file.read() for file in listed.files] == [b"a/1.png"]
        assert listed.unreadable == {"memory://of this test/gone.png": "no such file"}
    finally:
        store.rm("/of this test", recursive=True)


def test_a_changed_file_has_another_stamp_and_a_missing_one_cannot_be_read(
    images: Path, uri: str
) -> None:
    (before,) = find(f"{uri}/a.png")
    (images / "a.png").write_bytes(b"longer than before")
    (after,) = find(f"{uri}/a.png")
    assert before.read_stamp() != after.read_stamp()
    assert before.key == after.key
    (images / "a.png").unlink()
    with pytest.raises(FileNotFoundError):
        after.read()


def test_a_stores_settings_are_used_and_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Info:
        path, size, mtime_ns = "bucket/deep/er/x.png", 3, 4

    def open_store(root: str) -> tuple[object, str]:
        opened.append(root)
        return object(), "bucket"

    monkeypatch.setattr(files, "_open_store", open_store)
    monkeypatch.setattr(files, "_find", lambda store, start, leave_out: (start, [Info]))
    settings = "?endpoint_override=localhost:9000&scheme=http"
    (file,) = find(f"s3://bucket/deep/er{settings}")
    assert str(file) == file.key == file.address == "s3://bucket/deep/er/x.png"
    assert (file.path, file.stem, file.read_stamp()) == ("bucket/deep/er/x.png", "x", [3, 4])
    assert opened == [f"s3://bucket/{settings}"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("s3://key:secret@bucket/x", r"s3://\.\.\.@bucket: a password"),
        ("nothing://bucket/x", "nothing://bucket/: Unrecognized.*fsspec: Protocol not known"),
    ],
)
def test_what_cannot_be_opened_is_named(given: str, reason: str) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra ray")
    with pytest.raises(StartupError, match=reason) as caught:
        find_files([given])
    assert "secret" not in str(caught.value)


def test_without_pyarrow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(StartupError, match=r"s3://none/ requires pyarrow, in the extra 's3'"):
        find_files(["s3://none/x.png"])


@pytest.mark.parametrize(
    ("given", "local"),
    [
        ("a.png", "a.png"),
        ("s3://bucket/x", "s3://bucket/x"),
        ("file:///data/a%20b.png", "/data/a b.png"),
        ("file://localhost/data/*.png", "/data/*.png"),
        ("file:/data", "file:/data"),
    ],
)
def test_file_uris_are_local_paths(given: str, local: str) -> None:
    assert as_local(given) == local
    assert is_uri(local) is local.startswith("s3:")


def test_a_local_file_has_one_key_and_its_path_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = {"": "x/a.png", ".": "x/a.png", "./": "x/a.png", str(tmp_path): f"{tmp_path}/x/a.png"}
    for given, text in shown.items():
        file = LocalFile(build_folder(given), "x/a.png")
        assert (str(file), file.stem) == (text, "a")
        assert file.path == file.address == file.key == f"{tmp_path}/x/a.png"
        assert pickle.loads(pickle.dumps(file)) == file
    up = LocalFile(build_folder("x/.."), "a.png")
    assert (up.path, up.address) == (f"{tmp_path}/x/../a.png", f"{tmp_path}/a.png")
    assert LocalFile(build_folder("/"), "a.png").address == "/a.png"


def test_keys_of_names_that_are_not_utf8_are_unique() -> None:
    folder = build_folder("/data")
    names = ["\udcff.png", "\\xff.png", "%FF.png", "ÿ.png"]
    keys = [LocalFile(folder, name).key for name in names]
    assert len({*keys}) == 4
    assert [key.encode().decode() for key in keys] == keys
    assert keys[0] == "file:///data/%FF.png"


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    folder = build_folder(str(tmp_path))
    for name, reason in (("pipe", "not a regular file"), (".", "not a regular"), ("x", "No such")):
        with pytest.raises(OSError, match=reason):
            LocalFile(folder, name).read_stamp()


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a b.png", "a b.png", "a b.png"),
        ("\udcff.png", "\\xff.png", "\\xff.png"),
        ("\ud800.png", "\\ud800.png", "\\ud800.png"),
        ("a\nb\x1b[1m", "a\nb\x1b[1m", "a\\nb\\x1b[1m"),
        ("\u202e\u2028\x85", "\u202e\u2028\x85", "\\u202e\\u2028\\x85"),
        ("Zürich 東京", "Zürich 東京", "Zürich 東京"),
    ],
)
def test_names_in_results_and_messages(name: str, text: str, line: str) -> None:
    assert as_text(name) == text
    assert as_line(name) == line
