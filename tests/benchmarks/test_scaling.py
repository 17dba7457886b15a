"""The cost curves: what a bend is, and each curve with few and small points."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import scaling, scaling_image, scaling_server
from benchmarks.memory import added_bytes
from benchmarks.plot import NO_PLOT
from benchmarks.scaling_curve import Bend, Curve, Plan, find_bend, measure
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.server import CPU_FLAGS, run_server
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


def test_points_are_measured_in_turns_and_the_first_round_warms_up() -> None:
    calls: list[int] = []

    def point(place: int) -> dict[str, float]:
        calls.append(place)
        return {"cost": 10.0 * len(calls), "same": 1.0}

    plan = Plan("Things", "things", {2: lambda: point(2), 1: lambda: point(1)})
    curve = measure(plan, rounds=3)
    assert calls == [1, 2] * 4
    assert curve.rounds["cost"] == [[30, 50, 70], [40, 60, 80]]
    assert curve.medians("cost") == [50, 60]
    assert curve.rows()[0] == {"things": "1", "cost": "50 (40..60)", "same": "1 (1..1)"}


def test_memory_that_is_freed_before_hides_nothing() -> None:
    blocks = [bytes(1 << 16) for _ in range(512)]
    blocks.clear()
    held: list[bytes] = []
    assert added_bytes(lambda: held.append(bytes(1) * (64 << 20))) > 60 << 20
    assert added_bytes(lambda: None) < 8 << 20


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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    has_matplotlib: bool,
) -> None:
    folder, picture = publish(tmp_path / "models"), tmp_path / "picture.jpg"
    picture.write_bytes(TINY)
    out, plot = tmp_path / "scaling.json", tmp_path / "scaling.svg"
    flags = ["--curves", "size", "instances", "batch", "--rounds", "2", "--model", f"{folder}"]
    flags += ["--picture", f"{picture}", "--out", f"{out}", "--plot", f"{plot}"]
    monkeypatch.setattr("sys.argv", ["scaling", *flags])
    assert scaling.main() == 0
    curves = json.loads(out.read_text())["curves"]
    assert [curve["places"] for curve in curves] == [
        *([0.002304, 0.01], [0.003072, 0.3072], [1, 4], [1, 2]),
    ]
    for curve in curves:
        assert all(len(rounds) == 2 for cost in curve["rounds"].values() for rounds in cost)
    engine = curves[0]["rounds"]["engine, CPU ms"]
    assert all(value > 0 for rounds in engine for value in rounds)
    printed = capsys.readouterr().out
    assert "| instances | NMS, CPU ms | paste and RLE, CPU ms | MB added |" in printed
    assert plot.is_file() == has_matplotlib
    assert (NO_PLOT in printed) == (not has_matplotlib)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    folder = publish(tmp_path / "models", input=ONE_CANVAS)
    flags = "--model-repo", f"{folder.parent}", *CPU_FLAGS
    with run_server(tmp_path / "server.log", *flags) as server:
        yield server.url


def test_clients_cost_a_server(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_server, "CLIENTS", (1, 3))
    curve = measure(scaling_server.plan_clients("tiny", url, TINY, 0.2), rounds=1)
    assert curve.places == [1, 3]
    assert all(value > 0 for cost in curve.rounds for value in curve.medians(cost))
    with pytest.raises(RuntimeError, match=r"answered \{415: "):
        scaling_server.load_server(url, b"no image", 1, 0.1, ["/segment"])


def test_models_cost_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_server, "MODELS", (2,))
    folder = publish(tmp_path / "models", input=ONE_CANVAS)
    plan = scaling_server.plan_models(folder, tmp_path / "scratch", TINY, 0.2)
    curve: Curve = measure(plan, rounds=1, warm_ups=0)
    (start_s,), (rate,) = curve.rounds["start, s"][0], curve.rounds["images/s"][0]
    assert start_s > 0 and rate > 0
