from __future__ import annotations

import struct

import pytest

from pipeline.formats.exif import read_orientation
from tests.support.image_files import build_exif


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_read_in_both_byte_orders(order: str, orientation: int) -> None:
    assert read_orientation(build_exif(orientation, order)) == orientation


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"II*\0",
        b"II*\0\x08\0\0\0",
        b"JJ" + build_exif(6)[2:],
        build_exif(6)[:2] + b"\x2b" + build_exif(6)[3:],
        build_exif(6)[:4] + b"\xff\xff\xff\xff" + build_exif(6)[8:],
        build_exif(6)[:4] + struct.pack("<I", len(build_exif(6)) - 1),
        build_exif(6)[:-6],
        build_exif(0),
        build_exif(9),
        build_exif(6, kind=4),
        build_exif(6, count=2),
        bytes(100_000),
    ],
)
def test_damage_and_what_browsers_do_not_take_mean_upright(exif: bytes) -> None:
    assert read_orientation(exif) == 1


def test_the_orientation_may_be_any_entry_of_the_first_directory() -> None:
    whole = build_exif(6)
    entry = whole[10:22]
    others = b"".join(struct.pack("<HHII", tag, 4, 1, 6) for tag in range(0x100, 0x112))
    data = b"II*\0" + struct.pack("<I", 20) + bytes(12)
    assert read_orientation(data + struct.pack("<H", 19) + others + entry) == 6
    assert read_orientation(data + struct.pack("<H", 18) + others + entry) == 1
    assert read_orientation(data + struct.pack("<H", 0xFFFF) + others + entry) == 6
