from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from service.engines.base import BackendOptions
from service.errors import StartupError
from service.jobs.errors import ImageUnusable, RunFailed
from service.jobs.journal import Journal
from service.models.publishing import write_default
from service.predict import command, main
from service.predict.options import parse, read_options
from service.predict.predictors import Prediction
from service.predict.sources import find_model
from tests.solo_client.fake_server import FakeServer, line, progress, stream
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
    if not (tmp_path / "repo").exists():
        publish(tmp_path / "repo")
    out = tmp_path / "out" / "results.json"
    repo = str(tmp_path / "repo")
    main([*arguments, "--model-repo", repo, "--out", str(out), "--device", "cpu", "--quiet"])
    results: list[dict[str, Any]] = json.loads(out.read_bytes())
    return results


def test_a_folder_becomes_coco_results(tmp_path: Path, images: Path) -> None:
    results = predict(tmp_path, str(images))
    assert [(r["image_id"], r["file_name"]) for r in results] == [(1, "a.png"), (2, "deeper/b.JPG")]
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


def test_overlaps_and_scale_are_those_of_the_server(tmp_path: Path, images: Path) -> None:
    publish(tmp_path / "repo", card={"object_size_px": 16})
    nested = {"red": (4, 4, 40, 40), "green": (8, 8, 30, 30)}
    (images / "a.png").write_bytes(encode_picture(draw_picture(48, 64, nested)))
    one = str(images / "a.png")
    assert len(predict(tmp_path, one)) == 2
    (best,) = predict(tmp_path, one, "--overlaps", "resolve")
    (scaled,) = predict(tmp_path, one, "--overlaps", "resolve", "--object-size-px", "32")
    assert best["segmentation"] != scaled["segmentation"]
    assert scaled["area"] == pytest.approx(best["area"], rel=0.1)
    for wrong, reason in (("3", "3 is not in 4 to 64"), ("-1", "-1 is not a size")):
        with pytest.raises(SystemExit) as stopped:
            predict(tmp_path, one, "--object-size-px", wrong)
        assert stopped.value.code == 2 or reason in str(stopped.value)


def test_a_bad_image_is_named_and_the_others_are_written(tmp_path: Path, images: Path) -> None:
    (images / "bad.png").write_bytes(b"no png")
    with pytest.raises(SystemExit, match=r"1 images failed:\n.*bad.png: unsupported_format"):
        predict(tmp_path, str(images))
    results = json.loads((tmp_path / "out" / "results.json").read_bytes())
    assert [r["file_name"] for r in results] == ["a.png", "deeper/b.JPG"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["missing.png"], "'missing.png' is not an image"),
        (["*.nothing"], "matches none"),
        (["IMAGES", "--model", "cats"], "no model 'cats'"),
        (["IMAGES", "--version", "3"], "no version 3"),
        (["IMAGES", "--annotations", "missing.json"], "missing.json"),
        (["IMAGES", "--overlays", "IMAGES/a.png"], "a.png is not a folder"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, images: Path, arguments: list[str], reason: str
) -> None:
    arguments = [a.replace("IMAGES", str(images)) for a in arguments]
    with pytest.raises(SystemExit, match=reason):
        predict(tmp_path, *arguments)


def test_one_of_several_models_is_named_or_is_the_default(tmp_path: Path, images: Path) -> None:
    for name in ("a", "b"):
        publish(tmp_path / "repo", name)
    with pytest.raises(SystemExit, match=r"has the models \['a', 'b'\]; name one: --model NAME"):
        predict(tmp_path, str(images))
    assert predict(tmp_path, str(images), "--model", "b")
    write_default(tmp_path / "repo", "a")
    assert find_model(tmp_path / "repo", None).name == "a"
    assert predict(tmp_path, str(images), "--restart")


