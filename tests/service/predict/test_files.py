from __future__ import annotations

import sys
from pathlib import Path

import pytest

from service.errors import StartupError
from service.predict import files
from service.predict.files import RemoteFile, key_of, list_store, read_file, stamp_of
from service.predict.inputs import find_files, find_image_id


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "some images"
    for name in ("a.png", "a/b.JPG", "a/deeper/c.png", "d%41.png", "notes.txt"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    return folder


@pytest.fixture
def uri(images: Path) -> str:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra ray")
    return f"file://{images}".replace(" ", "%20")


def names(found: list[RemoteFile], folder: Path) -> list[str]:
    return [Path(file.path).relative_to(folder).as_posix() for file in found]


def test_a_uri_gives_what_its_folder_gives_in_the_same_order(images: Path, uri: str) -> None:
    remote, local = list_store(uri), find_files([str(images)])
    assert names(remote, images) == [Path(str(f)).relative_to(images).as_posix() for f in local]
    assert len(remote) == 4
    assert [stamp_of(file) for file in remote] == [stamp_of(file) for file in local]
    assert [read_file(file) for file in remote] == [read_file(file) for file in local]
    assert list_store(uri + "/") == remote


def test_files_and_globs(images: Path, uri: str) -> None:
    assert names(list_store(f"{uri}/notes.txt"), images) == ["notes.txt"]
    assert names(list_store(f"{uri}/*.png"), images) == ["a.png", "dA.png".replace("A", "%41")]
    assert names(list_store(f"{uri}/**/*.[pJ]*"), images) == names(list_store(uri), images)
    assert names(list_store(f"{uri}/?.png"), images) == ["a.png"]
    assert list_store(f"{uri}/missing") == []
    assert list_store(f"{uri}/missing/*.png") == []
    with pytest.raises(StartupError, match="matches none"):
        find_files([f"{uri}/*.webp"])


def test_a_changed_file_has_another_stamp_and_a_missing_one_cannot_be_read(
    images: Path, uri: str
) -> None:
    (before,) = list_store(f"{uri}/a.png")
    (images / "a.png").write_bytes(b"longer than before")
    (after,) = list_store(f"{uri}/a.png")
    assert stamp_of(before) != stamp_of(after)
    assert key_of(before) == key_of(after)
    (images / "a.png").unlink()
    with pytest.raises(FileNotFoundError):
        read_file(after)


def test_a_stores_settings_are_used_and_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def open_store(root: str) -> tuple[object, str]:
        opened.append(root)
        return object(), "bucket"

    monkeypatch.setattr(files, "_open_store", open_store)
    monkeypatch.setattr(files, "_find", lambda store, start: {f"{start}/x.png": (3, 4)})
    settings = "?endpoint_override=localhost:9000&scheme=http"
    (file,) = list_store(f"s3://bucket/deep/er{settings}")
    assert str(file) == key_of(file) == "s3://bucket/deep/er/x.png"
    assert (file.path, file.name, file.stem) == ("bucket/deep/er/x.png", "x.png", "x")
    assert opened == [f"s3://bucket/{settings}"]
    assert find_image_id(file, {"er/x.png": 5, "x.png": 6}) == 5


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
        list_store(given)
    assert "secret" not in str(caught.value)


def test_without_pyarrow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(StartupError, match=r"s3://none/ needs pyarrow.*solo-serve\[ray\]"):
        list_store("s3://none/x.png")
