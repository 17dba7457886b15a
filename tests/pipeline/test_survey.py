from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.errors import UnsupportedFormat
from pipeline.formats.picture import PlanePicture, open_picture
from pipeline.formats.planes import PlaneChoice
from pipeline.formats.stretch import find_limits
from pipeline.formats.tiff_file import TiffStack
from pipeline.model_config import ContrastSpec
from pipeline.preprocess import contrast_table
from pipeline.survey import CELL_PX, survey
from pipeline.types import Window

tifffile = pytest.importorskip("tifffile", reason="needs the extra science")

CONTRAST = ContrastSpec(low=0.5, high=99.8)
RNG = np.random.default_rng(0)


def open_pixels(pixels: NDArray[Any], **options: Any) -> PlanePicture:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, tile=(64, 64), **options)
    return open_picture(b"", TiffStack(file, file.tell()), PlaneChoice())


def test_the_contrast_rule_is_that_of_the_whole_image() -> None:
    colour = RNG.integers(0, 200, (2100, 130, 3)).astype(np.uint8)
    found = survey(open_pixels(colour, photometric="rgb"), CONTRAST, find_tissue=False)
    assert found.table is not None and found.limits is None and found.tissue.all()
    np.testing.assert_array_equal(found.table, contrast_table(colour, CONTRAST))
    deep = RNG.integers(0, 3000, (100, 2100)).astype(np.uint16)
    found = survey(open_pixels(deep), CONTRAST, find_tissue=False)
    assert found.limits == find_limits(deep[..., None], CONTRAST) and found.table is None
    found = survey(open_pixels(colour, photometric="rgb"), None, find_tissue=False)
    assert found.table is None and found.limits is None
    with pytest.raises(UnsupportedFormat, match="3 samples of type uint16"):
        survey(open_pixels(colour.astype(np.uint16), photometric="rgb"), None, find_tissue=False)


@pytest.mark.parametrize("background", [5, 240])
def test_smooth_background_is_no_tissue_be_it_dark_or_bright(background: int) -> None:
    pixels = RNG.normal(background, 1.5, (640, 960))
    pixels[128:256, 320:480] += RNG.normal(0, 40, (128, 160))
    pixels[480:512, 800:832] += RNG.normal(0, 8, (32, 32))  # faint
    slide = open_pixels(np.clip(pixels, 0, 255).astype(np.uint8))
    found = survey(slide, None, find_tissue=True)
    assert found.tissue.shape == (640 // CELL_PX, 960 // CELL_PX)
    assert found.shows_tissue(Window(200, 400, 10, 10))
    assert found.shows_tissue(Window(490, 810, 4, 4))
    assert not found.shows_tissue(Window(384, 0, 64, 640))
    assert found.tissue.mean() < 0.3
    wide = survey(slide, CONTRAST, find_tissue=False).table
    narrow = survey(slide, CONTRAST, find_tissue=True).table
    assert wide is not None and narrow is not None
    shown = slide.convert(slide.read(Window(0, 0, 640, 960)), None)
    mask = found.tissue.repeat(CELL_PX, axis=0).repeat(CELL_PX, axis=1)
    np.testing.assert_array_equal(narrow, contrast_table(shown[mask][:, None], CONTRAST))
    assert not np.array_equal(narrow, wide)


@pytest.mark.parametrize("pixels", [np.full((200, 300), 7), RNG.normal(90, 30, (200, 300))])
def test_a_slide_of_one_kind_is_all_tissue(pixels: NDArray[Any]) -> None:
    slide = open_pixels(np.clip(pixels, 0, 255).astype(np.uint8))
    assert survey(slide, None, find_tissue=True).tissue.all()
