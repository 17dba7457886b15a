"""Files, names, outputs and servers that go wrong: what the command says and still does."""

from __future__ import annotations

import io
import json
import os
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.jobs.errors import ImageUnusable
from service.predict import command, main, sources
from service.predict.predictors import Prediction
from solo_client import Retry
from tests.solo_client.fake_server import FakeServer, line, stream
from tests.support.processes import free_port

ANSWER = {"model": "m", "version": 1, "results": [{"width": 1, "height": 1, "instances": []}]}


def encode(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


class EchoPredictor:
    """Finds one instance in every image, but fails as it is told."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.failures: dict[bytes, Exception] = {}

    def predict(self, data: bytes) -> Prediction:
        self.seen.append(data)
        if data in self.failures:
            raise self.failures[data]
        rle = {"size": [8, 8], "counts": "08h1"}
        found = {"category_id": 1, "segmentation": rle, "bbox": [0, 0, 1, 8], "area": 8}
        return Prediction([{**found, "score": 0.5}], "segmentation", "m:1")


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> EchoPredictor:
    echo = EchoPredictor()
    monkeypatch.setattr(command, "build_predictor", lambda arguments, canvases: echo)
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)
    return echo


def write(*names: str) -> None:
    for value, name in enumerate(names):
        Path("in", name).parent.mkdir(parents=True, exist_ok=True)
        Path("in", name).write_bytes(encode(value))


def results(out: str = "results.json") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Path(out).read_bytes())
    return found


def names(out: str = "results.json") -> list[str]:
    return [result["file_name"] for result in results(out)]


def fail(*arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--quiet"])
    assert isinstance(caught.value.code, str)
    return caught.value.code


def test_files_that_cannot_be_used_fail_by_name_and_are_tried_again(
    predictor: EchoPredictor,
) -> None:
    write("a.png", "b.png", "c.png", "d.png", "e.png")
    Path("in/b.png").write_bytes(b"")
    Path("in/c.png").unlink()
    Path("in/c.png").symlink_to("gone.png")
    predictor.failures[encode(3)] = MemoryError()
    for count in (4, 5):
        assert fail("in").splitlines() == [
            "solo-predict: 3 images failed:",
            "in/b.png: empty_image: the file is empty",
            "in/c.png: No such file or directory",
            "in/d.png: MemoryError",
        ]
        assert names() == ["a.png", "e.png"]
        assert len(predictor.seen) == count - 1
    predictor.failures.clear()
    write("b.png", "gone.png")
    main(["in", "--quiet"])
    assert names() == ["a.png", "b.png", "d.png", "e.png", "gone.png"]
    assert not Path("results.json.partial").exists()


def test_a_file_that_vanishes_in_the_run_fails(predictor: EchoPredictor) -> None:
    write("a.png", "b.png", "c.png")

    class Removing(EchoPredictor):
        def predict(self, data: bytes) -> Prediction:
            Path("in/b.png").unlink(missing_ok=True)
            return super().predict(data)

    predictor.predict = Removing().predict  # type: ignore[method-assign]
    assert fail("in") == "solo-predict: 1 images failed:\nin/b.png: No such file or directory"
    assert names() == ["a.png", "c.png"]


def test_any_name_gets_results_and_a_picture(predictor: EchoPredictor) -> None:
    given = ["l" * 251 + ".png", "M\udcfcller.png", "-x.png", "a\nb.png", "q'\".png", "ü" * 100]
    given[-1] += ".png"
    write(*given, "deep/" + given[1])
    main(["in", "--overlays", "drawn", "--quiet"])
    assert len(results()) == len(list(Path("drawn").iterdir())) == 7
    assert "M\\xfcller.png" in names() and "deep/M\\xfcller.png" in names()
    assert {"a\nb.png", "-x.png", "q'\".png"} <= {*names()}
    first = Path("results.json").read_bytes()
    main(["in", "--overlays", "drawn", "--quiet"])
    assert Path("results.json").read_bytes() == first


def test_names_in_messages_are_one_line(predictor: EchoPredictor) -> None:
    write("a\n\x1b[31m.png", "M\udcfcller.png", "b\n.gif")
    predictor.failures = {
        encode(0): ImageUnusable("bad\r\nreason \ud800"),
        encode(1): ValueError(),
    }
    assert fail("in").splitlines() == [
        "solo-predict: 2 images failed:",
        "in/M\\xfcller.png: ValueError",
        "in/a\\n\\x1b[31m.png: bad\\r\\nreason \\ud800",
    ]


def test_what_is_left_out_is_said_and_does_not_fail_the_run(
    predictor: EchoPredictor, capsys: pytest.CaptureFixture[str]
) -> None:
    write("a.png", ".b.png", "c.gif", "dir.jpg/d.jfif", "._a.png")
    Path("in/link.png").symlink_to("a.png")
    main(["in", "--quiet"])
    assert names() == ["a.png", "dir.jpg/d.jfif"]
    assert capsys.readouterr().err.splitlines() == [
        "solo-predict: 4 entries are left out:",
        "in/._a.png: a file of the operating system",
        "in/.b.png: hidden",
        "in/c.gif: no suffix of a supported image",
        "in/link.png: listed already, by this or another name",
    ]


def test_a_folder_that_cannot_be_read_fails_the_run_and_its_images_are_added_later(
    predictor: EchoPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a.png", "locked/b.png")
    read = os.listdir

    def refuse(path: str) -> list[str]:
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refuse)
        assert fail("in") == "solo-predict: 1 inputs cannot be read:\nin/locked: Permission denied"
    assert names() == ["a.png"]
    main(["in", "--quiet"])
    assert names() == ["a.png", "locked/b.png"]
    assert len(predictor.seen) == 2


def test_a_second_run_does_not_see_what_the_first_wrote(predictor: EchoPredictor) -> None:
    write("x.png", "y.png")
    outputs = ["--out", "in/results.json", "--overlays", "in/drawn", "--quiet"]
    main(["in", *outputs])
    first = Path("in/results.json").read_bytes()
    for inputs in (["in"], ["in/**/*.png"], ["in/*"], sorted(map(str, Path("in").iterdir()))):
        main([*inputs, *outputs])
        assert Path("in/results.json").read_bytes() == first
    assert len(list(Path("in/drawn").iterdir())) == 2
    for more in ([], ["--overlays", "in/drawn2"]):  # other runs know them by a mark
        main(["in", *more, "--quiet"])
        assert Path("results.json").read_bytes() == first
    assert "that solo-predict has drawn" in fail("in/drawn")
    assert "among the images" in fail("in/x.png", "--overlays", "in")
    assert "the folder of --overlays" in fail("in", "--overlays", "in")


def test_equal_names_and_ambiguous_annotations(
    predictor: EchoPredictor, capsys: pytest.CaptureFixture[str]
) -> None:
    write("a/1.png", "b/1.png", "b/2.png")
    main(["in", "--quiet"])
    assert names() == ["a/1.png", "b/1.png", "b/2.png"]
    content = [{"id": 7, "file_name": "1.png"}, {"id": 8, "file_name": "2.png"}]
    Path("truth.json").write_text(json.dumps({"images": content}))
    predictor.seen.clear()
    said = fail("in", "--annotations", "truth.json")
    assert "in/a/1.png: ambiguous: the annotations give its image id 7 to in/b/1.png" in said
    assert "in/b/1.png: ambiguous: the annotations give its image id 7 to in/a/1.png" in said
    assert [r["image_id"] for r in results()] == [8]
    assert len(predictor.seen) == 1
    assert "2 images have no image id and fail" in capsys.readouterr().err


def test_decomposed_names_have_the_ids_of_composed_ones(predictor: EchoPredictor) -> None:
    write(unicodedata.normalize("NFD", "Müller.png"))
    content = [{"id": 5, "file_name": unicodedata.normalize("NFC", "Müller.png")}]
    Path("truth.json").write_text(json.dumps({"images": content}))
    main(["in", "--annotations", "truth.json", "--quiet"])
    assert [r["image_id"] for r in results()] == [5]


@pytest.mark.parametrize("source", ["list.txt", "-"])
def test_inputs_come_from_a_list(
    predictor: EchoPredictor, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    write("a.png", "b.png", "c.png")
    data = b"in/c.png\nin/gone.png\nin/a.png\n"
    Path("list.txt").write_bytes(data)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    said = fail("--files-from", source)
    assert said == "solo-predict: 1 images failed:\nin/gone.png: No such file or directory"
    assert [(r["image_id"], r["file_name"]) for r in results()] == [(1, "c.png"), (3, "a.png")]


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("folder", "is a folder"),
        ("pipe", "is not a regular file"),
        ("/dev/null", "is not a regular file"),
        ("in/a.png", "was not written by this command"),
        ("text/x.json", "Not a directory"),
        ("loop", "symbolic links"),
        ("/proc/x", "/proc/x.partial"),
        ("n" * 300, "File name too long"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    predictor: EchoPredictor, out: str, reason: str
) -> None:
    write("a.png")
    Path("folder").mkdir()
    Path("text").write_text("text")
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    said = fail("in", "--out", out)
    assert said.startswith("solo-predict: error: ") and reason in said
    assert len(said.splitlines()) == 1
    assert predictor.seen == []
    assert Path("in/a.png").read_bytes() == encode(0)


def test_a_linked_output_is_written_where_it_points(predictor: EchoPredictor) -> None:
    write("a.png")
    Path("link.json").symlink_to("target.json")
    for _ in range(2):
        main(["in", "--out", "link.json", "--quiet"])
        assert Path("link.json").is_symlink()
        assert names("target.json") == ["a.png"]


def test_a_picture_that_cannot_be_written_fails_its_image(predictor: EchoPredictor) -> None:
    write("a.png", "b.png")
    Path("drawn/00001_a.png").mkdir(parents=True)
    said = fail("in", "--overlays", "drawn")
    assert said.startswith(
        "solo-predict: 1 images failed:\nin/a.png: cannot write drawn/00001_a.png: "
    )
    assert names() == ["b.png"]
    Path("drawn/00001_a.png").rmdir()
    main(["in", "--overlays", "drawn", "--quiet"])
    assert names() == ["a.png", "b.png"]
    assert len(predictor.seen) == 3


def test_a_full_disk_at_the_end_costs_nothing(
    predictor: EchoPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a.png")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "disk full")))
        said = fail("in")
    assert "results.json: disk full; the same command continues from here" in said
    assert not Path("results.json").exists()
    main(["in", "--quiet"])
    assert names() == ["a.png"]
    assert len(predictor.seen) == 1


@pytest.mark.parametrize(
    "variables",
    [
        {"ALL_PROXY": "socks5://127.0.0.1:9"},
        {"HTTP_PROXY": "http://127.0.0.1:80a0"},
        {"HTTP_PROXY": "ftp://127.0.0.1"},
    ],
)
def test_proxies_that_cannot_be_used_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    Path("a.png").write_bytes(encode(0))
    said = fail("a.png", "--url", "http://127.0.0.1:9")
    assert said.startswith("solo-predict: error: ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:80a0", "http://[::1", "localhost:8000", "http://\n"]
)
def test_addresses_that_cannot_be_used_are_one_line(tmp_path: Path, url: str) -> None:
    (tmp_path / "a.png").write_bytes(encode(0))
    said = fail(str(tmp_path / "a.png"), "--url", url, "--out", str(tmp_path / "out.json"))
    assert said.startswith("solo-predict: error: --url ")
    assert len(said.splitlines()) == 1


def test_a_server_that_is_not_there_ends_the_run_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "RETRY", Retry(attempts=1))
    (tmp_path / "a.png").write_bytes(encode(0))
    url = f"http://127.0.0.1:{free_port()}"
    said = fail(str(tmp_path / "a.png"), "--url", url, "--out", str(tmp_path / "out.json"))
    assert said.endswith("; the same command continues from here")
    assert len(said.splitlines()) == 1


def test_a_server_answers_and_an_empty_file_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(encode(0))
    Path("b.png").write_bytes(b"")
    Path("c.png").write_bytes(encode(1))
    with FakeServer(*[stream(line(result=ANSWER))] * 2) as server:
        said = fail("*.png", "--url", server.url)
    assert said == "solo-predict: 1 images failed:\nb.png: empty_image: the file is empty"
    assert results() == []


def test_a_key_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"\xff\xfe")
    (tmp_path / "a.png").write_bytes(encode(0))
    arguments = [str(tmp_path / "a.png"), "--url", "http://127.0.0.1:9", "--api-key-file"]
    said = fail(*arguments, str(tmp_path / "key"), "--out", str(tmp_path / "out.json"))
    assert said.startswith("solo-predict: error: --url ")
    assert "No such file" in fail(*arguments, str(tmp_path / "none"), "--out", str(tmp_path / "o"))
