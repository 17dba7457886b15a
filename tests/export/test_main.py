"""solo-export from a checkpoint to a served version."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.__main__ import find_measured, main
from export.new_version import read_card
from export.parity import draw_blobs
from export.publish import Artefact, Release, add_artefacts, publish
from pipeline.model_config import ModelCard
from pipeline.postprocess import postprocess
from pipeline.preprocess import prepare
from pipeline.types import Candidates, Detection
from service.engines.base import BackendOptions
from service.models.repository import LoadedModel, find_default, load_version
from tests.support.tiny import build_tiny_data
from tests.support.tiny_solo import save_tiny_checkpoint, tiny_config, tiny_network
from tests.support.typed_graph import build_config, build_graph
from training.configs.schema import Config
from training.data.coco import CocoDataset
from training.model.solo import Solo
from training.weights.formats import save_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def network(folder: Path) -> Solo:
    network = tiny_network(tiny_config())
    content = {"model": network.state_dict(), "ema": {}, "provenance": {"imported_from": "a file"}}
    save_checkpoint(folder / "best.pt", tiny_config(), content)
    return network


CARD = {"domain": "drawn discs", "object_size_px": 12}


@pytest.fixture(scope="module")
def published(folder: Path, network: Solo) -> Path:
    """The version's folder after a run of the command."""
    provenance = folder / "provenance.json"
    provenance.write_text(json.dumps({"training_data": "drawn discs", "licence": "CC0"}))
    card = folder / "card.json"
    card.write_text(json.dumps(CARD))
    status = main(
        [
            *(str(folder / "best.pt"), "--out", str(folder / "repo")),
            *("--name", "discs", "--version", "2", "--max-batch", "4"),
            *("--score-threshold", "0.25", "--provenance-json", str(provenance)),
            *("--card", str(card)),
        ]
    )
    assert status == 0
    return folder / "repo" / "discs" / "2"


@pytest.fixture(scope="module")
def loaded(published: Path) -> LoadedModel:
    return load_version(published.parent, None, BackendOptions(device="cpu", threads=1))


def segment_with_torch(network: Solo, config: Config, image: Any) -> list[Detection]:
    prepared = prepare(image, config.input)
    found = []
    for tile in prepared.tiles:
        with torch.inference_mode():
            outputs = network.candidates(
                torch.from_numpy(tile.image[None]), torch.tensor([tile.valid_hw])
            )
        found.append(Candidates(*(output[0].numpy() for output in outputs)))
    return postprocess(prepared, found, config.postprocess, score_threshold=0.25).instances


@pytest.mark.parametrize("image_hw", [(64, 64), (50, 40), (100, 130)])
def test_the_served_instances_are_pytorchs(
    network: Solo, loaded: LoadedModel, image_hw: tuple[int, int]
) -> None:
    image = draw_blobs(np.random.default_rng(5), image_hw)
    expected = segment_with_torch(network, tiny_config(), image)
    found = loaded.segment(image)
    assert len(expected) > 3
    assert [(i.label, i.rle, i.bbox_xywh, i.area) for i in found] == [
        (i.label, i.rle, i.bbox_xywh, i.area) for i in expected
    ]
    np.testing.assert_allclose(
        [i.score for i in found], [i.score for i in expected], rtol=0, atol=1e-4
    )


def test_config_json_follows_the_checkpoint_and_the_options(loaded: LoadedModel) -> None:
    config, wanted = loaded.config, tiny_config()
    assert (config.name, config.version) == ("discs", 2)
    assert config.input == wanted.input and config.classes == wanted.classes
    assert (config.candidates, config.mask_stride, config.limits.max_batch) == (60, 4, 4)
    assert config.postprocess.score_threshold == 0.25
    assert config.postprocess.nms == wanted.postprocess.nms


