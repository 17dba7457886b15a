from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.types import Detection
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.tiny import (
    CLASSES,
    TINY,
    build_tiny_data,
    disc,
    rle_of,
)
from training.coco_metrics import mask_ap
from training.data.coco import CocoDataset
from training.evaluate import build_parser, main
from training.model.solo import Solo
from training.predictors import (
    CheckpointPredictor,
    RepositoryPredictor,
    ServerPredictor,
    build_predictor,
    predict,
    to_results,
)
from training.validation import evaluate_model
from training.weights.formats import CheckpointError, save_checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_data(tmp_path_factory.mktemp("data"), ("val",))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = Solo(TINY.model, 2)
    for parameter in model.head.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    for name, parameter in model.head.named_parameters():
        if "_out" in name and name.endswith("bias"):
            torch.nn.init.constant_(parameter, 2.0)  # finds something everywhere
    path = tmp_path_factory.mktemp("run") / "best.pt"
    save_checkpoint(path, TINY, {"model": model.state_dict(), "ema": {}})
    return path


def test_instances_become_coco_results() -> None:
    mask = disc(20, 30, 8, 9, 5)
    rle = coco_mask.encode(np.asfortranarray(mask))
    instance = Detection(label=1, score=0.25, rle=rle, bbox_xywh=(4, 3, 11, 11), area=81)
    (result,) = to_results([instance], CLASSES)
    assert result == {"category_id": 7, "score": 0.25, "segmentation": rle_of(mask)}
    json.dumps(result)


def test_a_checkpoint_from_file_to_average_precision(root: Path, checkpoint: Path) -> None:
    data = CocoDataset(root, "val")
    predictor = build_predictor(str(checkpoint), None, None, 50)
    assert isinstance(predictor, CheckpointPredictor)
    results = predict(data, predictor)
    assert results and {r["image_id"] for r in results} <= {1, 2, 3}
    for result in results:
        record = data.records[result["image_id"] - 1]
        assert result["segmentation"]["size"] == [record.height, record.width]
        assert result["category_id"] in (3, 7) and 0 <= result["score"] <= 1
    numbers = evaluate_model(predictor.model, predictor.config, data, max_dets=50)
    assert 0 <= numbers["AP"] <= 1


def test_a_bound_on_the_instances(root: Path, checkpoint: Path) -> None:
    data = CocoDataset(root, "val")
    results = predict(data, build_predictor(str(checkpoint), None, None, 1))
    assert len({r["image_id"] for r in results}) == len(results)


