from __future__ import annotations

import pytest

from service.jobs.files import InputFolder, LocalFile, RemoteFile
from service.jobs.listing import MOST_NAMED, Listing


def name_of(address: str, *covered: str) -> str:
    listing = Listing()
    for folder in covered:
        listing.cover(folder)
    folder, _, below = address.rpartition("/")
    if folder.startswith("s3:"):
        return listing.name_of(RemoteFile(address, "s3://", below, (0, 0)))
    return listing.name_of(LocalFile(InputFolder(folder, folder, folder), below))


@pytest.mark.parametrize(
    ("address", "covered", "name"),
    [
        ("/data/in/a.png", ["/data/in"], "a.png"),
        ("/data/in/deep/a.png", ["/data/in"], "deep/a.png"),
        ("/data/x/a.png", ["/data/x", "/data/xy"], "x/a.png"),
        ("/data/xy/a.png", ["/data/x", "/data/xy"], "xy/a.png"),
        ("/data/x/a.png", ["/data/x", "/other"], "data/x/a.png"),
        ("/data/x/y/a.png", ["/data/x/y", "/data/x"], "y/a.png"),
        ("/a.png", [""], "a.png"),
        ("s3://bucket/in/a.png", ["s3://bucket/in"], "a.png"),
        ("s3://one/in/a.png", ["s3://one/in", "s3://two/in"], "one/in/a.png"),
        ("s3://one/in/a.png", ["s3://one/in", "/data"], "s3://one/in/a.png"),
        ("/data/a.png", ["s3://one/in", "/data"], "/data/a.png"),
    ],
)
def test_names_begin_below_the_deepest_common_folder(
    address: str, covered: list[str], name: str
) -> None:
    assert name_of(address, *covered) == name
    assert name_of(address, *reversed(covered)) == name


def test_what_is_left_out_is_named_up_to_a_limit_and_counted() -> None:
    listing = Listing()
    assert listing.describe_left_out() == []
    for index in range(MOST_NAMED + 7):
        listing.leave_out(f"in/{index}.txt", "no image")
    listing.leave_out("in/.x\n", "hidden")
    lines = listing.describe_left_out()
    assert listing.left_out == MOST_NAMED + 8
    assert len(lines) == MOST_NAMED + 2
    assert lines[0] == "in/0.txt: no image"
    assert lines[-2:] == ["and 7 more: no image", "in/.x\\n: hidden"]