def test_a_card_is_published_and_the_next_version_has_it_too(
    folder: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    assert loaded.config.card == ModelCard(domain="drawn discs", object_size_px=12)
    assert ModelCard(**read_card(None, folder / "repo" / "discs")) == loaded.config.card
    assert read_card(None, tmp_path / "new") == {}


def test_provenance_has_the_run_but_no_local_paths(folder: Path, loaded: LoadedModel) -> None:
    provenance = loaded.config.provenance
    assert provenance["config"] == "tiny"
    assert provenance["training_data"] == "drawn discs"
    assert provenance["imported_from"] == "a file"
    assert provenance["checkpoint"]["file"] == "best.pt"
    assert provenance["command"].startswith("solo-export best.pt --out repo --name discs")
    assert str(folder) not in json.dumps(provenance)


def test_the_parity_report_is_published_with_the_graph(
    published: Path, loaded: LoadedModel
) -> None:
    report = json.loads((published / "parity.json").read_text())
    assert report["passed"] is True
    assert report["graph"] == loaded.config.files["model.onnx"].model_dump()
    sizes = {tuple(case["canvas_hw"]) for case in report["cases"]}
    batches = {case["batch"] for case in report["cases"]}
    assert len(sizes) == 2 and len(batches) == 2
    assert report["total"]["candidates_torch"] > 100


def test_what_is_served_now_is_said(
    folder: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = tmp_path / "repo"
    shutil.copytree(published.parent, repo / "discs")
    file = repo / "discs" / "config.json"
    pinned = {"policy": "specific", "versions": [2]}
    file.write_text(json.dumps({**json.loads(file.read_text()), "serve": pinned}))
    assert main([str(folder / "best.pt"), "--out", str(repo), "--name", "discs"]) == 0
    printed = capsys.readouterr().out
    assert "serves version 2 of discs, not 3; to serve it: solo-models serve discs 3" in printed
    assert "requests that name no model are answered by discs" in printed
    assert main([str(folder / "best.pt"), "--out", str(repo), "--name", "another"]) == 0
    printed = capsys.readouterr().out
    assert "discs was the only model and is now recorded as the default" in printed
    assert find_default(repo) == "discs"


def test_an_existing_version_is_rejected_before_the_export(
    folder: Path, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (published / "model.onnx").stat().st_mtime_ns
    again = [str(folder / "best.pt"), "--out", str(folder / "repo"), "--name", "discs"]
    assert main([*again, "--version", "2"]) == 1
    captured = capsys.readouterr()
    assert "2 already exists; choose another version or use --force" in captured.err
    assert "exporting" not in captured.out
    assert (published / "model.onnx").stat().st_mtime_ns == before


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the export starts: the error must be raised first."""

    def unreachable(*_: Any, **__: Any) -> bytes:
        raise AssertionError("the export was started")

    monkeypatch.setattr("export.__main__.build_onnx", unreachable)


@pytest.mark.usefixtures("quick")
def test_invalid_arguments_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "repo")]
    checkpoint = tmp_path / "a.pt"
    save_tiny_checkpoint(checkpoint, tiny_config())
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "wrong.json").write_text('{"object_size_px": -1}')
    nameless = tmp_path / "nameless.pt"
    save_tiny_checkpoint(nameless, replace(tiny_config(), classes=()))
    for arguments, reason in (
        ([str(tmp_path / "none.pt")], "no checkpoint at"),
        ([str(tmp_path / "list.json")], "cannot be read as a checkpoint"),
        ([str(checkpoint), "--provenance-json", str(tmp_path / "list.json")], "contains a list"),
        ([str(checkpoint), "--provenance-json", str(tmp_path / "no.json")], "no.json cannot be"),
        ([str(checkpoint), "--card", str(tmp_path / "list.json")], "contains a list"),
        ([str(checkpoint), "--card", str(tmp_path / "wrong.json")], "card.object_size_px"),
        ([str(checkpoint), "--data", str(tmp_path)], "has no labels of a known format"),
        ([str(checkpoint), "--version", "0"], "version"),
        ([str(checkpoint), "--out", str(tmp_path / "list.json" / "repo")], "cannot be written"),
        ([str(checkpoint), "--max-batch", "0"], "max_batch"),
        ([str(checkpoint), "--score-threshold", "1.5"], "score_threshold"),
        ([str(checkpoint), "--name", "../x"], "name"),
        ([str(nameless)], "has 0 class names, but its network has 2 classes"),
    ):
        assert main([*out, *arguments]) == 1, arguments
        error = capsys.readouterr().err
        assert error.startswith("solo-export: ") and reason in error, error
    assert not (tmp_path / "repo").exists()


def test_a_graph_that_differs_from_pytorch_is_not_published(
    folder: Path, network: Solo, tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_config()
    save_tiny_checkpoint(tmp_path / "other.pt", other, seed=1)
    graph = (published / "model.onnx").read_bytes()  # of other weights
    monkeypatch.setattr("export.__main__.build_onnx", lambda *_, **__: graph)
    assert main([str(tmp_path / "other.pt"), "--out", str(tmp_path / "repo")]) == 1
    assert not (tmp_path / "repo").exists()


def test_data_adds_images_to_the_comparison_and_an_ap(
    folder: Path,
    network: Solo,
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from PIL import Image

    data = tmp_path / "data"
    (data / "annotations").mkdir(parents=True)
    (data / "images").mkdir()
    rng = np.random.default_rng(0)
    for index in range(2):
        Image.fromarray(draw_blobs(rng, (64, 80))).save(data / "images" / f"{index}.png")
    box = {"id": 1, "image_id": 0, "category_id": 3, "area": 400, "bbox": [5, 5, 20, 20]}
    polygon = [[5, 5, 25, 5, 25, 25, 5, 25]]
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 64, "width": 80} for i in range(2)],
        "annotations": [{**box, "iscrowd": 0, "segmentation": polygon}],
        "categories": [{"id": c.category_id, "name": c.name} for c in tiny_config().classes],
    }
    (data / "annotations" / "val.json").write_text(json.dumps(content))
    graph = (published / "model.onnx").read_bytes()
    monkeypatch.setattr("export.__main__.build_onnx", lambda *_, **__: graph)
    repo = tmp_path / "repo"
    arguments = [str(folder / "best.pt"), "--out", str(repo), "--data", str(data)]
    assert main([*arguments, "--precision", "fp16"]) == 0
    printed = capsys.readouterr().out
    numbers = re.findall(r"^solo-export: \[(\d)/6\]", printed, re.MULTILINE)
    assert numbers == ["1", "2", "3", "4", "5", "6"]
    assert re.search(r"on 2 images; at the score threshold 0.3 .* where 1 are labelled", printed)
    assert f"curl -F images=@{data / 'images' / '0.png'} 'http://localhost:8000" in printed
    report = json.loads((repo / "tiny" / "1" / "parity.json").read_text())
    assert [c["batch"] for c in report["cases"] if c["content"] == "data"] == [2, 2]
    entry = json.loads((repo / "tiny" / "config.json").read_text())["versions"]["1"]
    assert list(entry["files"]) == ["model.onnx", "model.fp16.onnx"]
    variant = json.loads((repo / "tiny" / "1" / "parity.fp16.json").read_text())
    assert variant["passed"] is True and variant["AP"]["images"] == 2
    measured = entry["provenance"]["measured"]
    assert measured["split"] == "val" and measured["images"] == 2
    assert -1 <= measured["AP"] <= 1
    # Classes that the model does not have, and images without annotations.
    file = data / "annotations" / "val.json"
    for wrong, message in (
        ({"categories": [{"id": 3, "name": "other"}]}, "category 3 is 'other', the model tiny"),
        ({"annotations": None}, "has no annotations"),
    ):
        kept = {name: value for name, value in {**content, **wrong}.items() if value is not None}
        file.write_text(json.dumps(kept))
        assert main(arguments) == 1
        assert message in capsys.readouterr().err


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """The folder of a published version."""
    graph = build_graph()
    return publish(tmp_path / "repo", Release(build_config(graph), graph, {"passed": True}))


def test_variants_are_added_and_the_version_is_served_as_before(
    version: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--variants-of", str(version), "--precision", "fp16"]) == 0
    assert "published model.fp16.onnx, each with its parity report" in capsys.readouterr().out
    report = json.loads((version / "parity.fp16.json").read_text())
    assert report["passed"] is True and report["AP"] is None
    assert report["command"] == "solo-export --variants-of 1 --precision fp16"
    loaded = load_version(version.parent, 1, BackendOptions(device="cpu", threads=1))
    assert set(loaded.config.files) == {"model.onnx", "model.fp16.onnx"}
    loaded.backend.close()


def test_variants_are_added_to_a_version_whose_publication_was_interrupted(version: Path) -> None:
    version.rename(version.parent / f".{version.name}.next")
    assert main(["--variants-of", str(version), "--precision", "fp16", "--accept-unrun"]) == 0
    assert (version / "model.fp16.onnx").is_file() and (version / "model.onnx").is_file()
    assert not list(version.parent.glob(".*"))


def test_an_existing_variant_is_only_replaced_with_force(
    version: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--variants-of", str(version), "--precision", "fp16"]
    assert main(arguments) == 0
    assert main([*arguments, "--force"]) == 0
    monkeypatch.setattr("export.__main__.build_variants", lambda *_, **__: pytest.fail("too late"))
    assert main(arguments) == 1
    assert "model.fp16.onnx already exists; --force replaces it" in capsys.readouterr().err


def test_variants_of_an_invalid_version_are_explained(
    version: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty" / "1").mkdir(parents=True)
    changed = tmp_path / "changed"
    shutil.copytree(version.parent, changed / "typed")
    (changed / "typed" / "1" / "model.onnx").write_bytes(b"other")
    for target, reason in (
        (version.parent, "typed is not a version: expected <model_repo>/<name>/<number>"),
        (version.parent / "7", "has no version 7, only [1]"),
        (tmp_path / "empty" / "1", "has no config.json; is it a model folder"),
        (changed / "typed" / "1", "differs from its entry in config.json"),
    ):
        assert main(["--variants-of", str(target), "--precision", "fp16"]) == 1, target
        error = capsys.readouterr().err
        assert error.startswith("solo-export: ") and reason in error, error


def test_a_rejected_variant_changes_nothing(
    version: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in version.parent.rglob("*") if p.is_file()}
    assert main(["--variants-of", str(version), "--precision", "int8"]) == 1
    assert "int8 requires --data" in capsys.readouterr().err
    assert main(["--variants-of", str(version), "--precision", "bf16"]) == 1
    assert "--accept-unrun publishes it nevertheless" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in version.parent.rglob("*") if p.is_file()}


def test_exits_are_added_and_the_cpu_uses_them(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(published.parent, tmp_path / "discs")
    arguments = ["--variants-of", str(folder / "2"), "--exits"]
    assert main(arguments) == 0
    assert "canvases are bit-identical" in capsys.readouterr().out
    assert json.loads((folder / "2" / "parity.exits.json").read_text())["passed"] is True
    loaded = load_version(folder, 2, BackendOptions(device="cpu", threads=1))
    assert loaded.backend.reason.startswith("CPU provider, early exits")
    loaded.backend.close()
    assert main(arguments) == 1
    assert "model.exits.onnx already exists; --force replaces it" in capsys.readouterr().err


def test_a_graph_is_not_replaced_without_its_graph_with_exits(
    version: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("model.int8.onnx", "model.int8.exits.onnx")
    files = [Artefact(name, b"int8", {"passed": True}) for name in names]
    add_artefacts(version.parent, 1, files)
    assert main(["--variants-of", str(version), "--precision", "int8", "--force"]) == 1
    expected = "model.int8.exits.onnx is built from a graph that would be replaced; add --exits"
    assert expected in capsys.readouterr().err


def test_a_recorded_ap_is_only_reused_for_the_same_split(tmp_path: Path) -> None:
    data = CocoDataset(build_tiny_data(tmp_path), "val")
    model = build_config(build_graph())
    entry = {"split": "val", "images": 3, "max_dets": model.postprocess.max_instances, "AP": 0.5}
    for changes, expected in (
        ({}, {"AP": 0.5}),
        ({"split": "test"}, None),
        ({"images": 4}, None),
        ({"max_dets": 1}, None),
    ):
        measured = {"measured": {**entry, **changes}}
        known = model.model_copy(update={"provenance": measured})
        assert find_measured(known, data, "val") == expected
    assert find_measured(model, data, "val") is None
