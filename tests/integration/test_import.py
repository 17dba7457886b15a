"""From a published checkpoint to a served model: solo-import, solo-export, the registry."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from export.__main__ import main as export_main
from export.parity import draw_blobs
from pipeline.decode import decode_image
from pipeline.postprocess import postprocess
from pipeline.preprocess import prepare
from pipeline.types import Candidates, Detection, UInt8
from service.engines.base import BackendOptions
from service.models.repository import load_version
from tests.support.file_server import serve_files
from tests.support.published import small_config, write_published
from tests.support.server import ROOT
from training.configs.coco_classes import COCO_CLASSES
from training.configs.schema import Config
from training.model.solo import Solo
from training.weights.importing import main as import_main
from training.weights.sources import get_model


def segment_with_torch(network: Solo, config: Config, image: UInt8) -> list[Detection]:
    """What the published network finds, through the pipeline that serves it."""
    prepared = prepare(image, config.input)
    (tile,) = prepared.tiles
    with torch.inference_mode():
        outputs = network.eval().candidates(
            torch.from_numpy(tile.image[None]), torch.tensor([tile.valid_hw])
        )
    found = [Candidates(*(output[0].numpy() for output in outputs))]
    return postprocess(prepared, found, config.postprocess).instances


@pytest.mark.slow
def test_a_small_published_model_ends_in_the_registry(tmp_path: Path) -> None:
    config = small_config("decoupled")
    network = write_published(tmp_path / "a.pth", config, "authors", legacy=True)
    sides = ["--set", "input.resize.short_side=64", "--set", "input.resize.long_side=96"]
    assert import_main([str(tmp_path / "a.pth"), "--out", str(tmp_path / "ckpt"), *sides]) == 0
    assert export_main([str(tmp_path / "ckpt"), "--out", str(tmp_path / "repo")]) == 0
    folder = tmp_path / "repo" / "decoupled_solo_r50_custom"
    loaded = load_version(folder, None, BackendOptions(device="cpu", threads=1))
    assert loaded.config.classes == COCO_CLASSES
    stored = json.loads((folder / "config.json").read_text())
    origin = stored["versions"]["1"]["provenance"]["imported_from"]
    digest = hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()
    assert origin == {"file": "a.pth", "sha256": digest}

    image = draw_blobs(np.random.default_rng(5), (60, 90))
    served = Config(name="served", input=loaded.config.input, postprocess=loaded.config.postprocess)
    expected = segment_with_torch(network, served, image)
    found = loaded.segment(image)
    loaded.backend.close()
    assert len(expected) > 3
    assert [(i.label, i.area, i.rle) for i in found] == [(i.label, i.area, i.rle) for i in expected]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoupled_solo_r50_fpn_3x_coco", "DECOUPLED_SOLO_R50_3x"])
def test_a_full_size_published_model_ends_in_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    published = get_model(name)
    write_published(tmp_path / "file", published.config(), published.publisher, legacy=True)
    data = (tmp_path / "file").read_bytes()
    monkeypatch.setenv("SOLO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    out, repository = str(tmp_path / "ckpt"), str(tmp_path / "repo")
    with serve_files({published.file_name: data}) as server:
        monkeypatch.setenv("SOLO_MIRROR", server.url)
        digest = hashlib.sha256(data).hexdigest()
        assert import_main([name, "--out", out, "--sha256", digest]) == 0
    assert export_main([out, "--out", repository]) == 0
    folder = tmp_path / "repo" / "decoupled_solo_r50"
    loaded = load_version(folder, None, BackendOptions(device="cpu"))
    image = next((ROOT / "tests" / "data" / "nuclei" / "images").iterdir())
    found = loaded.segment(decode_image(image.read_bytes()))
    loaded.backend.close()
    assert found and all(0 <= instance.label < 80 for instance in found)
    versions = json.loads((folder / "config.json").read_text())["versions"]
    assert versions["1"]["provenance"]["imported_from"]["name"] == name
