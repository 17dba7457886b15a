from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.errors import (
    BodyTooLarge,
    InvalidParameter,
    SourceForbidden,
    SourceUnavailable,
    StartupError,
)
from service.jobs.sources import Sources

MOST_BYTES = 1000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("in/a.png", "in/deep/b.jpg", "in/notes.txt", "secret/c.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "in"


@pytest.fixture
def sources(root: Path) -> Sources:
    return Sources(f" {root}, ", MOST_BYTES)


def test_folders_files_and_globs_are_listed_and_read(sources: Sources, root: Path) -> None:
    files, listing = sources.list_files([f"file://{root}/", f"file://{root}/*.png"])
    assert [file.name for file in files] == ["a.png", "deep/b.jpg"]
    assert listing.describe_left_out()[0].endswith("notes.txt: no suffix of a supported image")
    contents = [sources.read(file.source or "") for file in files]
    assert contents == [b"in/a.png", b"in/deep/b.jpg"]


@pytest.mark.parametrize("name", ["a b%20c#.png", "ä[1].png", os.fsdecode(b"\xff\xfe.png")])
def test_names_survive_their_uri(sources: Sources, root: Path, name: str) -> None:
    (root / name).write_bytes(b"this one")
    files, _ = sources.list_files([f"file://{root}/"])
    assert [sources.read(f.source or "") for f in files].count(b"this one") == 1
    for file in files:
        file.name.encode()


@pytest.mark.parametrize(
    "given",
    [
        "file:///etc/passwd",
        "file://{root}/../secret/c.png",
        "file://{root}/%2e%2e/secret/c.png",
        "file://{root}/deep/../../secret/",
        "file://{root}/../*/c.png",
        "file://{root}evil/a.png",
        "file:///*/*/*/*",
        "file://{root}/link/c.png",
        "file://{root}/link/",
        "s3://bucket/a.png",
    ],
)
def test_what_is_outside_the_roots_is_refused(sources: Sources, root: Path, given: str) -> None:
    (root / "link").symlink_to(root.parent / "secret")
    with pytest.raises(SourceForbidden, match=r"not in a (folder|store) that jobs may read"):
        sources.list_files([given.format(root=root)])


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("{root}/a.png", "is not a URI"),
        ("file://server/a.png", "names the host 'server'"),
        ("file://{root}/gone.png", "is not an image or a folder"),
        ("file://{root}/*.webp", "matches none"),
        ("file://{root}/a%00.png", "zero byte"),
        ("file://{root}/empty/", "is not an image or a folder with images"),
    ],
)
def test_what_names_no_image_is_refused(sources: Sources, root: Path, given: str, why: str) -> None:
    (root / "empty").mkdir()
    with pytest.raises(InvalidParameter, match=f"inputs: .*{why}"):
        sources.list_files([given.format(root=root)])


def test_links_are_followed_only_below_the_roots(sources: Sources, root: Path) -> None:
    (root / "out.png").symlink_to(root.parent / "secret" / "c.png")
    (root / "outside").symlink_to(root.parent / "secret")
    (root / "deep" / "inside.png").symlink_to(root / "a.png")
    files, listing = sources.list_files([f"file://{root}/"])
    assert sorted(file.name for file in files) == ["a.png", "deep/b.jpg"]
    left_out = " ".join(listing.describe_left_out())
    assert left_out.count("a link to a place that is not allowed") == 2
    assert "secret" not in left_out


def test_a_link_that_takes_a_files_place_is_not_read(sources: Sources, root: Path) -> None:
    files, _ = sources.list_files([f"file://{root}/deep/"])
    (source,) = [file.source or "" for file in files]
    (root / "deep").rename(root / "old")
    (root / "deep").symlink_to(root.parent / "secret")
    (root.parent / "secret" / "b.jpg").write_bytes(b"secret")
    with pytest.raises(SourceForbidden):
        sources.read(source)


def test_a_folder_that_becomes_a_link_between_check_and_open_is_not_followed(
    sources: Sources, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root.parent / "secret" / "b.jpg").write_bytes(b"secret")
    files, _ = sources.list_files([f"file://{root}/deep/"])
    before = str(root / "deep" / "b.jpg")
    (root / "deep").rename(root / "old")
    (root / "deep").symlink_to(root.parent / "secret")
    monkeypatch.setattr(os.path, "realpath", lambda path: before)
    with pytest.raises(SourceUnavailable, match="cannot be read"):
        sources.read(files[0].source or "")


def test_gone_large_and_special_files_are_named(sources: Sources, root: Path) -> None:
    os.mkfifo(root / "pipe.png")
    (root / "large.png").write_bytes(bytes(MOST_BYTES + 1))
    with pytest.raises(SourceUnavailable, match="No such file"):
        sources.read(f"file://{root}/gone.png")
    with pytest.raises(SourceUnavailable, match="not a regular file"):
        sources.read(f"file://{root}/pipe.png")
    with pytest.raises(SourceUnavailable):
        sources.read(f"file://{root}")
    with pytest.raises(BodyTooLarge, match="has 1001 bytes, the limit is 1000"):
        sources.read(f"file://{root}/large.png")


def test_stores_are_read_below_their_root_alone() -> None:
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("pyarrow")
    store = fsspec.filesystem("memory")
    for name in ("jobs store/in/a.png", "jobs store/in/b.png", "jobs store/other.png"):
        store.pipe(f"/{name}", name.encode())
    sources = Sources("memory://jobs store/in", MOST_BYTES)
    files, _ = sources.list_files(["memory://jobs store/in/"])
    assert [file.name for file in files] == ["a.png", "b.png"]
    assert sources.read(files[1].source or "") == b"jobs store/in/b.png"
    for given in (
        "memory://jobs store/other.png",
        "memory://jobs store/in/../other.png",
        "memory://jobs store/in/a.png?endpoint_override=169.254.169.254",
    ):
        with pytest.raises(SourceForbidden):
            sources.list_files([given])
    with pytest.raises(SourceUnavailable, match="No such file"):
        sources.read("memory://jobs store/in/gone.png")
    store.rm("/jobs store", recursive=True)


def test_without_roots_nothing_is_read(root: Path) -> None:
    with pytest.raises(SourceForbidden):
        Sources("", MOST_BYTES).list_files([f"file://{root}/a.png"])
    with pytest.raises(StartupError, match="'images' is neither an absolute path nor a URI"):
        Sources("images", MOST_BYTES)
