"""YOLO-seg: a line for each instance, its class and one polygon in fractions of the image.

Several parts and holes are connected to one polygon by lines without width.
"""

from __future__ import annotations

from pipeline.writers.outline import outline_as_one
from pipeline.writers.page import Classes, Page

_DIGITS = 9


def encode(page: Page) -> bytes:
    """The text file of a page."""
    height, width = page.image_hw
    lines = []
    for instance in page.instances:
        ring = outline_as_one(instance, page.simplify_px) / (width, height)
        numbers = (f"{value:.{_DIGITS}f}".rstrip("0").rstrip(".") for value in ring.flat)
        lines.append(" ".join((str(instance.label), *numbers)) + "\n")
    return "".join(lines).encode()


def describe(classes: Classes) -> dict[str, bytes]:
    """data.yaml with the class names; training divides the images itself."""
    names = "".join(f"  {label}: {_quote(spec.name)}\n" for label, spec in enumerate(classes))
    return {"data.yaml": f"path: .\nnames:\n{names}".encode()}


def _quote(text: str) -> str:
    """A YAML string; what YAML might not take is escaped."""
    plain = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'"{"".join(plain)}"'
