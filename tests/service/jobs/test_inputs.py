from __future__ import annotations

import glob
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.errors import StartupError
from service.jobs.inputs import find_files, read_list
from service.jobs.listing import Listing
from service.predict.outputs import Outputs

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("a.png", "deeper/b.JPG", "deeper/more/c.jfif", "notes.txt")
Skipped = dict[str, str]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name in NAMES:
        make(folder / name)
    return folder


def make(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    return file


def below(listing: Listing, folder: Path) -> list[str]:
    return [os.path.relpath(str(file), folder) for file in listing.files]


def left_out(listing: Listing, folder: Path) -> Skipped:
    lines = [line.rpartition(": ") for line in listing.describe_left_out()]
    return {os.path.relpath(name, folder): reason for name, _, reason in lines}


def test_inputs_may_be_files_folders_and_globs_and_count_once(images: Path) -> None:
    found = find_files([str(images / "*.png"), str(images), str(images / "a.png"), str(images)])
    assert below(found, images) == ["a.png", "deeper/b.JPG", "deeper/more/c.jfif"]
    assert len(found) == 3
    with pytest.raises(StartupError, match="is not an image"):
        find_files([str(images / "*.webp")])


def test_the_order_is_that_of_the_paths_parts(tmp_path: Path) -> None:
    names = ["a/c.png", "a/é.png", "a.png", "a0.png", "b/1/2.png", "b/1.png", "b.png", "ä/x.png"]
    for name in reversed(names):
        make(tmp_path / name)
    expected = sorted(Path(name) for name in names)
    assert below(find_files([str(tmp_path)]), tmp_path) == [str(path) for path in expected]
    assert below(find_files([str(tmp_path / "**" / "*.png")]), tmp_path) == [
        str(path) for path in expected
    ]


@pytest.mark.parametrize(
    "pattern",
    [
        "*.png",
        "**/*.png",
        "**",
        "*/*",
        "d*/**/*.j*",
        "**/more/*",
        "deeper/*.[jJ]*",
        "?.png",
        "**/c*",
    ],
)
def test_globs_find_what_pythons_glob_finds(images: Path, pattern: str) -> None:
    make(images / "deeper" / ".hidden.png")
    make(images / ".folder" / "x.png")
    expected = {
        name
        for name in glob.glob(pattern, root_dir=images, recursive=True)
        if (images / name).is_file() and (pattern != "**" or name != "notes.txt")
    }
    assert expected
    assert set(below(find_files([str(images / pattern)]), images)) == expected


def test_a_relative_glob_and_a_name_with_wildcards(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)
    assert [str(file) for file in find_files(["*.png"]).files] == ["a.png"]
    assert [str(file) for file in find_files(["./**/*.JPG"]).files] == ["deeper/b.JPG"]
    assert str(find_files(["."]).files[0]) == "a.png"
    make(images / "[a].png")
    assert [str(file) for file in find_files(["[a].png"]).files] == ["[a].png"]
    assert [str(file) for file in find_files([f"file://{images}/deeper"]).files] == [
        f"{images}/deeper/b.JPG",
        f"{images}/deeper/more/c.jfif",
    ]


def test_paths_hold_when_the_current_folder_changes(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images / "a.png").write_bytes(b"data")
    monkeypatch.chdir(images)
    (file,) = find_files(["a.png"]).files
    monkeypatch.chdir(tmp_path)
    assert file.read() == b"data"
    assert file.key == str(images / "a.png")


@pytest.mark.parametrize("pattern", ["", "**/*.png", "**", "*/*/*/*/*.png"])
@pytest.mark.parametrize("links", [1, 2, 3])
def test_loops_of_links_end_and_each_file_counts_once(
    tmp_path: Path, pattern: str, links: int
) -> None:
    root = tmp_path / "in"
    make(root / "a.png")
    for index in range(links):
        (root / f"link{index}").symlink_to(".")
        (root / f"up{index}").symlink_to("../in")
    assert [file.key for file in find_files([str(root / pattern)]).files] in (
        [str(root / "a.png")],
        [str(root / "link0" / "link0" / "link0" / "link0" / "a.png")],
    )
    (root / "self").symlink_to("self")
    assert len(find_files([str(root / pattern)])) == 1


def test_linked_folders_are_followed_and_real_names_are_preferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(read(path), reverse=True))
    make(tmp_path / "other" / "z.png")
    make(tmp_path / "in" / "real" / "a.png")
    (tmp_path / "in" / "batch").symlink_to("../other")
    (tmp_path / "in" / "again").symlink_to("real")
    (tmp_path / "in" / "0.png").symlink_to("real/a.png")
    (tmp_path / "in" / "1.png").symlink_to("../other/z.png")
    os.link(tmp_path / "in" / "real" / "a.png", tmp_path / "in" / "real" / "b.png")
    make(tmp_path / "in" / "z" / "y.png")
    (tmp_path / "in" / "later").mkdir()
    os.link(tmp_path / "in" / "z" / "y.png", tmp_path / "in" / "later" / "y.png")
    found = find_files([str(tmp_path / "in")])
    assert below(found, tmp_path / "in") == ["1.png", "later/y.png", "real/a.png"]
    again = "listed already, by this or another name"
    assert left_out(found, tmp_path / "in") == {
        "0.png": again,
        "batch/z.png": again,
        "real/b.png": again,
        "z/y.png": again,
        "again": "a link to a folder that is listed already",
    }


