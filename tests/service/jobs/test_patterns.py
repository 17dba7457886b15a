from __future__ import annotations

import pytest

from service.jobs.patterns import EVERYTHING, Pattern


def matches(pattern: Pattern, path: str) -> bool:
    states = pattern.start
    for part in path.split("/"):
        states = pattern.step(states, part)
    return pattern.accepts(states)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("*.png", "a.png", True),
        ("*.png", "b/a.png", False),
        ("*/*.png", "b/a.png", True),
        ("*/*.png", "a.png", False),
        ("**/*.png", "a.png", True),
        ("**/*.png", "b/c/a.png", True),
        ("**/*.png", "b/c/a.jpg", False),
        ("**", "b/c", True),
        ("x/**", "x/b/c", True),
        ("x/**", "y/b/c", False),
        ("**/x/**/[ab]?.png", "x/a1.png", True),
        ("**/x/**/[ab]?.png", "1/x/2/3/b1.png", True),
        ("**/x/**/[ab]?.png", "1/2/3/b1.png", False),
        ("**/x/**/[ab]?.png", "x/c1.png", False),
        ("a[*].png", "a*.png", True),
    ],
)
def test_globs(pattern: str, path: str, expected: bool) -> None:
    assert matches(Pattern(pattern.split("/")), path) is expected


def test_many_recursive_parts_take_linear_time() -> None:
    pattern = Pattern([*["**", "*"] * 20, "x"])
    assert not matches(pattern, "/".join("a" * 60))
    assert matches(pattern, "/".join("a" * 60 + "x"))


def test_a_folder_is_searched_if_something_below_it_can_match() -> None:
    pattern = Pattern(["2*", "x.png"])
    assert not pattern.step(pattern.start, "1999")
    after = pattern.step(pattern.start, "2024")
    assert pattern.descends(after) and not pattern.accepts(after)
    after = pattern.step(after, "x.png")
    assert pattern.accepts(after) and not pattern.descends(after)


def test_a_path_is_split_before_its_first_wildcard() -> None:
    fixed, pattern = Pattern.split(["/", "data", "a*", "b"])
    assert fixed == ["/", "data"]
    assert matches(pattern, "ax/b") and not matches(pattern, "ax/c")


@pytest.mark.parametrize(
    ("parts", "name", "reason"),
    [
        (["*"], ".a.png", "hidden"),
        (["**"], ".git", "hidden"),
        ([".*"], ".a.png", None),
        (["**", ".a.png"], ".a.png", None),
        (["**", "*.png"], ".a.png", "hidden"),
        ([".*"], "._a.png", "a file of the operating system"),
        (["**"], "Thumbs.db", "a file of the operating system"),
        (["**"], ".DS_Store", "a file of the operating system"),
        (["**"], "a.png", None),
    ],
)
def test_names_that_are_left_out(parts: list[str], name: str, reason: str | None) -> None:
    pattern = Pattern(parts)
    assert pattern.step(pattern.start, name)
    assert pattern.refuse_name(pattern.start, name) == reason


def test_a_suffix_counts_only_where_the_pattern_names_no_files() -> None:
    taken = ["a.jpg", "a.JPEG", "a.jpe", "a.jfif", "a.PNG", "a.webp", "a.bmp", "a.dib"]
    assert [EVERYTHING.refuse_file(name) for name in taken] == [None] * len(taken)
    for name in ("a.gif", "notes.txt", "a.png.bak", "png", "jpg.d/a"):
        assert EVERYTHING.refuse_file(name) == "no suffix of a supported image"
        assert Pattern(["**", "*"]).refuse_file(name) is None