@pytest.mark.parametrize(
    "arguments",
    [
        ["x", "--score-threshold", "2"],
        ["x", "--max-instances", "0"],
        ["x", "--jobs", "0"],
        ["x", "--url", "http://localhost", "--model-repo", "model_repo"],
        ["x", "--url", "http://localhost", "--ray"],
        ["x", "--url", "http://localhost", "--precision", "int8"],
        ["x", "--precision", "fp8"],
        ["x", "--ray-address", "auto"],
        ["x", "--actors", "2"],
        ["x", "--ray", "--gpus-per-actor", "1.5"],
        ["x", "--ray", "--gpus-per-actor", "-1"],
        [],
    ],
)
def test_wrong_arguments_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [([], ("fp32", True)), (["--precision", "int8"], ("int8", False))],
)
def test_the_engine_is_chosen_as_in_the_server_unless_a_precision_is_given(
    tmp_path: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    expected: tuple[str, bool],
) -> None:
    asked: list[BackendOptions] = []

    def load(folder: Path, version: int | None, options: BackendOptions) -> NoReturn:
        asked.append(options)
        raise StartupError("stop here")

    monkeypatch.setattr(command, "load_version", load)
    with pytest.raises(SystemExit, match="stop here"):
        predict(tmp_path, str(images), *given)
    (options,) = asked
    assert (options.precision, options.free_precision) == expected


def test_only_a_run_with_the_same_engine_is_continued(images: Path) -> None:
    parsed = parse([str(images)])
    found = [read_options(parsed, engine) for engine in ("onnxruntime int8", "onnxruntime fp32")]
    assert found[0] != found[1]
    assert found[0] | {"engine": None} == found[1] | {"engine": None}


def test_without_ray_the_extra_is_named(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "service.predict.ray_job", raising=False)
    with pytest.raises(SystemExit, match=r"--ray requires the extra 'ray'"):
        predict(tmp_path, str(images), "--ray")


def test_a_servers_address_must_be_one(images: Path) -> None:
    with pytest.raises(SystemExit, match="localhost:8000"):
        main([str(images), "--url", "localhost:8000"])


