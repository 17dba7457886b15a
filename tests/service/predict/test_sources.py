from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from service.errors import StartupError
from service.jobs.errors import RunFailed
from service.predict.sources import build_client, find_classes
from tests.solo_client.fake_server import FakeServer
from tests.support.blob_model import publish


def answer(content: object, status: str = "200 OK") -> list[bytes | float]:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return [head.encode() + b"\r\n\r\n" + body]


def arguments(url: str | None = None, model_repo: Path = Path()) -> argparse.Namespace:
    return argparse.Namespace(url=url, model_repo=model_repo, api_key_file=None)


def test_classes_come_from_the_server_or_the_repository(tmp_path: Path) -> None:
    classes = [{"category_id": 5, "name": "cell"}]
    with FakeServer(answer({"name": "a b", "classes": classes})) as server:
        (found,) = find_classes(arguments(server.url), "a b:3")
        assert (found.category_id, found.name) == (5, "cell")
        assert server.heads[0].startswith("GET /v2/models/a%20b/versions/3 ")
    publish(tmp_path)
    found_here = find_classes(arguments(model_repo=tmp_path), "blobs:1")
    assert [spec.name for spec in found_here] == ["red", "green", "blue"]
    assert find_classes(arguments("http://nowhere.invalid"), None) == ()


def test_a_model_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = answer({"error": "no such model", "code": "unknown_model"}, "404 Not Found")
    with FakeServer(gone) as server, pytest.raises(RunFailed, match=r"classes of m:1 .*no such"):
        find_classes(arguments(server.url), "m:1")
    publish(tmp_path)
    with pytest.raises(StartupError, match="m"):
        find_classes(arguments(model_repo=tmp_path), "m:1")


def test_a_bad_address_is_named() -> None:
    with pytest.raises(StartupError, match="--url nonsense"):
        build_client(arguments("nonsense"))
