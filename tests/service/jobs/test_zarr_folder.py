from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.decode import open_image
from pipeline.errors import CorruptImage
from pipeline.formats.zarr_stack import ZarrStack
from service.errors import BodyTooLarge, SourceUnavailable
from service.jobs.inputs import find_files
from service.jobs.sources import Sources
from service.jobs.zarr_folder import FolderFiles, pack, read_stamp
from tests.support.zarr_files import read_files, write

pytest.importorskip("imagecodecs", reason="needs the extra science")

GREY = np.random.default_rng(5).integers(1, 256, (70, 50)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "in" / "a.zarr", GREY, chunks=(32, 16))


def test_a_folder_is_read_file_by_file(folder: Path) -> None:
    files = FolderFiles(str(folder))
    assert files.has(".zattrs") and not files.has("0") and not files.has("1/.zarray")
    stack = ZarrStack(files)
    assert (stack.height, stack.width, stack.um_per_px) == (70, 50, 0.5)
    content = (folder / "0" / "0.0").read_bytes()
    assert files.read("0/0.0", slice(-7, None), 7) == content[-7:]
    assert files.read("0/0.0", slice(3, 9), 6) == content[3:9]
    assert files.read("0/9.9", slice(None), 9) is None
    assert files.read("0", slice(None), 9) is None
    assert files.read("0/0.0/x", slice(None), 9) is None
    with pytest.raises(CorruptImage, match="bytes, not up to 9"):
        files.read("0/0.0", slice(None), 9)


def test_a_folder_is_found_as_one_file(folder: Path) -> None:
    root = folder.parent
    for name in ("b.png", "plain/0/c.png", "named.zarr/d.png", "s.zarr.zip", "t.ozx", "u.zip"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    write(root / "unnamed", GREY)
    listing = find_files([str(root)])
    names = [os.path.relpath(str(file), root) for file in listing.files]
    images = ["a.zarr", "b.png", "named.zarr/d.png", "plain/0/c.png", "s.zarr.zip", "t.ozx"]
    assert names == images
    for given in (root / "unnamed", folder, root / "*.zarr"):
        (file,) = (f for f in find_files([str(given)]).files if "named.zarr" not in str(f))
        np.testing.assert_array_equal(open_image(file.read()).decode()[..., 0], GREY)
    (file,) = find_files([], [str(folder)]).files
    assert file.read_stamp() == read_stamp(str(folder))


def test_a_change_of_a_chunk_changes_the_stamp(folder: Path) -> None:
    before = read_stamp(str(folder))
    assert before[0] == sum(map(len, read_files(folder).values()))
    os.utime(folder / "0" / "0.0", ns=(before[1] + 10, before[1] + 10))
    assert read_stamp(str(folder)) == [before[0], before[1] + 10]


def test_a_job_reads_a_folder_up_to_a_size(folder: Path) -> None:
    packed = pack(str(folder), 10**9)
    root = f"file://{folder.parent}"
    sources = Sources(str(folder.parent), len(packed))
    (file,), _ = sources.list_files([root])
    assert (file.name, file.source) == ("a.zarr", f"{root}/a.zarr")
    assert sources.read(file.source or "") == packed
    with pytest.raises(BodyTooLarge):
        Sources(str(folder.parent), len(packed) - 1).read(file.source or "")
    (folder / "0" / "large").write_bytes(bytes(10**6))
    with pytest.raises(BodyTooLarge):
        sources.read(file.source or "")


@pytest.mark.parametrize("place", ["0/0.0", "0", ".zattrs"])
def test_a_link_in_a_folder_is_not_followed(folder: Path, tmp_path: Path, place: str) -> None:
    moved = tmp_path / "secret"
    (folder / place).rename(moved)
    (folder / place).symlink_to(moved)
    sources = Sources(str(folder.parent), 10**9)
    with pytest.raises(SourceUnavailable, match="link"):
        sources.read(f"file://{folder}")
