"""TIFF on the demo page: the server's picture is shown, and planes can be chosen."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.browser.demo import Demo
from tests.browser.scene import BLACK, IN_GREEN, IN_HOLE, IN_RED, SCENE

pytestmark = pytest.mark.browser
tifffile = pytest.importorskip("tifffile", reason="needs the extra science")

PIXELS = np.asarray(Image.open(io.BytesIO(SCENE)))


def write(pixels: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def test_a_picture_that_browsers_cannot_read_is_shown_as_the_server_reads_it(demo: Demo) -> None:
    demo.segment(write(PIXELS, photometric="rgb", compression="lzw"), "scene.tif")
    assert demo.by_id("count").inner_text() == "2 instances"
    demo.by_id("show-masks").uncheck()
    red, green, hole = demo.read_pixels(IN_RED, IN_GREEN, IN_HOLE)
    assert (red, green, hole) == ((255, 0, 0), (0, 180, 0), BLACK)
    assert "on black" not in demo.by_id("notes-list").inner_text()


def test_a_plane_can_be_chosen(demo: Demo) -> None:
    stack = np.stack([PIXELS[..., 2], PIXELS[..., 0]])
    names = {"axes": "CYX", "Channel": {"Name": ["dark", "cells"]}}
    demo.choose(write(stack, ome=True, metadata=names), "stack.tif")
    field = demo.page.get_by_label("Channel")
    field.wait_for()
    assert "0: 'dark', 1: 'cells'" in demo.page.get_by_role("alert").inner_text()
    field.fill("cells")
    field.press("Enter")
    demo.await_result()
    assert demo.by_id("problem").is_hidden()
    demo.by_id("show-masks").uncheck()
    red, green = demo.read_pixels(IN_RED, IN_GREEN)
    assert (red, green) == ((255, 255, 255), BLACK)