def test_an_image_of_several_tiles(checkpoint: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (130, 100, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    predictor = build_predictor(str(checkpoint), None, None, 50)
    for result in predictor(buffer.getvalue()):
        assert result["segmentation"]["size"] == [130, 100]


@pytest.mark.parametrize("source", ["", "nowhere.pt", "."])
def test_a_source_that_is_none(source: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        build_predictor(source and str(tmp_path / source), None, None, 100)


def test_the_command(root: Path, checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = [str(checkpoint), "--data", str(root), "--max-dets", "50", "--group-by", "group"]
    arguments += ["--json", str(tmp_path / "n.json"), "--results", str(tmp_path / "r.json")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "all AP " in printed and "g0" in printed and "g1" in printed
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert set(numbers) == {"all", "g0", "g1"}
    assert isinstance(json.loads((tmp_path / "r.json").read_text()), list)


def test_ground_truth_masks_leave_the_results_file_as_it_is(
    root: Path, checkpoint: Path, tmp_path: Path
) -> None:
    rows = []
    for more in ([], ["--ground-truth-masks"]):
        files = ["--json", str(tmp_path / "n.json"), "--results", str(tmp_path / "r.json")]
        assert main([str(checkpoint), "--data", str(root), "--max-dets", "50", *files, *more]) == 0
        numbers = json.loads((tmp_path / "n.json").read_text())["all"]
        rows.append((numbers, (tmp_path / "r.json").read_text()))
    (plain, results), (replaced, same_results) = rows
    assert replaced["AP"] > plain["AP"] and replaced["AP75"] == replaced["AP50"]
    assert results == same_results


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("nowhere", [], "nowhere"),
        (None, ["--split", "test"], "'test'"),
        (None, ["--group-by", "modality"], "no field 'modality'"),
    ],
)
def test_the_command_fails_with_one_line(
    source: str | None, more: list[str], message: str, root: Path, checkpoint: Path, capsys: Any
) -> None:
    assert main([source or str(checkpoint), "--data", str(root), *more]) == 1
    assert message in capsys.readouterr().err


def test_images_without_annotations_give_a_file_of_results(
    checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    root = build_tiny_data(tmp_path, ("val",))
    content = json.loads((root / "annotations" / "val.json").read_text())
    del content["annotations"]
    (root / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(content))
    (root / "images").rename(root / "test2017")
    arguments = [str(checkpoint), "--data", str(root), "--split", "test-dev"]
    assert main(arguments) == 1
    assert "no annotations to score; --results FILE" in capsys.readouterr().err
    path = tmp_path / "detections_test-dev2017_tiny_results.json"
    assert main([*arguments, "--results", str(path)]) == 0
    assert "not scored" in capsys.readouterr().out
    results = json.loads(path.read_text())
    assert {r["image_id"] for r in results} == {1, 2, 3}
    for result in results:
        assert set(result) == {"image_id", "category_id", "segmentation", "score"}
        assert coco_mask.decode(result["segmentation"]).any()


def test_the_help_names_the_evaluation_servers_file() -> None:
    text = "".join(build_parser().format_help().split())  # it breaks lines at the hyphen
    assert "detections_test-dev2017_NAME_results.json" in text


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """A copy of the data set whose file was changed."""
    folder = build_tiny_data(tmp_path / "changed", ("val",))
    path = folder / "annotations" / "val.json"

    def change(edit: Callable[[dict[str, Any]], None]) -> Path:
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))
        return folder

    return change


def perfect(data: CocoDataset) -> list[dict[str, Any]]:
    """The objects of a split as results, the second of each image shifted by a pixel."""
    results = []
    for record in data.records:
        for place, item in enumerate(record.annotations):
            mask = np.roll(coco_mask.decode(item.rle), place, axis=1)
            category_id = data.classes[item.label].category_id
            result = {"image_id": record.image_id, "category_id": category_id}
            results.append(result | {"score": 0.9 - 0.1 * place, "segmentation": rle_of(mask)})
    return results


def without(*names: str) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            for name in names:
                del annotation[name]

    return edit


def numbered(first: int, step: int) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        for place, annotation in enumerate(content["annotations"]):
            annotation["id"] = first + step * place

    return edit


def with_text_ids(content: dict[str, Any]) -> None:
    for image in content["images"]:
        image["id"] = f"image {image['id']}"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"image {annotation['image_id']}"


@pytest.mark.parametrize(
    "edit",
    [
        without("area"),
        without("id"),
        without("iscrowd"),
        without("area", "id", "iscrowd", "bbox"),
        numbered(0, 1),
        numbered(7, 0),
        with_text_ids,
    ],
)
def test_what_is_harmless_does_not_change_the_score(
    root: Path, changed: Callable[..., Path], edit: Callable[[dict[str, Any]], None]
) -> None:
    data = CocoDataset(root, "val")
    expected = mask_ap(data.truth(), perfect(data))
    assert 0.5 < expected["AP"] < 1
    same = CocoDataset(changed(edit), "val")
    assert mask_ap(same.truth(), perfect(same)) == expected


def test_classes_that_are_numbered_otherwise_are_refused(
    checkpoint: Path, changed: Callable[..., Path], capsys: Any
) -> None:
    def edit(content: dict[str, Any]) -> None:
        first, second = content["categories"]
        first["name"], second["name"] = second["name"], first["name"]

    assert main([str(checkpoint), "--data", str(changed(edit))]) == 1
    error = capsys.readouterr().err
    assert "category 3 is 'box'" in error and "calls it 'disc'" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("option", ["--results", "--json"])
def test_a_file_that_cannot_be_written_is_refused_before_the_prediction(
    root: Path, checkpoint: Path, tmp_path: Path, capsys: Any, option: str
) -> None:
    for path, reason in ((tmp_path / "none" / "r.json", "no folder"), (tmp_path, "is a folder")):
        assert main([str(checkpoint), "--data", str(root), option, str(path)]) == 1
        printed = capsys.readouterr()
        assert reason in printed.err and str(path) in printed.err
        assert "image/s" not in printed.err and not printed.out


def test_objects_that_are_skipped_are_said(
    checkpoint: Path, changed: Callable[..., Path], capsys: Any
) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]

    assert main([str(checkpoint), "--data", str(changed(edit))]) == 0
    warning = capsys.readouterr().err
    assert "solo-eval: " in warning and "skipped 1 objects without a polygon" in warning


def test_a_damaged_checkpoint_is_named(root: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "bad.pt").write_bytes(b"nonsense")
    assert main([str(tmp_path / "bad.pt"), "--data", str(root)]) == 1
    assert "bad.pt" in capsys.readouterr().err


def test_a_model_folder(tmp_path: Path) -> None:
    folder = publish(tmp_path)
    predictor = build_predictor(str(folder), None, None, 10)
    assert isinstance(predictor, RepositoryPredictor)
    picture = draw_picture(100, 150, {"red": (8, 8, 24, 24), "blue": (100, 60, 32, 24)})
    results = predictor(encode_picture(picture))
    assert {r["category_id"] for r in results} == {10, 30}
    for result in results:
        channel = {10: 0, 30: 2}[result["category_id"]]
        found = coco_mask.decode(result["segmentation"]).astype(bool)
        drawn = picture[..., channel] > 0
        assert (found & drawn).sum() / (found | drawn).sum() > 0.9


def test_a_damaged_model_folder_is_named(root: Path, tmp_path: Path, capsys: Any) -> None:
    folder = publish(tmp_path)
    with (folder / "1" / "model.onnx").open("ab") as file:
        file.write(b"x")
    assert main([str(folder), "--data", str(root)]) == 1
    assert "model.onnx" in capsys.readouterr().err
    assert main([str(folder), "--data", str(root), "--version", "5"]) == 1
    assert "5" in capsys.readouterr().err


class FakeServer(BaseHTTPRequestHandler):
    """Answers /segment with one disc per image; an unknown model gets 404."""

    asked: list[dict[str, list[str]]]

    def do_GET(self) -> None:
        classes = [c.model_dump() for c in CLASSES]
        if self.path == "/v2/models":
            self.answer(200, {"default_model": "tiny"})
        elif self.path == "/v2/models/tiny":
            self.answer(200, {"classes": classes, "postprocess": {"score_threshold": 0.5}})
        else:
            self.answer(404, {"error": "no such model"})

    def do_POST(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        type(self).asked.append(query | {"type": [str(self.headers["Content-Type"])]})
        self.rfile.read(int(self.headers["Content-Length"]))
        if query.get("model") == ["unknown"]:
            status, content = 404, {"error": {"code": "unknown_model", "message": "no such model"}}
        else:
            instance = {
                "category_id": 3,
                "category": "disc",
                "score": 0.5,
                "bbox": [1, 2, 3, 4],
                "segmentation": rle_of(disc(64, 64, 20, 20, 10)),
            }
            status, content = 200, {"results": [{"instances": [instance]}]}  # type: ignore[dict-item]
        self.answer(status, content)

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    FakeServer.asked = []
    server = HTTPServer(("127.0.0.1", 0), FakeServer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_a_running_server(url: str, root: Path) -> None:
    predictor = build_predictor(url, "tiny", None, 77)
    assert isinstance(predictor, ServerPredictor)
    results = predict(CocoDataset(root, "val"), predictor)
    assert [r["image_id"] for r in results] == [1, 2, 3]
    assert set(results[0]) == {"image_id", "category_id", "score", "segmentation"}
    query = FakeServer.asked[0]
    assert query["max_instances"] == ["77"] and query["model"] == ["tiny"]
    assert float(query["score_threshold"][0]) == 0 and query["type"] == ["image/png"]


def test_a_servers_error_is_shown(url: str, root: Path, capsys: Any) -> None:
    assert main([url, "--data", str(root), "--model-name", "unknown"]) == 1
    printed = capsys.readouterr().err
    assert "404" in printed and "no such model" in printed


def test_no_server_there(root: Path, capsys: Any) -> None:
    assert main(["http://127.0.0.1:9", "--data", str(root)]) == 1
    assert "solo-eval:" in capsys.readouterr().err
