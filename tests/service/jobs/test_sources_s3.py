"""Files of an object store, with the client library of the extra `s3` and a local server."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from service.errors import (
    BodyTooLarge,
    InvalidParameter,
    JobsUnavailable,
    ServiceError,
    SourceBusy,
    SourceForbidden,
    SourceUnavailable,
)
from service.jobs.files import ATTEMPTS
from service.jobs.sources import Sources
from tests.support.s3_server import ENVIRONMENT, StoreServer, serve_store

MOST_BYTES = 1000
FILE, BUCKET = "bucket/in/000.png", "bucket"
URI = f"s3://{FILE}"
ODD = ("a b.png", "ä+#%41.png", "[1]*.png", "what?x=1.png", "q?.png")

pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra s3")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def store() -> Iterator[StoreServer]:
    objects = {f"bucket/in/{n:03}.png": b"file %d" % n for n in range(25)}
    objects |= {"bucket/in/notes.txt": b"", "bucket/other/x.png": b"secret"}
    with serve_store(objects) as running:
        yield running


@pytest.fixture
def sources(store: StoreServer) -> Sources:
    return build_sources(store)


def build_sources(store: StoreServer) -> Sources:
    return Sources(f"s3://bucket/in{store.settings}", MOST_BYTES)


def test_a_listing_of_several_pages_is_whole_and_each_file_is_read(
    store: StoreServer, sources: Sources
) -> None:
    store.page = 10
    files, listing = sources.list_files(["s3://bucket/in/"])
    assert [file.name for file in files] == [f"{n:03}.png" for n in range(25)]
    assert [left.partition(":")[0] for left in listing.describe_left_out()] == ["s3"]
    assert sum("continuation-token" in query for _, _, query in store.requests) == 2
    contents = [sources.read(file.source or "") for file in files]
    assert contents == [b"file %d" % n for n in range(25)]
    globbed, _ = sources.list_files(["s3://bucket/in/?0[12].png"])
    assert [file.name for file in globbed] == ["001.png", "002.png"]
    (one,), _ = sources.list_files([URI])
    assert (one.name, one.source) == ("000.png", URI)


@pytest.mark.parametrize("name", ODD)
def test_names_survive_their_uri(store: StoreServer, sources: Sources, name: str) -> None:
    store.objects = {f"bucket/in/{other}": other.encode() for other in ODD}
    files, _ = sources.list_files(["s3://bucket/in/"])
    (file,) = [file for file in files if file.name == name]
    assert sources.read(file.source or "") == name.encode()
    del store.objects[f"bucket/in/{name}"]
    with pytest.raises(SourceUnavailable, match="No such file"):
        sources.read(file.source or "")


@pytest.mark.parametrize(
    ("given", "error", "why"),
    [
        ("s3://bucket/in/gone/", InvalidParameter, "'s3://bucket/in/gone/' is not an image"),
        ("s3://bucket/in/*.webp", InvalidParameter, "'s3://bucket/in/.*webp' is not .* none"),
        ("s3://bucket/in/?region=eu-west-1", SourceForbidden, "has settings of a store"),
        ("s3://bucket/other/x.png", SourceForbidden, "not in a store"),
        ("s3://bucket/in/../other/x.png", SourceForbidden, "not in a store"),
        ("s3://bucket/index.png", SourceForbidden, "not in a store"),
    ],
)
def test_what_cannot_be_listed_is_named_without_the_stores_settings(
    store: StoreServer, sources: Sources, given: str, error: type[ServiceError], why: str
) -> None:
    with pytest.raises(error, match=why) as caught:
        sources.list_files([given])
    assert store.address not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error"),
    [(403, SourceUnavailable), (404, SourceUnavailable), (500, SourceBusy), (503, SourceBusy)],
)
def test_what_passes_is_told_from_what_does_not(
    store: StoreServer, sources: Sources, status: int, error: type[ServiceError]
) -> None:
    store.always[FILE] = status
    with pytest.raises(SourceUnavailable, match="the file cannot be read") as caught:
        sources.read(URI)
    assert type(caught.value) is error
    assert store.count("HEAD", FILE) == (ATTEMPTS if error is SourceBusy else 1)
    store.always = {BUCKET: status}
    listed = JobsUnavailable if error is SourceBusy else SourceUnavailable
    with pytest.raises(listed, match="inputs: "):
        sources.list_files(["s3://bucket/in/"])


@pytest.mark.parametrize("failures", [[500], [503, 500], [200, 500], [200, 200, -1]])
def test_a_failure_that_passes_is_tried_again(
    store: StoreServer, sources: Sources, failures: list[int]
) -> None:
    store.objects[FILE] = bytes(range(256)) * 3
    store.statuses[FILE] = failures
    assert sources.read(URI) == bytes(range(256)) * 3
    assert store.statuses[FILE] == []


def test_half_an_object_is_not_taken_for_the_whole(store: StoreServer, sources: Sources) -> None:
    store.objects[FILE] = bytes(range(256)) * 3
    store.always[FILE] = -1
    with pytest.raises(SourceBusy, match="bytes missing"):
        sources.read(URI)


def test_a_large_object_is_not_read(store: StoreServer, sources: Sources) -> None:
    store.objects[FILE] = bytes(MOST_BYTES + 1)
    with pytest.raises(BodyTooLarge, match="has 1001 bytes, the limit is 1000"):
        sources.read(URI)
    assert store.count("GET", FILE) == 0
    store.objects[FILE] = bytes(MOST_BYTES)
    assert sources.read(URI) == bytes(MOST_BYTES)


def test_a_store_that_nobody_serves_may_be_there_later() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        sources = build_sources(StoreServer(f"127.0.0.1:{unused.getsockname()[1]}"))
        with pytest.raises(SourceBusy, match="connect"):
            sources.read(URI)
