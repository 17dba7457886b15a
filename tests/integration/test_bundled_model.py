"""The bundled models behind the real server, on real images and a drawn street."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline.decode import decode_image
from tests.support.server import ROOT, ServerProcess, run_server
from tests.support.street import draw_street
from training.pictures import match_f1

DATA = ROOT / "tests" / "data" / "nuclei"
IMAGES = sorted((DATA / "images").iterdir())
SAMPLES = ROOT / "service" / "http" / "web" / "samples"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    with run_server(log, "--model-repo", str(ROOT / "model_repo"), "--device", "cpu") as process:
        yield process


def _post(
    server: ServerProcess, paths: list[Path], model: str | None = None
) -> list[dict[str, Any]]:
    files = [("images", (path.name, path.read_bytes())) for path in paths]
    parameters = {} if model is None else {"model": model}
    answer = httpx.post(f"{server.url}/segment", params=parameters, files=files, timeout=300)
    assert answer.status_code == 200, answer.text
    results: list[dict[str, Any]] = answer.json()["results"]
    return results


def _rles(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {**i["segmentation"], "counts": i["segmentation"]["counts"].encode()}
        for i in entry["instances"]
    ]


def test_a_batch_of_mixed_sizes_equals_one_at_a_time(server: ServerProcess) -> None:
    """A result does not depend on its batch: mask IoU >= 0.999."""
    together = _post(server, IMAGES)
    assert [entry["file_name"] for entry in together] == [path.name for path in IMAGES]
    for path, entry in zip(IMAGES, together, strict=True):
        (alone,) = _post(server, [path])
        assert len(entry["instances"]) == len(alone["instances"]) > 0
        for ours, theirs in zip(_rles(entry), _rles(alone), strict=True):
            assert float(np.asarray(coco_mask.iou([ours], [theirs], [0]))[0, 0]) >= 0.999


def test_a_photograph_gets_a_warning_and_nuclei_do_not(server: ServerProcess) -> None:
    *nuclei, other = _post(server, [*IMAGES, SAMPLES / "cat.jpg"])
    assert [entry["warnings"] for entry in nuclei] == [[]] * len(IMAGES)
    (warning,) = other["warnings"]
    assert warning["code"] == "unusual_image" and "Cell nuclei" in warning["message"]


def test_most_nuclei_are_found(server: ServerProcess) -> None:
    """Far below what the model card says, far above what a broken pipeline could reach."""
    content = json.loads((DATA / "annotations" / "val.json").read_text())
    ids = {image["file_name"]: image["id"] for image in content["images"]}
    scores = []
    for entry in _post(server, IMAGES):
        truth = [
            {**a["segmentation"], "counts": a["segmentation"]["counts"].encode()}
            for a in content["annotations"]
            if a["image_id"] == ids[entry["file_name"]]
        ]
        scores.append(match_f1(_rles(entry), truth))
    assert np.mean(scores) > 0.5
    assert max(scores) > 0.9


def test_the_parts_of_a_drawn_street_are_found(server: ServerProcess) -> None:
    street = draw_street()
    sample = decode_image((SAMPLES / "street.jpg").read_bytes())
    assert np.abs(sample.astype(float) - street.picture).mean() < 5
    (entry,) = _post(server, [SAMPLES / "street.jpg"], "facades")
    assert entry["warnings"] == []
    assert {i["category"] for i in entry["instances"]} >= {"window", "facade", "vegetation"}
    boxes = [i["bbox"] for i in entry["instances"] if i["category"] == "window"]
    truth = street.windows.astype(float)
    overlap = coco_mask.iou(np.array(boxes, float), truth, [0] * len(truth))
    assert (overlap.max(axis=0) > 0.5).mean() > 0.6
    assert (overlap.max(axis=1) > 0.5).mean() > 0.6


def test_each_model_says_what_it_is_for_and_warns_of_the_other_s_images(
    server: ServerProcess,
) -> None:
    listing = httpx.get(f"{server.url}/v2/models").json()
    assert listing["default_model"] == "nuclei"
    for name, word in (("nuclei", "CC0"), ("facades", "CC BY 4.0")):
        card = httpx.get(f"{server.url}/v2/models/{name}").json()["card"]
        assert card["domain"] and word in card["licence"] + card["attribution"]
    (street,) = _post(server, [SAMPLES / "street.jpg"], "nuclei")
    (nuclei,) = _post(server, IMAGES[:1], "facades")
    for entry in (street, nuclei):
        assert [warning["code"] for warning in entry["warnings"]] == ["unusual_image"]
