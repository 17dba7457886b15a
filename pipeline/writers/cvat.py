"""CVAT for images 1.1: an XML document; masks of several parts or with holes are `<mask>`.

A page's part is its `<image>` element without the id, which `join` puts in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from pipeline.draw import instance_colour
from pipeline.encode import SCORE_DIGITS, decode_box
from pipeline.types import Detection, UInt8
from pipeline.writers.outline import outline_if_simple
from pipeline.writers.page import Classes, Page

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SPACES = {"\t": "&#9;", "\n": "&#10;", "\r": "&#13;"}
_SCORE = (
    "<attribute><name>score</name><mutable>False</mutable><input_type>number</input_type>"
    "<default_value>0</default_value><values>0\n1\n0.000001</values></attribute>"
)


def encode(page: Page) -> bytes:
    """The part of a page."""
    height, width = page.image_hw
    lines = [f' name={_quote(page.name)} width="{width}" height="{height}">\n']
    lines += [_describe(instance, page) for instance in page.instances]
    return "".join([*lines, "  </image>\n"]).encode()


def join(classes: Classes, pages: Iterable[tuple[int, bytes]]) -> Iterator[bytes]:
    """The document, page by page."""
    labels = "".join(
        f"      <label><name>{_text(spec.name)}</name><color>#{_colour(label)}</color>"
        f"<attributes>{_SCORE}</attributes></label>\n"
        for label, spec in enumerate(classes)
    )
    yield (
        '<?xml version="1.0" encoding="utf-8"?>\n<!-- found by solo-serve -->\n'
        "<annotations>\n  <version>1.1</version>\n"
        f"  <meta><task><labels>\n{labels}    </labels></task></meta>\n"
    ).encode()
    for image_id, part in pages:
        yield b'  <image id="%d"' % image_id + part
    yield b"</annotations>\n"


def _describe(instance: Detection, page: Page) -> str:
    label = _quote(page.classes[instance.label].name)
    score = f'<attribute name="score">{round(instance.score, SCORE_DIGITS)}</attribute>'
    common = f'label={label} source="auto" occluded="0" z_order="0"'
    ring = outline_if_simple(instance, page.simplify_px)
    if ring is not None:
        points = ";".join(f"{x},{y}" for x, y in ring.tolist())
        return f'    <polygon {common} points="{points}">{score}</polygon>\n'
    x, y, width, height = instance.bbox_xywh
    runs = ", ".join(map(str, _row_runs(decode_box(instance))))
    place = f'left="{x}" top="{y}" width="{width}" height="{height}"'
    return f'    <mask {common} rle="{runs}" {place}>{score}</mask>\n'


def _row_runs(mask: UInt8) -> list[int]:
    """Run lengths of a mask [h, w] along its rows, alternately of zeros and ones."""
    flat = np.concatenate([[0], mask.ravel()])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    lengths: list[int] = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    return lengths


def _colour(label: int) -> str:
    return bytes(instance_colour(label)).hex()


def _quote(text: str) -> str:
    return quoteattr(_NOT_XML.sub("\ufffd", text), _SPACES)


def _text(text: str) -> str:
    return escape(_NOT_XML.sub("\ufffd", text), {"\r": "&#13;"})
