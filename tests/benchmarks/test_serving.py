"""What the comparison of servers does besides timing: it starts, checks, counts and tells."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serving
from benchmarks.load import NO_ANSWER, Answer, Load
from benchmarks.plot import NO_PLOT
from benchmarks.servers import contenders, process
from benchmarks.servers.contenders import CONTENDERS, OURS
from benchmarks.servers.model import Model
from benchmarks.serving_tables import SAME, plot, render_tables
from benchmarks.workloads import LIGHT_SIZE, Workload, build_light, build_nuclei
from pipeline.decode import read_image_hw

FASTAPI = replace(CONTENDERS["fastapi"], environment=None)
"""In this environment, which has what it needs."""


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    workload = build_light(tmp_path_factory.mktemp("repo"))
    return replace(workload, images=dict(list(workload.images.items())[:3]))


def test_a_plain_server_answers_as_ours_does(light: Workload, tmp_path: Path) -> None:
    plan = replace(serving.PLANS["light"], warm_up_s=0.5, warm_up_clients=2)
    capacity = serving.check_all([CONTENDERS[OURS], FASTAPI], light, plan, 1, tmp_path)
    assert capacity > 0


def test_a_visit_gives_a_row_for_each_load(light: Workload, tmp_path: Path) -> None:
    plan = serving.Plan(1, (1, 2), 0.2, (SAME, 0.5), 0.2, 2, 0.1)
    rows = serving.visit(FASTAPI, light, plan, 1, tmp_path / "log", same_rate=10.0)
    assert [row.get("clients") for row in rows] == [1, 2, None, None]
    assert [row.get("load") for row in rows] == [None, None, "same", 0.5]
    assert rows[2]["requests"] == 2
    for row in rows:
        assert row["server"] == "fastapi"
        assert row["errors"] == 0
        assert row["images_per_s"] > 0
        assert row["cpu_ms_per_image"] > 0
        assert row["peak_memory_mb"] > 20
        assert 0 < row["p50_ms"] <= row["p99_ms"]


def test_a_server_that_cannot_start_tells_why(light: Workload, tmp_path: Path) -> None:
    broken = replace(FASTAPI, arguments=("-c", "raise SystemExit('no such thing')"))
    with (
        pytest.raises(RuntimeError, match=r"exit status 1: no such thing"),
        serving.run_contender(broken, light, 1, tmp_path / "log"),
    ):
        pass


def test_a_server_that_fails_to_come_up_is_started_once_more(
    light: Workload, tmp_path: Path
) -> None:
    code = (
        "import pathlib, runpy, sys\n"
        f"seen = pathlib.Path({str(tmp_path / 'seen')!r})\n"
        "if not seen.exists(): seen.touch(); sys.exit('not yet')\n"
        f"runpy.run_module({FASTAPI.arguments[1]!r}, run_name='__main__')\n"
    )
    hesitant = replace(FASTAPI, arguments=("-c", code))
    with serving.run_contender(hesitant, light, 1, tmp_path / "log") as (url, _):
        assert len(serving.ask_all(url, light)) == len(light.images)


def test_an_answer_that_differs_is_named() -> None:
    rle = {"size": [4, 4], "counts": "04"}
    expected = {"a.jpg": {"results": []}, "b.jpg": {"results": [{"segmentation": rle}]}}
    serving.check_answers("other", expected, expected)
    found = {**expected, "b.jpg": {"results": [{"segmentation": {**rle, "counts": "13"}}]}}
    with pytest.raises(serving.WrongAnswer, match=r"other answers b\.jpg otherwise: .*'13'"):
        serving.check_answers("other", found, expected)
    with pytest.raises(serving.WrongAnswer, match=r"other answers a\.jpg otherwise: None"):
        serving.check_answers("other", {}, expected)


def test_errors_are_counted_and_have_no_latency() -> None:
    answers = [Answer(200, 0.1, 0.0), Answer(200, 0.3, 0.1), Answer(503, 9.0, 0.2)]
    row = serving.summarise(Load([*answers, Answer(NO_ANSWER, 9.0, 0.3)]), 4.0)
    assert (row["requests"], row["errors"]) == (4, 2)
    assert row["images_per_s"] == pytest.approx(0.5)
    assert row["p50_ms"] == pytest.approx(200)


def test_a_server_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "ENVIRONMENTS", tmp_path)
    chosen, missing = serving.choose(["litserve", "ray-serve"])
    assert [contender.name for contender in chosen] == [OURS]
    assert missing == [
        f"{name} is not installed and is left out: python -m benchmarks.serving --install {name}"
        for name in ("litserve", "ray-serve")
    ]


def test_a_half_made_environment_counts_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "ENVIRONMENTS", tmp_path)
    (tmp_path / "litserve" / "bin").mkdir(parents=True)
    (tmp_path / "litserve" / "bin" / "python").touch()
    assert not CONTENDERS["litserve"].is_installed
    (tmp_path / "litserve" / ".installed").touch()
    assert CONTENDERS["litserve"].is_installed


def test_requirements_are_pinned_as_the_project_is() -> None:
    root = Path(contenders.ROOT)
    pins = dict(
        line.split("==")
        for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    for contender in CONTENDERS.values():
        if contender.environment is not None:
            file = contenders.REQUIREMENTS / f"{contender.environment}.txt"
            assert "==" in file.read_text(encoding="utf-8")
    text = (contenders.REQUIREMENTS / "pipeline.txt").read_text(encoding="utf-8")
    shared = dict(line.split("==") for line in text.splitlines() if "==" in line)
    assert shared == {name: pins[name] for name in shared}


def test_processes_are_found_by_their_mark_and_all_ended(tmp_path: Path) -> None:
    # The child leaves the process group, as those of some frameworks do.
    child = "x = b'x' * 30_000_000\nprint('started', flush=True)\nwhile True: sum(range(10000))"
    code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "log"
    server = process.ServerProcesses([sys.executable, "-c", code], {}, tmp_path, log)
    try:
        server.wait_until(lambda: "started" in log.read_text())
        with server.measure() as usage:
            time.sleep(0.5)
        assert usage.cpu_s > 0.02
        assert usage.peak_memory_bytes > 30e6
        assert len(process.find_processes(server.mark)) == 2
    finally:
        server.stop()
    assert process.find_processes(server.mark) == []


def test_the_workloads_have_what_they_say(light: Workload) -> None:
    sizes = {read_image_hw(data) for data in light.images.values()}
    assert sizes == {LIGHT_SIZE[::-1]}
    nuclei = build_nuclei()
    assert len(nuclei.images) >= 3
    assert {read_image_hw(data) for data in nuclei.images.values()} == {(256, 256), (256, 320)}
    assert not nuclei.images.keys() & nuclei.others.keys()


def test_images_share_engine_calls_and_keep_their_results(
    light: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVING_MODEL", str(light.model))
    model = Model(threads=1)
    images = [model.decode(data) for data in light.images.values()]
    together = model.infer(images)
    for image, candidates in zip(images, together, strict=True):
        (alone,) = model.infer([image])
        assert model.encode(image, candidates) == model.encode(image, alone)
    assert json.loads(model.encode(images[0], together[0]))["results"][0]["instances"]


@pytest.mark.slow
def test_the_command_measures_who_is_there_and_names_who_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contenders, "ENVIRONMENTS", tmp_path)
    out = tmp_path / "serving.json"
    options = ["--servers", "fastapi", "--workloads", "light", "--rounds", "1", "--clients", "1"]
    options += ["--scale", "0.5", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["serving", *options])
    serving.main()
    report = json.loads(out.read_bytes())
    assert report["command"].startswith("python -m benchmarks.serving --servers fastapi")
    assert list(report["servers"]) == [OURS]
    assert [line.split()[0] for line in report["missing"]] == ["fastapi"]
    assert [row["server"] for row in report["rows"]] == [OURS] * 3 + ["bare loop"]
    written = capsys.readouterr()
    assert "fastapi is not installed" in written.err
    assert "| solo-serve |" in written.out


def build_rows(server: str, rate: float, p99_ms: float) -> list[dict[str, Any]]:
    common = {"workload": "light", "server": server, "cpu_ms_per_image": 5.0, "errors": 1}
    common |= {"peak_memory_mb": 100.4, "client_cores": 0.2, "p50_ms": 1.0, "p95_ms": 2.0}
    rows = []
    for number in range(3):
        drift = 1 + number  # the machine is slower in one round than in another
        for clients in (1, 8):
            measured = {"images_per_s": rate * drift * clients / 8, "p99_ms": p99_ms}
            rows.append({**common, "round": number, "clients": clients, **measured})
        offered = {"load": 0.7, "per_second": 0.7 * rate, "p99_ms": p99_ms * drift}
        rows.append({**common, "round": number, "images_per_s": 1.0, **offered})
    return rows


def test_the_tables_compare_within_rounds() -> None:
    bare = {"workload": "light", "server": "bare loop", "clients": 16, "cpu_ms_per_image": 4.0}
    rows = [*build_rows(OURS, 120.0, 10.0), *build_rows("other", 100.0, 20.0)]
    rows += [{**bare, "round": n, "images_per_s": 125.0 * (1 + n)} for n in range(3)]
    servers = {"other": {"version": "1.2", "settings": "as it comes"}}
    text = render_tables({"servers": servers, "rows": rows})
    assert "| other | 1.2 | as it comes |" in text
    assert "| other | 25 | 200 | 200 | 1.20 (1.20-1.20) | 5 | 100 | 9 |" in text
    assert "| bare loop | - | - | 250 | 0.96 (0.96-0.96) | 4 | - | - |" in text
    assert "| other | 70 | 1 | 2 | 40 | 0.50 (0.50-0.50) |" in text
    assert "at most 0.20 cores" in text
    assert "one rate for all" not in text  # nobody was asked so


def test_the_picture_is_drawn(tmp_path: Path, has_matplotlib: bool) -> None:
    rows = [*build_rows(OURS, 120.0, 10.0), *build_rows("other", 100.0, 20.0)]
    rows += [{**row, "load": SAME, "per_second": 60.0} for row in rows if "load" in row]
    bare = {"workload": "light", "server": "bare loop", "clients": 16, "images_per_s": 125.0}
    rows += [{**bare, "round": number} for number in range(3)]
    note = plot({"rows": rows}, tmp_path / "serving.png")
    assert note == (None if has_matplotlib else NO_PLOT)
    assert (tmp_path / "serving.png").is_file() == has_matplotlib