class FakePredictor:
    """Finds one instance in every image, until it is told to stop."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.failure: dict[bytes, Exception] = {}
        self.served = "blobs:1"
        self.truncated: set[bytes] = set()
        self.warnings: dict[bytes, list[dict[str, str]]] = {}

    def predict(self, data: bytes) -> Prediction:
        self.seen.append(data)
        if data in self.failure:
            raise self.failure[data]
        result = {"category_id": 1, "score": 0.5, "of": data.decode()}
        return Prediction(
            [result],
            "segmentation",
            self.served,
            truncated=data in self.truncated,
            warnings=self.warnings.get(data, []),
        )


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePredictor:
    fake = FakePredictor()
    monkeypatch.setattr(command, "build_predictor", lambda arguments, canvases: fake)
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    monkeypatch.chdir(tmp_path)
    return fake


def test_a_run_that_was_cut_goes_on(predictor: FakePredictor) -> None:
    predictor.failure[b"c"] = RunFailed("the server is gone")
    with pytest.raises(SystemExit, match="is gone; the same command continues from here"):
        main(["*.png", "--quiet"])
    assert not Path("results.json").exists()
    predictor.failure.clear()
    predictor.seen.clear()
    main(["*.png", "--quiet"])
    assert predictor.seen == [b"c", b"d"]
    results = json.loads(Path("results.json").read_bytes())
    assert [(r["image_id"], r["file_name"], r["of"]) for r in results] == [
        (1, "a.png", "a"),
        (2, "b.png", "b"),
        (3, "c.png", "c"),
        (4, "d.png", "d"),
    ]
    assert sorted(p.name for p in Path().iterdir() if "results" in p.name) == ["results.json"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), RunFailed("disk full")])
def test_any_stop_keeps_what_is_done(predictor: FakePredictor, stop: Exception) -> None:
    predictor.failure[b"d"] = stop
    with pytest.raises(SystemExit) as caught:
        main(["*.png", "--quiet"])
    assert caught.value.code in (
        130,
        "solo-predict: error: disk full; the same command continues from here",
    )
    predictor.failure.clear()
    predictor.seen.clear()
    main(["*.png", "--quiet"])
    assert predictor.seen == [b"d"]


def test_only_images_that_failed_are_tried_again(predictor: FakePredictor) -> None:
    predictor.failure[b"b"] = ImageUnusable("corrupt_image: it is cut")
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"1 images failed:\nb\.png: corrupt_image"):
            main(["*.png", "--quiet"])
        found = [r["of"] for r in json.loads(Path("results.json").read_bytes())]
        assert found == ["a", "c", "d"]
    assert predictor.seen == [b"a", b"b", b"c", b"d", b"b"]
    predictor.failure.clear()
    main(["*.png", "--quiet"])
    assert len(json.loads(Path("results.json").read_bytes())) == 4
    assert not Path("results.json.partial").exists()


def test_other_options_do_not_go_on(predictor: FakePredictor) -> None:
    predictor.failure[b"d"] = RunFailed("gone")
    with pytest.raises(SystemExit, match="gone"):
        main(["*.png", "--quiet", "--score-threshold", "0.5"])
    with pytest.raises(SystemExit, match=r"score_threshold 0\.5, now 0\.6.*--restart"):
        main(["*.png", "--quiet", "--score-threshold", "0.6"])
    with pytest.raises(SystemExit, match="model None, now 'cats'"):
        main(["*.png", "--quiet", "--score-threshold", "0.5", "--model", "cats"])
    predictor.failure.clear()
    predictor.seen.clear()
    main(["*.png", "--quiet", "--score-threshold", "0.6", "--restart"])
    assert len(predictor.seen) == 4


def test_new_and_changed_files_are_done_and_ids_follow_the_files(
    predictor: FakePredictor,
) -> None:
    predictor.failure[b"d"] = RunFailed("gone")
    with pytest.raises(SystemExit, match="gone"):
        main(["*.png", "--quiet"])
    predictor.failure.clear()
    predictor.seen.clear()
    Path("aa.png").write_bytes(b"aa")
    Path("b.png").write_bytes(b"changed")
    Path("c.png").unlink()
    main(["*.png", "--quiet"])
    assert predictor.seen == [b"aa", b"changed", b"d"]
    results = json.loads(Path("results.json").read_bytes())
    assert [(r["image_id"], r["of"]) for r in results] == [
        (1, "a"),
        (2, "aa"),
        (3, "changed"),
        (4, "d"),
    ]


def test_another_version_does_not_go_on(predictor: FakePredictor) -> None:
    predictor.failure[b"c"] = RunFailed("gone")
    with pytest.raises(SystemExit, match="gone"):
        main(["*.png", "--quiet"])
    predictor.failure.clear()
    predictor.served = "blobs:2"
    with pytest.raises(SystemExit, match="was found by blobs:2, but the run began with blobs:1"):
        main(["*.png", "--quiet"])


def test_images_without_an_id_fail_before_they_are_done(predictor: FakePredictor) -> None:
    content = {"images": [{"id": 71, "file_name": "a.png"}]}
    Path("truth.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"3 images failed:\nb.png: it is not in the annotations"):
        main(["*.png", "--quiet", "--annotations", "truth.json"])
    assert predictor.seen == [b"a"]


def test_a_name_that_is_no_utf8_is_escaped(predictor: FakePredictor, tmp_path: Path) -> None:
    try:
        Path("z\udcff.png").write_bytes(b"z")
    except OSError:
        pytest.skip("this file system has UTF-8 names alone")
    main(["z*.png", "--quiet"])
    (result,) = json.loads(Path("results.json").read_bytes())
    assert result["file_name"] == "z\\xff.png"


def test_overlays_that_are_gone_are_drawn_again(tmp_path: Path, images: Path) -> None:
    (images / "bad.png").write_bytes(b"no image")
    drawn = tmp_path / "drawn"
    for _ in range(2):
        with pytest.raises(SystemExit, match="1 images failed"):
            predict(tmp_path, str(images), "--overlays", str(drawn))
        assert (drawn / "00001_a.png").exists()
        (drawn / "00001_a.png").unlink()


def test_truncated_images_are_counted_also_those_of_the_run_before(
    predictor: FakePredictor, capsys: pytest.CaptureFixture[str]
) -> None:
    predictor.truncated = {b"a", b"c"}
    predictor.failure[b"d"] = RunFailed("gone")
    with pytest.raises(SystemExit, match="gone"):
        main(["*.png", "--quiet"])
    assert "warning" not in capsys.readouterr().err
    predictor.failure.clear()
    predictor.truncated = set()
    main(["*.png", "--quiet"])
    assert (
        "solo-predict: warning: 2 images reached the limit of --max-instances; instances may be "
        "missing from their results\n"
    ) in capsys.readouterr().err
    main(["*.png", "--quiet"])
    assert "warning" not in capsys.readouterr().err


def test_warnings_are_listed_also_those_of_the_run_before(
    predictor: FakePredictor, capsys: pytest.CaptureFixture[str]
) -> None:
    predictor.warnings = {b"a": [{"code": "unusual_image", "message": "it is\nother"}]}
    predictor.failure[b"d"] = RunFailed("gone")
    with pytest.raises(SystemExit, match="gone"):
        main(["*.png", "--quiet"])
    predictor.failure.clear()
    predictor.warnings = {b"d": [{"code": "unusual_image", "message": "so is this"}]}
    main(["*.png", "--quiet"])
    lines = capsys.readouterr().err.splitlines()
    start = next(i for i, line in enumerate(lines) if "warning: unusual_image in 2 of" in line)
    assert lines[start + 1].startswith("  a.png: it is") and "d.png: so is this" in lines[start + 2]


def test_a_result_that_is_as_long_as_the_limit_is_counted(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(tmp_path, str(images), "--max-instances", "1")
    assert "warning: 2 images reached" in capsys.readouterr().err


def test_a_journal_of_another_format_is_kept_until_restart(predictor: FakePredictor) -> None:
    old = b'{"format":1,"options":{}}\n{"format":1,"file":"/a.png"}\n'
    Path("results.json.partial").write_bytes(old)
    with pytest.raises(SystemExit, match=r"is not a journal of this version.*--restart"):
        main(["*.png", "--quiet"])
    assert predictor.seen == []
    assert Path("results.json.partial").read_bytes() == old
    main(["*.png", "--quiet", "--restart"])
    assert len(json.loads(Path("results.json").read_bytes())) == 4
    assert not Path("results.json.partial").exists()


def test_two_runs_into_one_file_are_refused(predictor: FakePredictor) -> None:
    with (
        Journal(Path("results.json.partial"), {}),
        pytest.raises(SystemExit, match=r"^solo-predict: error: .*: another run is writing it$"),
    ):
        main(["*.png", "--quiet"])
    assert predictor.seen == []


def test_a_folder_that_cannot_be_written_is_one_line(predictor: FakePredictor) -> None:
    with pytest.raises(
        SystemExit, match=r"^solo-predict: error: cannot use the journal /proc/x\.partial: [^\n]+$"
    ):
        main(["*.png", "--quiet", "--out", "/proc/x"])
    assert predictor.seen == []


def test_an_interrupted_and_a_whole_run_write_the_same_bytes(predictor: FakePredictor) -> None:
    main(["*.png", "--quiet", "--out", "whole.json"])
    predictor.failure[b"c"] = RunFailed("gone")
    with pytest.raises(SystemExit, match="gone"):
        main(["*.png", "--quiet"])
    predictor.failure.clear()
    main(["*.png", "--quiet"])
    assert Path("results.json").read_bytes() == Path("whole.json").read_bytes()


def test_the_bar_shows_the_canvases_of_large_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(b"a")
    answer = {"model": "m", "version": 1, "results": [{"width": 1, "height": 1, "instances": []}]}
    lines = [progress(0, 441, 0.0), progress(12, 441, 1.0), line(result=answer)]
    with FakeServer(stream(*lines)) as server:
        main(["a.png", "--url", server.url])
    shown = capsys.readouterr().err
    assert "0/441 canvases" in shown
    assert "12/441 canvases" in shown
    assert "canvases" not in shown.rsplit("1/1", 1)[1]
