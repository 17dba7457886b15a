from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.writers import FORMATS
from service.predict import main
from service.predict.documents import replace_folder
from tests.support.blob_model import draw_picture, encode_picture, publish
from training.data.formats import open_dataset

RED = {"red": (4, 8, 12, 16), "blue": (30, 30, 10, 10)}
FOLDERS = sorted(name for name, chosen in FORMATS.items() if chosen.join is None)
READABLE = ("labelme", "labels", "ome-tiff", "yolo")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.png").write_bytes(encode_picture(draw_picture(48, 64, RED)))
    (folder / "a.jpg").write_bytes(encode_picture(np.zeros((30, 40, 3), np.uint8), "JPEG"))
    (folder / "deeper" / "c\n<d>.png").write_bytes(encode_picture(draw_picture(48, 64, RED)))
    publish(tmp_path / "repo")
    monkeypatch.chdir(tmp_path)
    return folder


def predict(*arguments: str) -> None:
    main([*arguments, "--model-repo", "repo", "--device", "cpu", "--quiet"])


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_has_a_file_for_each_image(images: Path, name: str) -> None:
    predict("images", "--format", name)
    chosen = FORMATS[name]
    folder = f"{chosen.folder}/" if chosen.folder else ""
    stems = ("a", "a_2", "deeper/c__d_")
    found = names_in(Path("results"))
    assert {f"{folder}{stem}{chosen.suffix}" for stem in stems} <= found
    assert ".solo-predict" in found
    assert not list(Path().glob("results.partial*"))


@pytest.mark.parametrize("name", READABLE)
def test_with_the_images_a_folder_is_a_data_set(images: Path, name: str) -> None:
    predict("images", "--format", name, "--copy-images", "--out", "found")
    content = open_dataset(Path("found"), "")
    assert len(content.images) == 3
    annotations = list(content.annotations or ())
    assert len(annotations) == 4
    assert sorted(annotation["area"] for annotation in annotations)[-1] == 192
    sizes = {(image["height"], image["width"]) for image in content.images}
    assert sizes == {(48, 64), (30, 40)}


def test_a_document_has_all_images(images: Path) -> None:
    predict("images", "--format", "coco")
    content = json.loads(Path("results.coco.json").read_bytes())
    assert [image["file_name"] for image in content["images"]] == [
        *("a.jpg", "a.png", "deeper/c\n<d>.png"),
    ]
    assert content["images"][0]["height"] == 30  # without instances, from the file
    assert [annotation["image_id"] for annotation in content["annotations"]] == [2, 2, 3, 3]
    assert [c["name"] for c in content["categories"]] == ["red", "green", "blue"]


def test_a_document_of_coco_beside_its_images_is_a_data_set(images: Path) -> None:
    predict("images", "--format", "coco-polygons", "--out", "images/found.json")
    content = open_dataset(images, "")
    assert len(content.images) == 3 and len(list(content.annotations or ())) == 4


def test_a_table_can_be_written_again(images: Path) -> None:
    for _ in range(2):
        predict("images", "--format", "csv", "--out", "table.csv")
        with open("table.csv", newline="") as file:
            assert [row["area"] for row in csv.DictReader(file)] == ["192", "100", "192", "100"]


def test_a_folder_is_replaced_as_a_whole(images: Path) -> None:
    predict("images", "--format", "geojson")
    (images / "a.png").unlink()
    predict("images", "--format", "yolo")
    assert names_in(Path("results")) == {
        *(".solo-predict", "data.yaml", "labels/a.txt", "labels/deeper/c__d_.txt"),
    }
    assert not list(Path("results").rglob("*.geojson"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--simplify-px", "1"], "need a --format"),
        (["--copy-images"], "need a --format"),
        (["--format", "csv", "--copy-images"], "--format csv writes one file, not a folder"),
        (["--format", "csv", "--simplify-px", "1"], "csv has no outlines"),
        (["--format", "yolo", "--out", "images"], "is not empty and was not written by this"),
        (["--format", "yolo", "--out", "images/a.png"], "is a file; --format yolo writes a folder"),
        (["--format", "csv", "--out", "images/a.png"], "was not written by this command"),
        (["--format", "coco", "--out", "labels.json"], "was not written by this command"),
        (["--format", "csv", "--out", "images"], "is a folder"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(
    images: Path, arguments: list[str], reason: str
) -> None:
    Path("labels.json").write_text('{"annotations": [], "images": []}')
    with pytest.raises(SystemExit, match=reason):
        predict("images", *arguments)
    assert not list(Path().glob("*partial*"))
    assert Path("labels.json").read_text() == '{"annotations": [], "images": []}'


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "x"])
def test_a_distance_is_a_number(images: Path, value: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        predict("images", "--format", "yolo", f"--simplify-px={value}")
    assert stopped.value.code == 2


def test_its_own_folder_is_not_an_input(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict("images", "--format", "labels", "--copy-images", "--out", "images/found")
    for end in ("new", "old"):  # of a run that was killed
        shutil.copytree("images/found", f"images/found.partial-{end}")
    predict("images", "--format", "labels", "--copy-images", "--out", "images/found")
    assert not list(images.glob("found.*"))
    assert "4 instances in 3 images" in capsys.readouterr().out
    with Image.open("images/found/masks/a_2.png") as image:
        assert np.asarray(image).max() == 2


def test_a_failed_folder_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("")
    with pytest.raises(ValueError, match="no"), replace_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("")
        raise ValueError("no")
    assert names_in(tmp_path) == {"out/kept"}