def test_every_entry_that_is_left_out_is_named(images: Path) -> None:
    for name in (".b.png", "._a.png", "Thumbs.db", "scan.gif", ".cache/x.png", "none/.keep"):
        make(images / name)
    make(images / "dir.jpg" / "d.png")
    os.mkfifo(images / "pipe.png")
    found = find_files([str(images)])
    assert below(found, images) == ["a.png", "deeper/b.JPG", "deeper/more/c.jfif", "dir.jpg/d.png"]
    assert left_out(found, images) == {
        "notes.txt": "no suffix of a supported image",
        "scan.gif": "no suffix of a supported image",
        ".b.png": "hidden",
        ".cache": "hidden",
        "none/.keep": "hidden",
        "._a.png": "a file of the operating system",
        "Thumbs.db": "a file of the operating system",
        "pipe.png": "not a regular file",
    }
    assert found.left_out == 8
    matches = find_files([str(images / "*.[jp]*")])
    assert below(matches, images) == ["a.png"]
    assert left_out(matches, images) == {
        ".b.png": "hidden",
        "._a.png": "a file of the operating system",
        "dir.jpg": "a folder",
        "pipe.png": "not a regular file",
    }


def test_a_broken_link_stays_and_fails_when_it_is_read(images: Path) -> None:
    (images / "b.png").symlink_to("gone.png")
    found = find_files([str(images)])
    assert below(found, images)[:2] == ["a.png", "b.png"]
    with pytest.raises(FileNotFoundError):
        found.files[1].read_stamp()


