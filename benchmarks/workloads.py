"""What the servers are asked: two models and their images.

`nuclei` is the bundled model with real images of 256x256 and 320x256 px, four or six canvases each:
nearly all of the time is the engine's. `light` has a graph that costs a few milliseconds, on
pictures of 640x480 px: there the server's own cost shows. It finds the bright regions of each
colour, so there are masks to post-process and to encode.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from tests.support.blob_model import publish

IMAGES = Path("tests/data/nuclei/images")
NUCLEI = Path("model_repo/nuclei")
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
    """The light model, published into an empty folder, and the same pictures enlarged for it."""
    model = publish(root, "light", input=LIGHT_INPUT)
    images = {}
    for path in sorted(IMAGES.glob("*.jpg")):
        with Image.open(path) as picture:
            enlarged = ImageOps.autocontrast(picture.convert("RGB").resize(LIGHT_SIZE))
        buffer = io.BytesIO()
        enlarged.save(buffer, "JPEG", quality=90)
        images[path.name] = buffer.getvalue()
    return Workload("light", model, images, {})
