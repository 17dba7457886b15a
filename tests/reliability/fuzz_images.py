"""Damaged image files through the decoder, with bounds on time and memory.

python -m tests.reliability.fuzz_images --count 20000

Each file begins as a good one of some kind (every format, progressive, interlaced, palettes, 16
bits, CMYK, animated, EXIF, run lengths, bit masks), then bytes change, vanish, repeat, or come from
another file. Counts what the decoder said; anything but a `DecodeError`, more CPU time than
allowed, or more memory ends the run with status 1 and the file's number, which gives the same file
again.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from pipeline.decode import decode_image, open_image, read_image_hw
from pipeline.errors import DecodeError
from tests.support.image_files import (
    ARITHMETIC_JPEG,
    PNG_SIGNATURE,
    build_bmp,
    build_png,
    build_webp,
    png_chunk,
    riff_chunk,
    webp_canvas,
    webp_frame,
)

MAX_PIXELS = 4_000_000
"""Decoded, with a copy in another mode, this is about 30 MB."""
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0xD8, 0xD9, 0xDA)


def build_good_files() -> list[bytes]:
    """One of each kind."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 90, 3)).astype(np.uint8)
    pixels[10:40] = 200
    colour = Image.fromarray(pixels)
    deep = Image.fromarray(rng.integers(0, 65536, (60, 90)).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    second = colour.rotate(90)
    jpeg: list[tuple[Image.Image, dict[str, object]]] = [
        (colour, {}),
        (colour, {"progressive": True, "exif": exif}),
        (colour, {"restart_marker_blocks": 2}),
        (colour.convert("CMYK"), {}),
        (colour.convert("L"), {"progressive": True}),
    ]
    png: list[tuple[Image.Image, dict[str, object]]] = [
        (colour, {"exif": exif}),
        (colour.convert("RGBA"), {}),
        (colour.convert("P"), {"transparency": 3}),
        (colour.convert("LA"), {}),
        (colour.convert("1"), {}),
        (deep, {}),
        (colour, {"save_all": True, "append_images": [second]}),
    ]
    webp: list[tuple[Image.Image, dict[str, object]]] = [
        (colour, {"exif": exif}),
        (colour, {"lossless": True}),
        (colour.convert("RGBA"), {}),
        (colour, {"save_all": True, "append_images": [second]}),
    ]
    jpeg2000: list[tuple[Image.Image, dict[str, object]]] = [
        (colour, {"num_resolutions": 3, "precinct_size": (64, 64), "codeblock_size": (16, 16)}),
        (colour.convert("RGBA"), {"tile_size": (32, 32), "irreversible": True}),
        (deep, {"quality_layers": [20, 0], "no_jp2": True}),
    ]
    bmp: list[tuple[Image.Image, dict[str, object]]] = [
        (colour, {}),
        (colour.convert("P"), {}),
        (colour.convert("1"), {}),
    ]
    files = []
    groups = {"JPEG": jpeg, "PNG": png, "WEBP": webp, "BMP": bmp, "JPEG2000": jpeg2000}
    for kind, group in groups.items():
        for image, options in group:
            buffer = io.BytesIO()
            image.save(buffer, kind, **options)
            files.append(buffer.getvalue())
    return [*files, *build_rare_files(rng)]


def build_rare_files(rng: np.random.Generator) -> list[bytes]:
    """Kinds that Pillow does not write."""
    indices = rng.integers(0, 256, (60, 90, 1))
    deep = rng.integers(0, 65536, (60, 90, 3))
    clear = png_chunk(b"tRNS", struct.pack(">3H", *(int(v) for v in deep[0, 0])))
    text = png_chunk(b"tEXt", b"Comment\0" + bytes(500))
    palette = rng.integers(0, 256, (256, 3)).astype(np.uint8)
    runs = {n: b"\x1e\1\0\x1e" + bytes(range(n)) + b"\x1e\2\0\0" for n in (30, 16)}
    words = rng.integers(0, 256, (60, 360)).astype(np.uint8)
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    still = io.BytesIO()
    Image.fromarray(words[:40, :240].reshape(40, 60, 4)).save(still, "WEBP")
    canvas, picture = still.getvalue()[12:30], still.getvalue()[30:]
    frame = webp_frame(10, 20, 60, 40, picture)
    return [
        ARITHMETIC_JPEG,
        build_png(deep, 2, 16, before=clear + text, chunk_bytes=4000),
        build_png(indices % 4, 0, 2, is_interlaced=True, before=png_chunk(b"tRNS", b"\0\3")),
        build_webp(webp_canvas(90, 80, 18), riff_chunk(b"ANIM", bytes(6)), frame, frame),
        build_webp(canvas, riff_chunk(b"ABCD", bytes(99)), picture),
        build_bmp(runs[30] * 60 + b"\0\1", 90, 60, 8, compression=1, palette=palette),
        build_bmp(runs[16] * 60 + b"\0\1", 90, 60, 4, compression=2, palette=palette[:16]),
        build_bmp(words, 90, 60, 32, header_bytes=124, compression=3, masks=masks),
        build_bmp(words[:, :180], 90, 60, 16, compression=3, masks=(0xF800, 0x7E0, 0x1F)),
        build_bmp(words[:, :270], 90, 60, 24, header_bytes=12),
        build_bmp(words[:, :23], 90, 60, 2, palette=palette[:4], is_top_down=True),
    ]


def repair_checksums(data: bytes) -> bytes:
    """A PNG with right checksums, so that damage gets further than to them."""
    repaired, position = bytearray(data), 8
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if end > len(data):
            break
        repaired[end - 4 : end] = zlib.crc32(data[position + 4 : end - 4]).to_bytes(4, "big")
        position = end
    return bytes(repaired)


def mutate(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """One to eight changes; half of them near the start, where headers are."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        reach = min(len(changed), 64) if rng.random() < 0.5 else len(changed)
        magic = 12 if rng.random() < 0.95 else 0  # without it a file is of no format at once
        if reach <= magic:
            return bytes(changed)
        start = int(rng.integers(magic, reach))
        size = int(rng.integers(1, 33))
        match rng.integers(0, 6):
            case 0:
                changed[start] ^= 1 << int(rng.integers(0, 8))
            case 1:
                changed[start] = int(rng.choice(INTERESTING))
            case 2:
                changed[start : start + size] = rng.bytes(size)
            case 3:
                del changed[start : start + size]
            case 4:
                changed[start:start] = changed[start : start + size] * int(rng.integers(1, 9))
            case 5:
                place = int(rng.integers(0, len(other)))
                changed[start : start + size] = other[place : place + size]
    if rng.random() < 0.1:
        del changed[int(rng.integers(0, len(changed) + 1)) :]
    return bytes(changed)


def build_cases(first: int, count: int) -> Iterator[tuple[int, bytes]]:
    """Damaged files by number."""
    good = build_good_files()
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        data, other = (good[int(i)] for i in rng.integers(0, len(good), 2))
        changed = mutate(data, other, rng)
        if changed.startswith(PNG_SIGNATURE) and rng.random() < 0.8:
            changed = repair_checksums(changed)
        yield number, changed


def limit_memory(extra_bytes: int) -> None:
    """Bounds the process' addresses to what it has now and this much more."""
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + extra_bytes, now + extra_bytes))


