"""The models and images that the benchmarks use.

`nuclei` is the bundled model with real images of 256x256 and 320x256 px, four or six canvases each:
nearly all of the time is the engine's. `light` has a graph that costs a few milliseconds, on images
of 640x480 px: there the server's own cost shows. It finds the bright regions of each colour, so
there are masks to post-process and to encode.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from benchmarks.harness.report import ROOT
from tests.support.blob_model import encode_picture, publish

NUCLEI = ROOT / "model_repo" / "nuclei"
IMAGES = ROOT / "tests" / "data" / "nuclei" / "images"
NUCLEI_IMAGE = IMAGES / "9bb6e39d5f4415bc.jpg"
SMALL_PX = 320 * 256
LIGHT_SIZE = (640, 480)
LIGHT_INPUT = {
    "resize": {"rule": "keep_ratio", "short_side": 480, "long_side": 640, "pad_multiple": 32}
}


@dataclass(frozen=True)
class Workload:
    """A model and images for it.

    Attributes:
        name: Its name.
        model: The model's folder, in a repository of its own if it is not the bundled one.
        images: Files for the load, by name; all cost about the same.
        others: Files that are not for the load, to compare answers.
    """

    name: str
    model: Path
    images: dict[str, bytes]
    others: dict[str, bytes]


def build_workload(name: str, root: Path) -> Workload:
    """`nuclei` or `light`; the light model is published below `root`."""
    return build_light(root / "light") if name == "light" else build_nuclei()


def build_nuclei() -> Workload:
    """The bundled model."""
    images: dict[str, bytes] = {}
    others: dict[str, bytes] = {}
    for path in sorted(IMAGES.glob("*.jpg")):
        with Image.open(path) as picture:
            small = picture.width * picture.height <= SMALL_PX
        (images if small else others)[path.name] = path.read_bytes()
    return Workload("nuclei", NUCLEI, images, others)


def build_light(root: Path) -> Workload:
    """The light model, published into an empty folder, and the same images enlarged for it."""
    model = publish(root, "light", input=LIGHT_INPUT)
    images = {}
    for path in sorted(IMAGES.glob("*.jpg")):
        with Image.open(path) as picture:
            enlarged = ImageOps.autocontrast(picture.convert("RGB").resize(LIGHT_SIZE))
        buffer = io.BytesIO()
        enlarged.save(buffer, "JPEG", quality=90)
        images[path.name] = buffer.getvalue()
    return Workload("light", model, images, {})


def read_images(folder: Path) -> list[bytes]:
    """All files of a folder, by name."""
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def build_jpeg(height: int, width: int) -> bytes:
    """A photograph's mix of smooth parts, edges and noise, quality 90."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / 60
    waves = np.stack([np.sin(x + y), np.cos(x - y), np.sin(x) * np.cos(2 * y)], axis=2)
    waves += 0.5 * np.sign(np.sin(x * 1.7) * np.sin(y * 1.3))[..., None]
    noise = rng.normal(0, 6, (height, width, 1))
    pixels = np.clip(127 + 70 * waves + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def build_tiled_jpeg(picture: Path, side: int) -> bytes:
    """A picture repeated to side x side px."""
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    repeats = -(-side // pixels.shape[0]), -(-side // pixels.shape[1]), 1
    return encode_picture(np.ascontiguousarray(np.tile(pixels, repeats)[:side, :side]), "JPEG")
