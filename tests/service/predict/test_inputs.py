from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.errors import StartupError
from service.predict.errors import ImageUnusable
from service.predict.inputs import assign_ids, find_files, find_image_id, read_image_ids


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    for name in ("a.png", "deeper/b.JPG", "notes.txt"):
        (folder / name).touch()
    return folder


def test_inputs_may_be_files_folders_and_globs_and_count_once(images: Path) -> None:
    found = find_files([str(images / "*.png"), str(images), str(images / "a.png")])
    assert [p.name for p in found] == ["a.png", "b.JPG"]
    with pytest.raises(StartupError, match="is not an image"):
        find_files([str(images / "*.webp")])


def test_an_image_that_has_no_id_fails() -> None:
    assert find_image_id(Path("x/val/a.png"), {"val/a.png": 3, "a.png": 4}) == 3
    with pytest.raises(ImageUnusable, match="annotations"):
        find_image_id(Path("x/b.png"), {"a.png": 4})


def test_ids_are_numbers_in_order_or_from_annotations(tmp_path: Path) -> None:
    files = [Path("b.png"), Path("a.png")]
    assert assign_ids(files, None) == ({files[0]: 1, files[1]: 2}, {})
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"images": [{"id": 7, "file_name": "a.png"}]}))
    ids, missing = assign_ids(files, truth)
    assert ids == {files[1]: 7}
    assert list(missing) == [files[0]]


@pytest.mark.parametrize("text", ["", "[]", '{"images": 3}', '{"images": [{"id": 1}]}'])
def test_a_file_without_images_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "truth.json").write_text(text)
    with pytest.raises(StartupError, match=r"truth\.json: not a COCO file"):
        read_image_ids(tmp_path / "truth.json")
