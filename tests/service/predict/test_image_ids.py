from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from service.errors import StartupError
from service.jobs.errors import ImageUnusable
from service.jobs.files import LocalFile, build_folder
from service.jobs.listing import Listing
from service.predict.image_ids import KnownIds, assign_ids, find_image_id, read_image_ids


def read(tmp_path: Path, *images: tuple[str, Any]) -> KnownIds:
    truth = tmp_path / "truth.json"
    content = [{"id": image_id, "file_name": name} for name, image_id in images]
    truth.write_text(json.dumps({"images": content}))
    return read_image_ids(truth)


def list_files(*names: str, folder: str = "/data/in") -> Listing:
    listing = Listing()
    listing.cover(folder)
    root = build_folder(folder)
    listing.files += [LocalFile(root, name) for name in names]
    return listing


def assign(known: KnownIds | None, *names: str) -> list[int | str]:
    ids = assign_ids(list_files(*names), known)
    return [found if isinstance(found, int) else str(found) for found in ids]


def test_ids_are_numbers_in_order_or_from_annotations(tmp_path: Path) -> None:
    assert assign(None, "b.png", "a.png") == [1, 2]
    assert assign(None) == []
    known = read(tmp_path, ("a.png", 7))
    assert assign(known, "b.png", "a.png") == ["it is not in the annotations", 7]


def test_the_longest_end_of_a_path_counts(tmp_path: Path) -> None:
    known = read(tmp_path, ("val/a.png", 3), ("a.png", 4), ("/abs/b.png", 5))
    assert find_image_id("/x/val/a.png", known) == 3
    assert find_image_id("/x/train/a.png", known) == 4
    assert find_image_id("s3://bucket/val/a.png", known) == 3
    assert find_image_id("/abs/b.png", known) == 5
    for other in ("/x/b.png", "/x/xa.png", "a.png/c"):
        with pytest.raises(ImageUnusable, match="not in the annotations"):
            find_image_id(other, known)


def test_files_that_share_a_name_are_ambiguous_and_the_others_have_their_ids(
    tmp_path: Path,
) -> None:
    known = read(tmp_path, ("1.jpg", 7), ("2.jpg", 8))
    first, second, third = assign(known, "a/1.jpg", "b/1.jpg", "b/2.jpg")
    assert first == "ambiguous: the annotations give its image id 7 to /data/in/b/1.jpg"
    assert second == "ambiguous: the annotations give its image id 7 to /data/in/a/1.jpg"
    assert third == 8
    many = assign(known, *(f"{folder}/1.jpg" for folder in "abcdef"))
    assert all(str(reason).endswith(" and 2 more") for reason in many)


def test_paths_in_the_annotations_distinguish_files(tmp_path: Path) -> None:
    known = read(tmp_path, ("a/1.jpg", 7), ("b/1.jpg", 8))
    assert assign(known, "a/1.jpg", "b/1.jpg") == [7, 8]


def test_a_file_whose_whole_path_is_named_keeps_its_id(tmp_path: Path) -> None:
    known = read(tmp_path, ("1.jpg", 7))
    first, second = assign(known, "1.jpg", "small/1.jpg")
    assert first == 7
    assert second == "ambiguous: the annotations give its image id 7 to /data/in/1.jpg"


def test_an_id_that_the_annotations_give_to_two_names_is_ambiguous(tmp_path: Path) -> None:
    known = read(tmp_path, ("a.jpg", 7), ("b.jpg", 7), ("c.jpg", 8))
    first, second, third = assign(known, "a.jpg", "b.jpg", "c.jpg")
    assert str(first).startswith("ambiguous") and str(second).startswith("ambiguous")
    assert third == 8
    assert assign(known, "a.jpg") == [7]


def test_a_name_with_two_ids_is_ambiguous(tmp_path: Path) -> None:
    known = read(tmp_path, ("a.jpg", 7), ("a.jpg", 8), ("b.jpg", 9), ("b.jpg", 9))
    first, second = assign(known, "a.jpg", "b.jpg")
    assert first == "ambiguous: the annotations have several ids for 'a.jpg'"
    assert second == 9


@pytest.mark.parametrize(("on_disk", "annotated"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_decomposed_and_composed_names_are_the_same(
    tmp_path: Path, on_disk: Any, annotated: Any
) -> None:
    name = "Zürich/Müller é.jpg"
    known = read(tmp_path, (unicodedata.normalize(annotated, name), 5))
    assert assign(known, unicodedata.normalize(on_disk, name)) == [5]


def test_ways_to_write_a_path_are_the_same(tmp_path: Path) -> None:
    known = read(tmp_path, ("./val//a.jpg", 5))
    assert assign(known, "val/a.jpg") == [5]


def test_names_that_are_not_unicode_are_found(tmp_path: Path) -> None:
    known = read(tmp_path, ("M\udcfcller.jpg", 5))
    assert assign(known, "M\udcfcller.jpg") == [5]


@pytest.mark.parametrize("image_id", [7, "7", 7.0, 2**63 - 1, -1, 0])
def test_whole_numbers_are_ids(tmp_path: Path, image_id: Any) -> None:
    assert read(tmp_path, ("a.jpg", image_id)) == {"a.jpg": int(image_id)}


@pytest.mark.parametrize("image_id", [None, "x", 7.5, 2**63, 10**30, float("nan"), 1e400, [7]])
def test_other_ids_are_refused(tmp_path: Path, image_id: Any) -> None:
    with pytest.raises(StartupError, match=r"truth\.json: not a COCO file"):
        read(tmp_path, ("a.jpg", image_id))


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"images": 3}', '{"images": [{"id": 1}]}', '{"images": [3]}', "\xff", "[" * 10**5],
)
def test_a_file_without_images_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "truth.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(StartupError, match=r"truth\.json: not a COCO file"):
        read_image_ids(tmp_path / "truth.json")
    with pytest.raises(StartupError, match=r"missing\.json: not a COCO file"):
        read_image_ids(tmp_path / "missing.json")
