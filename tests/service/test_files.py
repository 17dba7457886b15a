from __future__ import annotations

from pathlib import Path

import pytest

from training.files import replace_text, replaced


def test_a_file_and_its_folder_appear_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    for text in ("é", ""):
        replace_text(path, text)
        assert path.read_bytes() == text.encode()
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_the_file_before_stays(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(error), replaced(path) as partial:
        partial.write_text("half")
        assert path.read_text() == "old"
        raise error
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "old"


def test_an_error_before_anything_is_written_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="early"), replaced(tmp_path / "a"):
        raise ValueError("early")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "a.partial").write_text("half")
    with replaced(tmp_path / "a") as partial:
        assert not partial.exists()
        partial.write_text("whole")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]
