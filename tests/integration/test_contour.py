"""Task `contour` from a configuration to a picture: targets, export, registry, /segment, AP."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from export.__main__ import main as export_main
from export.parity import draw_blobs
from pipeline.contour import draw_contour, fill_contour
from service.engines.base import BackendOptions
from service.http.app import create_app
from service.models.repository import ModelRefused, load_repository, load_version
from service.predict import main as predict_main
from service.settings import Settings
from tests.support.blob_model import encode_picture, publish
from tests.support.tiny import build_tiny_data, rle_of
from tests.support.tiny_solo import save_tiny_checkpoint, tiny_config
from training.coco_metrics import mask_ap
from training.configs.contours import as_contours
from training.configs.schema import Config
from training.data.coco import CocoDataset
from training.pictures import main as pictures_main
from training.predictors import RepositoryPredictor, as_regions, build_predictor

IMAGE = draw_blobs(np.random.default_rng(5), (100, 130))
PICTURE = encode_picture(IMAGE)
URL = "/segment?model=rings&max_instances=6"


def contour_config() -> Config:
    return as_contours(tiny_config(), name="rings", description="for tests")


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model_repo with a contour model, exported by the command, and one of segmentation."""
    folder = tmp_path_factory.mktemp("contour")
    save_tiny_checkpoint(folder / "best.pt", contour_config())
    arguments = [str(folder / "best.pt"), "--out", str(folder / "repo"), "--score-threshold", "0.2"]
    assert export_main(arguments) == 0
    publish(folder / "repo")
    return folder / "repo"


@pytest.fixture
async def client(repo: Path) -> AsyncIterator[httpx.AsyncClient]:
    settings = Settings(model_repo=repo, device="cpu", threads=1, pool_threads=1)
    app = create_app(settings, load_repository(repo, BackendOptions(device="cpu", threads=1)))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as opened:
            yield opened


def pixels_of(instances: list[dict[str, Any]]) -> list[np.ndarray]:
    return [coco_mask.decode(i["segmentation"]) for i in instances]


async def test_the_service_answers_contours_and_says_so(client: httpx.AsyncClient) -> None:
    answer = await client.post(URL, content=PICTURE)
    body, model = answer.json(), (await client.get("/v2/models/rings")).json()
    assert (answer.status_code, body["task"], model["task"]) == (200, "contour", "contour")
    assert model["postprocess"]["compare"] == "enclosed"
    assert model["postprocess"]["mask_threshold"] == contour_config().postprocess.mask_threshold
    instances = body["results"][0]["instances"]
    assert len(instances) > 1
    for instance, pixels in zip(instances, pixels_of(instances), strict=True):
        assert pixels.shape == IMAGE.shape[:2]
        assert pixels.sum() == instance["area"]


async def test_the_picture_has_lines_in_colour_and_nothing_else(client: httpx.AsyncClient) -> None:
    answer = await client.post(URL, content=PICTURE)
    drawn = await client.post(URL, content=PICTURE, headers={"accept": "image/png"})
    picture = np.asarray(Image.open(io.BytesIO(drawn.content)))
    masks = np.array(pixels_of(answer.json()["results"][0]["instances"])).any(axis=0)
    np.testing.assert_array_equal(picture[~masks], IMAGE[~masks])
    assert (picture[masks].max(axis=1) == 255).all()  # opaque: no image shines through


async def test_a_segmentation_model_beside_it_stays_one(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v2/models/blobs")).json()["task"] == "segmentation"
    answer = await client.post("/segment?model=blobs", content=PICTURE)
    assert answer.json()["task"] == "segmentation"


def test_solo_predict_draws_the_same_picture(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE)
    arguments = [str(tmp_path / "a.png"), "--model-repo", str(repo), "--model", "rings"]
    arguments += ["--out", str(tmp_path / "r.json"), "--overlays", str(tmp_path / "drawn")]
    predict_main([*arguments, "--max-instances", "6", "--device", "cpu", "--quiet"])
    results = json.loads((tmp_path / "r.json").read_text())
    picture = np.asarray(Image.open(tmp_path / "drawn" / "00001_a.png"))
    masks = np.array(pixels_of(results)).any(axis=0)
    np.testing.assert_array_equal((picture != IMAGE).any(axis=2) & ~masks, np.zeros_like(masks))
    assert (picture[masks].max(axis=1) == 255).all()


def test_a_contour_is_scored_as_what_it_encloses(repo: Path, tmp_path: Path) -> None:
    """Perfect contours have AP 1 against the masks; taken for masks they would have none."""
    data = CocoDataset(build_tiny_data(tmp_path, ("val",)), "val")
    contours = [
        {
            "image_id": record.image_id,
            "category_id": data.classes[annotation.label].category_id,
            "score": 0.9,
            "segmentation": rle_of(draw_contour(coco_mask.decode(annotation.rle))),
        }
        for record in data.records
        for annotation in record.annotations
    ]
    assert mask_ap(data.truth(), as_regions(contours, "contour"))["AP"] == pytest.approx(1)
    assert mask_ap(data.truth(), as_regions(contours, "segmentation"))["AP"] < 0.1
    assert as_regions(contours, "segmentation") == contours


def test_solo_eval_scores_the_regions_of_a_folder_and_of_its_checkpoint(repo: Path) -> None:
    served = build_predictor(str(repo / "rings"), None, None, 6)
    assert isinstance(served, RepositoryPredictor)
    curves = [
        fill_contour(coco_mask.decode(i.rle))
        for i in served.loaded.segment(IMAGE, score_threshold=0, max_instances=6)
    ]
    found = pixels_of(served(PICTURE))
    checkpoint = pixels_of(build_predictor(str(repo.parent / "best.pt"), None, None, 6)(PICTURE))
    assert len(curves) == 6
    for one, other, wanted in zip(found, checkpoint, curves, strict=True):
        np.testing.assert_array_equal(one, wanted)
        np.testing.assert_array_equal(other, wanted)


def test_pictures_show_the_images_that_are_named(
    repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = build_tiny_data(tmp_path, ("val",))
    arguments = [str(repo / "rings"), "--data", str(root), "--out", str(tmp_path / "out")]
    assert pictures_main([*arguments, "--images", "val2.png", "val1.png"]) == 0
    assert Image.open(tmp_path / "out" / "chosen.png").size == (3 * 160 + 12, 120 + 6 + 128)
    truth = np.asarray(Image.open(tmp_path / "out" / "chosen.png"))[126:, 2 * 128 + 12 :][:, :128]
    plain = np.asarray(Image.open(root / "images" / "val1.png"))
    changed = (truth[::2, ::2] != plain).any(axis=2)
    assert changed[20, 10] and changed[20, 30] and not changed[20, 12:29].any()
    assert pictures_main([*arguments, "--images", "other.png"]) == 1
    assert "has no image 'other.png'" in capsys.readouterr().err


def test_a_contour_configuration_changes_what_contours_need() -> None:
    base, config = tiny_config(), contour_config()
    assert (base.task, config.task) == ("segmentation", "contour")
    assert (config.loss.mask_loss, config.loss.effective_mask_weight) == ("focal", 20)
    assert config.model.mask_threshold == config.postprocess.mask_threshold < 0.5
    assert replace(config.model, mask_threshold=0.5) == base.model
    assert replace(config.targets, masks="region") == base.targets
    assert (config.schedule, config.augment, config.input) == (
        base.schedule,
        base.augment,
        base.input,
    )


def test_another_task_is_refused(tmp_path: Path) -> None:
    folder = publish(tmp_path, task="depth")
    with pytest.raises(ModelRefused, match="task"):
        load_version(folder)
