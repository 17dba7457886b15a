"""Damaged image files through the decoder, with bounds on time and memory.

python -m tests.reliability.fuzz_images --count 20000

Each file begins as a good one of some kind (every format, progressive, interlaced, palettes, 16
bits, CMYK, animated, EXIF), then bytes change, vanish, repeat, or come from another file. Counts
what the decoder said; anything but a `DecodeError`, more CPU time than allowed, or more memory ends
the run with status 1 and the file's number, which gives the same file again.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from pipeline.decode import decode_image, open_image, read_image_hw
from pipeline.errors import DecodeError

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
    bmp: list[tuple[Image.Image, dict[str, object]]] = [
        (colour, {}),
        (colour.convert("P"), {}),
        (colour.convert("1"), {}),
    ]
    files = []
    for kind, group in (("JPEG", jpeg), ("PNG", png), ("WEBP", webp), ("BMP", bmp)):
        for image, options in group:
            buffer = io.BytesIO()
            image.save(buffer, kind, **options)
            files.append(buffer.getvalue())
    return files


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
        yield number, mutate(data, other, rng)


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