def refuse(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes a folder unreadable, for root too."""
    read: Callable[[str], list[str]] = os.listdir

    def list_or_refuse(path: str) -> list[str]:
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", path)
        return read(path)

    monkeypatch.setattr(os, "listdir", list_or_refuse)


def test_a_folder_that_cannot_be_read_is_named(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, images / "deeper")
    found = find_files([str(images)])
    assert below(found, images) == ["a.png"]
    assert found.unreadable == {str(images / "deeper"): "Permission denied"}
    with pytest.raises(StartupError, match=r"matches none \(.*deeper: Permission denied\)"):
        find_files([str(images / "deeper")])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.png", "'.*missing.png' is not an image or a folder with images: No such file"),
        ("a.png/b.png", "is not an image .*: Not a directory"),
        ("x" * 300, "File name too long"),
        ("pipe", "is neither a file nor a folder"),
        ("empty", "and matches none$"),
        ("texts", r"matches none \(.*/texts/a.txt: no suffix of a supported image\)"),
        ("*.gif", "and matches none$"),
        ("x" * 300 + "*", "and matches none"),
        ("missing/*.png", r"matches none \(.*missing: No such file"),
    ],
)
def test_an_input_without_images_is_refused(images: Path, name: str, reason: str) -> None:
    os.mkfifo(images / "pipe")
    (images / "empty").mkdir()
    make(images / "texts" / "a.txt")
    with pytest.raises(StartupError, match=reason):
        find_files([str(images / "a.png"), str(images / name)])


def test_a_uri_of_another_host_is_refused() -> None:
    with pytest.raises(StartupError, match=r"names the host 'server': write file:///PATH"):
        find_files(["file://server/a.png"])


def test_own_outputs_are_left_out(images: Path) -> None:
    outputs = Outputs(images / "out.png", images / "drawn")
    for path in (*outputs.name_own(), images / "out.png.partial.png"):
        make(path) if path != outputs.overlays else make(path / "00001_a.png")
    found = find_files([str(images)], own=outputs.name_own())
    assert below(found, images)[0] == "a.png"
    assert len(found) == 4
    skipped = left_out(found, images)
    assert skipped["drawn"] == "the folder of --overlays"
    assert skipped["out.png"] == "a file that this command writes"
    expanded = [str(path) for path in images.glob("*.png")]
    assert len(expanded) == 3
    assert len(find_files(expanded, own=outputs.name_own())) == 2
    expanded = [str(path) for path in images.iterdir()]
    assert str(images / "drawn") in expanded
    assert {*below(find_files(expanded, own=outputs.name_own()), images)} == {
        *NAMES,
        "out.png.partial.png",
    }
    linked = images.parent / "linked"
    linked.symlink_to(images)
    assert len(find_files([str(linked)], own=outputs.name_own())) == 4


@pytest.mark.parametrize("given", ["*.png", "a.png", "../images/a.png"])
def test_pictures_are_not_written_among_the_images(images: Path, given: str) -> None:
    outputs = Outputs(images.parent / "out.json", images)
    with pytest.raises(StartupError, match=r"give --overlays and --out folders of their own"):
        find_files([str(images / given)], own=outputs.name_own())
    for inputs, listed in (([str(images)], []), ([], [str(images)])):
        with pytest.raises(StartupError, match=r"there are no images \(.*: the folder of --over"):
            find_files(inputs, listed, outputs.name_own())


def test_equal_names_are_distinguished(images: Path) -> None:
    other = make(images.parent / "other" / "a.png").parent
    found = find_files([str(images / "*.png"), str(other)])
    assert [found.name_of(file) for file in found.files] == ["images/a.png", "other/a.png"]
    found = find_files([str(images)])
    assert [found.name_of(file) for file in found.files] == [*NAMES[:3]]
    found = find_files([str(images / "deeper" / ".." / "a.png")])
    assert [found.name_of(file) for file in found.files] == ["a.png"]


@pytest.mark.parametrize(
    "name",
    ["-x.png", "a b.png", "a\nb.png", "'\".png", "$(x).png", "\u202e.png", "n" * 251 + ".png"],
)
def test_any_name_is_found(tmp_path: Path, name: str) -> None:
    make(tmp_path / name)
    for given in (str(tmp_path), str(tmp_path / name), str(tmp_path / "*.png")):
        (file,) = find_files([given]).files
        assert file.key == str(tmp_path / name)


def test_a_list_names_files_and_folders(images: Path) -> None:
    names = [
        str(images / name) for name in ("deeper", "a.png", "gone.png", "a.png", "deeper/b.JPG")
    ]
    os.mkfifo(images / "00001_pipe.png")
    assert len(find_files([], [str(images / "00001_pipe.png")])) == 1  # it fails when it is read
    found = find_files([], names)
    assert below(found, images) == ["deeper/b.JPG", "deeper/more/c.jfif", "a.png", "gone.png"]
    assert [found.name_of(file) for file in found.files][2:] == ["a.png", "gone.png"]
    assert left_out(found, images).keys() == {"a.png", "deeper/b.JPG"}
    with pytest.raises(StartupError, match="there are no images"):
        find_files([], [])


@pytest.mark.parametrize(
    ("data", "entries"),
    [
        (b"", []),
        (b"\n\n", []),
        (b"a.png\nb c.png", ["a.png", "b c.png"]),
        (b"\xef\xbb\xbfa.png\r\n\r\nb.png\r\n", ["a.png", "b.png"]),
        (b"a\nb.png\0c.png\0", ["a\nb.png", "c.png"]),
        (b"M\xfcller.png\n", ["M\udcfcller.png"]),
    ],
)
def test_a_list_has_lines_or_zero_bytes(
    tmp_path: Path, data: bytes, entries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "list").write_bytes(data)
    assert read_list(str(tmp_path / "list")) == entries
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert read_list("-") == entries


def test_memory_of_many_names_is_bounded(tmp_path: Path) -> None:
    count = 4000
    for index in range(count):
        (tmp_path / f"picture_{index:020d}.png").touch()
    # In a process of its own: threads that other tests have left allocate memory too.
    script = """
import sys, tracemalloc
from service.jobs.inputs import find_files
tracemalloc.start()
found = find_files([sys.argv[1]])
print(len(found), tracemalloc.get_traced_memory()[1])
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found, peak = map(int, done.stdout.split())
    assert found == count
    assert peak / count < 1000
