"""Folders and several files at once on the demo page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.demo import Demo
from tests.browser.scene import SCENE, count_segmentations
from tests.support.blob_model import draw_picture, encode_picture

pytestmark = pytest.mark.browser

ONE = encode_picture(draw_picture(40, 80, {"blue": (8, 8, 20, 24)}))
"""A picture with one instance; SCENE has two."""


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def read_choice(demo: Demo) -> list[str]:
    return demo.page.locator("#choice option").all_inner_texts()


def await_alert(demo: Demo, text: str) -> str:
    alert = demo.page.get_by_role("alert").filter(has_text=text)
    alert.wait_for()
    return alert.inner_text()


def test_the_images_of_a_folder_can_be_chosen(demo: Demo, tmp_path: Path) -> None:
    folder = tmp_path / "plate"
    files = {"b/9.png": ONE, "b/10.png": SCENE, "a.png": SCENE, "b/c/d.PNG": ONE}
    write_files(folder, files)
    write_files(folder, {"notes.txt": b"words", "b/table.csv": b"1,2", ".hidden.png": ONE})
    (folder / "void").mkdir()
    demo.drop(folder)
    demo.await_result()
    assert demo.by_id("about").inner_text().startswith("a.png, 80 × 40 px.")
    expected = ["plate/a.png", "plate/b/9.png", "plate/b/10.png", "plate/b/c/d.PNG"]
    assert read_choice(demo) == expected
    assert demo.by_id("choice-count").inner_text() == "of 4"
    assert (
        demo.by_id("choice-rest").inner_text() == "Not images: plate/b/table.csv, plate/notes.txt."
    )
    assert count_segmentations(demo) == 1, "only what is shown is sent"
    demo.page.get_by_role("combobox", name="Image", exact=True).focus()
    for name, count in (("9.png", 1), ("10.png", 2), ("d.PNG", 1)):
        demo.page.keyboard.press("ArrowDown")
        demo.page.locator("#about", has_text=name).wait_for()
        demo.await_result()
        assert len(demo.shown_rows()) == count
    assert count_segmentations(demo) == 4


def test_a_folder_without_an_image_is_explained(demo: Demo, tmp_path: Path) -> None:
    demo.segment(SCENE)
    (tmp_path / "void").mkdir()
    demo.drop(tmp_path / "void")
    await_alert(demo, "The folder has no image. Use JPEG, PNG, WebP, BMP or TIFF.")
    write_files(tmp_path / "texts", {f"{n}.txt": b"words" for n in range(7)})
    demo.drop(tmp_path / "texts")
    text = await_alert(demo, "Other files: ")
    assert "texts/0.txt" in text
    assert text.strip().endswith(" and 2 more.")
    assert demo.by_id("retry").is_hidden()
    assert demo.by_id("choice-field").is_hidden()
    assert len(demo.shown_rows()) == 2, "what was there stays"
    assert count_segmentations(demo) == 1


def test_a_folder_with_very_many_files_is_cut(demo: Demo, tmp_path: Path) -> None:
    write_files(tmp_path / "many", {f"{n}.png": SCENE for n in range(503)})
    demo.drop(tmp_path / "many")
    demo.await_result()
    assert len(read_choice(demo)) == 500
    note = demo.by_id("choice-rest").inner_text()
    assert note == "Only the first 500 images are listed."


def test_several_files_are_told_from_others(demo: Demo, tmp_path: Path) -> None:
    write_files(tmp_path, {"a.png": ONE, "b.png": SCENE, "notes.txt": b"words"})
    demo.by_id("file").set_input_files([tmp_path / n for n in ("notes.txt", "b.png", "a.png")])
    demo.await_result()
    assert read_choice(demo) == ["a.png", "b.png"]
    assert demo.by_id("choice-rest").inner_text() == "Not images: notes.txt."
    demo.drop(tmp_path / "notes.txt", tmp_path / "a.png")
    demo.page.locator("#choice-count", has_text="of 1").wait_for()
    demo.await_result()
    assert read_choice(demo) == ["a.png"]
    demo.page.get_by_role("button", name="Sparse nuclei").click()
    demo.page.locator("#about", has_text="sparse.jpg").wait_for()
    assert demo.by_id("choice-field").is_hidden()


def test_a_single_file_is_left_to_the_server(demo: Demo, tmp_path: Path) -> None:
    write_files(tmp_path, {"notes.txt": b"words", "picture": SCENE})
    demo.drop(tmp_path / "notes.txt")
    await_alert(demo, "notes.txt: The server cannot read this file as an image.")
    demo.drop(tmp_path / "picture")
    demo.await_result()
    assert len(demo.shown_rows()) == 2
    assert demo.by_id("choice-field").is_hidden()


def test_an_empty_file_is_named_and_not_sent(demo: Demo, tmp_path: Path) -> None:
    write_files(tmp_path / "d", {"a.png": b"", "b.png": SCENE})
    demo.drop(tmp_path / "d")
    await_alert(demo, "a.png: This file is empty.")
    assert demo.by_id("busy").is_hidden()
    assert count_segmentations(demo) == 0
    demo.by_id("choice").select_option(label="d/b.png")
    demo.await_result()
    assert len(demo.shown_rows()) == 2
    assert demo.page.get_by_role("alert").is_hidden()


def test_a_file_that_is_gone_is_not_a_server_that_is_gone(demo: Demo, tmp_path: Path) -> None:
    write_files(tmp_path, {"a.png": SCENE, "b.png": SCENE})
    demo.drop(tmp_path / "a.png", tmp_path / "b.png")
    demo.await_result()
    (tmp_path / "b.png").unlink()
    demo.by_id("choice").select_option(label="b.png")
    await_alert(demo, "b.png: This file cannot be read.")
    assert count_segmentations(demo) == 1
