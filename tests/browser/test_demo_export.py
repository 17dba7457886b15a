"""The demo page saves what it shows in the formats of other programs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.writers import FORMATS
from tests.browser.demo import Demo
from tests.browser.scene import SCENE

pytestmark = pytest.mark.browser
BUTTON = "Save file"


def test_what_is_shown_is_saved_in_another_format(demo: Demo, downloads: Path) -> None:
    demo.segment(SCENE, "my picture.png")
    select = demo.page.get_by_label("Other format")
    select.select_option("geojson")
    path = demo.save(BUTTON, downloads)
    assert path.name == "my picture.geojson"
    assert len(json.loads(path.read_bytes())["features"]) == 2
    demo.page.get_by_role("slider", name="Minimum score").fill("0.8")
    (feature,) = json.loads(demo.save(BUTTON, downloads).read_bytes())["features"]
    assert feature["properties"]["classification"]["name"] == "red"
    select.select_option("labels")
    with Image.open(demo.save(BUTTON, downloads)) as image:
        assert np.unique(np.asarray(image)).tolist() == [0, 1]
    assert demo.by_id("count").inner_text() == "1 instance"


def test_every_format_that_is_offered_exists(demo: Demo) -> None:
    options = demo.page.locator("#export-format option").evaluate_all("e => e.map((o) => o.value)")
    assert len(options) == 7 and set(options) <= set(FORMATS)
