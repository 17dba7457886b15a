from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath

import pytest

from pipeline.writers import FORMATS
from pipeline.writers.page import name_files

HOSTILE = (
    *("../../etc/passwd", "/etc/passwd", "C:\\Windows\\x.png", "..", "", "   ", ".", "...png"),
    *("a\0b.png", "a\nb.png", "con.png", "NUL", "lpt1.txt", "a:b?*.png", "\u202egnp.exe"),
    "\udc80",
    *(
        "x" * 5000,
        "ä" * 300 + ".png",
        "/".join("d" * 60),
        "~",
        "a.png ",
        "-rf.png",
        "a/./b/../c.png",
    ),
)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_stays_in_its_folder(name: str) -> None:
    (path,) = name_files([name])
    assert not PurePosixPath(path).is_absolute() and not PureWindowsPath(path).drive
    for part in path.split("/"):
        assert part not in ("", ".", "..") and part == part.strip(" .")
        assert part.isprintable() and len(part.encode()) < 140
        assert not re.search(r'[<>:"|?*\\]', part) and not PureWindowsPath(part).is_reserved()
    assert len(path.encode()) < 2000


def test_names_are_kept_without_their_suffix() -> None:
    names = ["a.png", "deeper/b c.JPG", "no suffix", ".hidden.png", "ядро.v2.tif", "win\\d.bmp"]
    assert name_files(names) == [
        *("a", "deeper/b c", "no suffix", "hidden", "ядро.v2", "win/d"),
    ]


@pytest.mark.parametrize("suffix", sorted({chosen.suffix for chosen in FORMATS.values()}))
def test_a_suffix_of_several_parts_is_not_written_twice(suffix: str) -> None:
    names = ["a.b.tif", f"c{suffix}", f"D{suffix.upper()}", f"deep/e{suffix}"]
    paths = [f"{stem}{suffix}" for stem in name_files(names, suffix)]
    assert paths == [f"a.b{suffix}", f"c{suffix}", f"D{suffix}", f"deep/e{suffix}"]
    head = suffix.rpartition(".")[0]
    if head:
        assert name_files([f"f{head}.x", f"f{head}.y", head], suffix)[:2] == ["f", "f_2"]
        assert name_files([f"f{head}.x"], ".txt") == [f"f{head}"]


def test_no_two_images_have_the_same_file() -> None:
    names = ["a.png", "A.jpg", "a_2.png", "a.png", "../a.png", "", "", "x" * 500, "x" * 501]
    found = name_files(names)
    assert len({name.casefold() for name in found}) == len(names)
    assert found[:2] == ["a", "A_2"]
    assert len(set(name_files(["same.png"] * 500))) == 500
