from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from service.errors import StartupError
from service.predict import Bounds, ImageFailed, RemotePredictor, find_files, find_image_id, main
from tests.support.blob_model import draw_picture, encode_picture, publish

RED = {"red": (4, 8, 12, 16)}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.png").write_bytes(encode_picture(draw_picture(48, 64, RED)))
    (folder / "deeper" / "b.JPG").write_bytes(encode_picture(draw_picture(30, 40), "JPEG"))
    (folder / "notes.txt").write_text("no image")
    return folder


def predict(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    publish(tmp_path / "repo")
    out = tmp_path / "out" / "results.json"
    repo = str(tmp_path / "repo")
    main([*arguments, "--model-repo", repo, "--out", str(out), "--device", "cpu", "--quiet"])
    results: list[dict[str, Any]] = json.loads(out.read_bytes())
    return results


def test_a_folder_becomes_coco_results(tmp_path: Path, images: Path) -> None:
    results = predict(tmp_path, str(images))
    assert [(r["image_id"], r["file_name"]) for r in results] == [(1, "a.png"), (2, "b.JPG")]
    assert results[0]["bbox"] == [4, 8, 12, 16]
    assert coco_mask.decode(results[0]["segmentation"]).sum() == 192


def test_overlays_show_the_masks(tmp_path: Path, images: Path) -> None:
    drawn = tmp_path / "drawn"
    predict(tmp_path, str(images), "--overlays", str(drawn))
    assert sorted(p.name for p in drawn.iterdir()) == ["00001_a.png", "00002_b.png"]
    picture = np.asarray(Image.open(drawn / "00001_a.png"))
    changed = (picture != draw_picture(48, 64, RED)).any(axis=2)
    assert changed[8:24, 4:16].any()
    assert not changed[30:, 30:].any()


def test_image_ids_come_from_annotations(tmp_path: Path, images: Path) -> None:
    truth = tmp_path / "truth.json"
    content = [{"id": 71, "file_name": "a.png"}, {"id": 72, "file_name": "deeper/b.JPG"}]
    truth.write_text(json.dumps({"images": content}))
    results = predict(tmp_path, str(images), "--annotations", str(truth))
    assert [r["image_id"] for r in results] == [71, 72]


def test_bounds_are_obeyed(tmp_path: Path, images: Path) -> None:
    assert predict(tmp_path, str(images), "--score-threshold", "1") == []


def test_a_bad_image_is_named_and_the_others_are_written(tmp_path: Path, images: Path) -> None:
    (images / "bad.png").write_bytes(b"no png")
    with pytest.raises(SystemExit, match=r"1 images failed:\n.*bad.png: unsupported_format"):
        predict(tmp_path, str(images))
    results = json.loads((tmp_path / "out" / "results.json").read_bytes())
    assert [r["file_name"] for r in results] == ["a.png", "b.JPG"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["missing.png"], "'missing.png' is no image"),
        (["*.nothing"], "matches none"),
        (["IMAGES", "--model", "cats"], "no model 'cats'"),
        (["IMAGES", "--version", "3"], "no version 3"),
        (["IMAGES", "--annotations", "missing.json"], "missing.json"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, images: Path, arguments: list[str], reason: str
) -> None:
    arguments = [str(images) if a == "IMAGES" else a for a in arguments]
    with pytest.raises(SystemExit, match=reason):
        predict(tmp_path, *arguments)


@pytest.mark.parametrize(
    "arguments", [["x", "--score-threshold", "2"], ["x", "--max-instances", "0"], []]
)
def test_wrong_arguments_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_inputs_may_be_files_folders_and_globs_and_count_once(images: Path) -> None:
    found = find_files([str(images / "*.png"), str(images), str(images / "a.png")])
    assert [p.name for p in found] == ["a.png", "b.JPG"]
    with pytest.raises(StartupError, match="no image"):
        find_files([str(images / "*.webp")])


def test_an_image_that_has_no_id_fails() -> None:
    assert find_image_id(Path("x/val/a.png"), {"val/a.png": 3, "a.png": 4}) == 3
    with pytest.raises(ImageFailed, match="annotations"):
        find_image_id(Path("x/b.png"), {"a.png": 4})


@contextmanager
def fake_server(answers: list[tuple[int, dict[str, Any]]]) -> Iterator[tuple[str, list[str]]]:
    """Answers POSTs one after the other; yields its address and the paths it was asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            paths.append(self.path)
            status, body = answers.pop(0)
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.send_header("retry-after", "0")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", paths
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_busy_server_is_asked_again() -> None:
    busy = (503, {"error": {"code": "overloaded", "message": "full"}})
    with fake_server([busy, busy, (200, {"results": [{"instances": []}]})]) as (url, paths):
        bounds = Bounds(score_threshold=0.5)
        assert RemotePredictor(url, bounds, "blobs").predict(b"data").results == []
    assert paths == ["/segment?model=blobs&score_threshold=0.5"] * 3


def test_a_servers_refusal_is_passed_on() -> None:
    refusal = (415, {"error": {"code": "unsupported_format", "message": "no image"}})
    with fake_server([refusal]) as (url, _), pytest.raises(ImageFailed, match="unsupported_format"):
        RemotePredictor(url, Bounds()).predict(b"data")


def test_no_server_is_a_failure_with_its_address() -> None:
    with fake_server([]) as (url, _):
        pass
    with pytest.raises(ImageFailed, match=url):
        RemotePredictor(url, Bounds()).predict(b"data")
