"""The first pass of `scale=auto` without a server."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from pipeline.auto_scale import UNCERTAIN, count_probes
from pipeline.types import UInt8
from service.models.repository import load_version
from service.work.image import ImageWork
from service.work.probe import ProbeWork
from service.work.request import ImageFile, RequestOptions
from tests.service.conftest import OPTIONS
from tests.support.blob_model import draw_picture, encode_picture, publish

LARGE = draw_picture(
    108, 108, {"red": (4, 4, 48, 48), "green": (56, 4, 48, 48), "blue": (4, 56, 48, 48)}
)
BLANK = draw_picture(108, 108, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return publish(tmp_path, card={"object_size_px": 16})


def _run(work: ImageWork, folder: Path, order: list[int] | None = None) -> None:
    """Processes all canvases in an order."""
    backend = load_version(folder, None, OPTIONS).backend
    work.open()
    tiles = [work.make_canvas(index)[0] for index in range(work.canvases)]
    for index in order or range(work.canvases):
        work.search(index, tiles[index], backend.infer([tiles[index]])[0], (1.0, 3.0), 0.5)


@pytest.mark.parametrize("is_file", [True, False])
def test_the_scale_is_that_of_the_objects(folder: Path, is_file: bool) -> None:
    config = load_version(folder, None, OPTIONS).config
    count = count_probes((108, 108), config.input)
    data: bytes | UInt8 = encode_picture(LARGE) if is_file else LARGE
    probe = ProbeWork(ImageFile("a", data), (108, 108), count, config, RequestOptions())
    _run(probe, folder)
    outcome = probe.finish(0.0)
    assert (outcome.canvases, outcome.error, probe.warnings) == (count, None, [])
    assert 0.2 < probe.scaled.input.zoom < 0.4


def test_the_order_of_the_canvases_does_not_matter(folder: Path) -> None:
    config = load_version(folder, None, OPTIONS).config
    count = count_probes((108, 108), config.input)
    zooms = set()
    for order in itertools.islice(itertools.permutations(range(count)), 0, 720, 240):
        probe = ProbeWork(ImageFile("a", LARGE), (108, 108), count, config, RequestOptions())
        _run(probe, folder, list(order))
        probe.finish(0.0)
        zooms.add(probe.scaled.input.zoom)
    assert len(zooms) == 1


def test_the_image_goes_on_with_the_warnings_and_the_costs(folder: Path) -> None:
    config = load_version(folder, None, OPTIONS).config
    count = count_probes((108, 108), config.input)
    probe = ProbeWork(ImageFile("a", BLANK), (108, 108), count, config, RequestOptions())
    _run(probe, folder)
    probe.finish(0.0)
    assert probe.scaled == config and [w.code for w in probe.warnings] == [UNCERTAIN]
    work = ImageWork(
        ImageFile("a", BLANK), (108, 108), 9, probe.scaled, RequestOptions(), probe=probe
    )
    _run(work, folder)
    outcome = work.finish(0.0)
    entry = json.loads(outcome.payload)
    assert [w["code"] for w in entry["warnings"]] == [UNCERTAIN]
    assert entry["canvases"] == work.canvases == outcome.canvases - count
    assert outcome.engine_s == pytest.approx(outcome.canvases * 2 * 0.5)