def try_all(data: bytes, seconds: float) -> str:
    """What the decoder says of a file.

    Raises:
        Exception: Anything but a `DecodeError`; also if it takes too long.
    """
    steps: tuple[Callable[[], object], ...] = (
        lambda: read_image_hw(data, max_pixels=MAX_PIXELS),
        lambda: open_image(data, max_pixels=MAX_PIXELS),
        lambda: decode_image(data, max_pixels=MAX_PIXELS, least_hw=(20, 20)),
        lambda: decode_image(data, max_pixels=MAX_PIXELS),
    )
    verdict = "decoded"
    for step in steps:
        began_s = time.thread_time()
        try:
            step()
        except DecodeError as error:
            verdict = error.code
        taken_s = time.thread_time() - began_s
        if taken_s > seconds:
            raise TimeoutError(f"{taken_s:.1f} s of CPU time")
    return verdict


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU time a file may take")
    parser.add_argument("--extra-mb", type=int, default=200, help="memory, MB")
    arguments = parser.parse_args()
    for data in build_good_files():  # libraries take their memory and threads now
        if try_all(data, float("inf")) != "decoded":
            raise RuntimeError("a file that nobody has damaged was refused")
    limit_memory(arguments.extra_mb * 1_000_000)
    verdicts: Counter[str] = Counter()
    slowest_s = 0.0
    for number, data in build_cases(arguments.first, arguments.count):
        began_s = time.thread_time()
        try:
            verdicts[try_all(data, arguments.seconds)] += 1
        except Exception as error:
            sys.exit(f"file {number} ({len(data)} bytes): {error!r}")
        slowest_s = max(slowest_s, time.thread_time() - began_s)
    json.dump({"slowest_ms": round(1e3 * slowest_s, 1), **verdicts}, sys.stdout)


if __name__ == "__main__":
    main()
