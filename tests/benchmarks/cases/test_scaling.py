"""The cost curves: what a bend is, and each curve with few and small points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling_image
from benchmarks.cases import scaling
from benchmarks.cases.scaling import Bend, Curve, build_panel, build_rows, find_bend
from benchmarks.harness import BenchmarkError
from benchmarks.harness.rounds import Samples
from benchmarks.harness.server import Server, serve_ours
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.server import CPU_FLAGS
from tests.support.slow_model import ONE_CANVAS

PLACES = [1.0, 2.0, 4.0, 8.0, 16.0]
TINY = encode_picture(draw_picture(64, 64), "JPEG")


@pytest.mark.parametrize(
    ("costs", "at", "before", "after"),
    [
        ([3, 3, 3, 6, 12], 4, 0, 1),
        ([1, 2, 4, 16, 64], 4, 1, 2),
        ([1, 2, 4, 4, 4], 4, 1, 0),
        ([10, 10, 20, 40, 80], 2, 0, 1),
    ],
)
def test_a_curve_bends_where_its_exponents_differ_most(
    costs: list[float], at: float, before: float, after: float
) -> None:
    assert find_bend(PLACES, costs) == pytest.approx(Bend(at, before, after))


@pytest.mark.parametrize(
    "costs", [[1, 2, 4, 8, 16], [5, 5, 5, 5, 5], [1, 2.2, 4, 9, 16], [0, 1, 1, 2, 4]]
)
def test_a_straight_curve_does_not_bend_and_a_cost_of_0_has_no_exponent(
    costs: list[float],
) -> None:
    assert find_bend(PLACES, costs) is None


def test_two_points_have_no_bend() -> None:
    assert find_bend([1, 2], [1, 100]) is None


def test_a_curve_shows_its_medians_ranges_and_bends() -> None:
    rounds = [[3.0, 5.0], [3.0, 3.0], [3.0, 3.0], [6.0, 6.0], [12.0, 12.0]]
    places = ("1", "2", "4", "8", "16")
    samples = Samples({place: {"cost": r} for place, r in zip(places, rounds, strict=True)})
    curve = Curve("Things", "things", samples)
    assert curve.places == PLACES
    assert curve.costs == {"cost": [4.0, 3.0, 3.0, 6.0, 12.0]}
    assert build_rows(curve)[0] == {"things": "1", "cost": "4 (3-5)"}
    panel = build_panel(curve)
    assert panel.lines["cost"][0] == (1.0, 4.0)
    assert panel.rings == {"cost": [(4.0, 3.0)]}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_image, "TILED_SIDES", (48, 100))
    monkeypatch.setattr(scaling_image, "CANVAS_SIZES_HW", ((48, 64), (480, 640)))
    monkeypatch.setattr(scaling_image, "CANVAS_INSTANCES", 3)
    monkeypatch.setattr(scaling_image, "INSTANCES", (1, 4))
    monkeypatch.setattr(scaling_image, "INSTANCES_HW", (120, 160))
    monkeypatch.setattr(scaling_image, "BATCHES", (1, 2))


@pytest.mark.usefixtures("small")
def test_the_command_writes_its_curves(
    tmp_path: Path, run_case: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, picture = publish(tmp_path / "models"), tmp_path / "picture.jpg"
    picture.write_bytes(TINY)
    topics = ("--curves", "size", "instances", "batch", "--rounds", 2)
    report = run_case("scaling", *topics, "--model", folder, "--picture", picture)
    curves = report["curves"]
    assert [[float(place) for place in curve["values"]] for curve in curves] == [
        *([0.002304, 0.01], [0.003072, 0.3072], [1, 4], [1, 2]),
    ]
    for curve in curves:
        for costs in curve["values"].values():
            assert all(len(rounds) == 2 for rounds in costs.values())
    engine = [costs["engine, CPU ms"] for costs in curves[0]["values"].values()]
    assert all(value > 0 for rounds in engine for value in rounds)
    printed = capsys.readouterr().out
    assert "| instances | NMS, CPU ms | paste and RLE, CPU ms | MB added |" in printed


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = publish(tmp_path / "models", input=ONE_CANVAS)
    flags = "--model-repo", f"{folder.parent}", *CPU_FLAGS
    with serve_ours(tmp_path / "server.log", *flags) as running:
        yield running


def test_clients_cost_a_server(server: Server) -> None:
    costs = scaling.load_server(server, TINY, 3, 0.2)
    assert all(value > 0 for name, value in costs.items() if name != "CPU ms a request")
    with pytest.raises(BenchmarkError, match="2 of 2 requests failed"):
        scaling.load_server(server, b"no image", 2, 0)


def test_models_cost_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "MODELS", (2,))
    folder = publish(tmp_path / "models", input=ONE_CANVAS)
    plan = scaling.plan_models(folder, tmp_path / "scratch", TINY, 0.2)
    curve = scaling.measure("Models", "models", plan, 1, warm_ups=0)
    assert curve.costs["start, s"][0] > 0 and curve.costs["images/s"][0] > 0
