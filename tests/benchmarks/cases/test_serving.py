"""What the comparison of servers does besides timing: it starts, checks, counts and reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.cases import serving
from benchmarks.cases.serving import BARE, BEST, OWN_RATE, SAME_RATE, LoadPlan
from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import ROOT
from benchmarks.harness.rounds import Samples
from benchmarks.harness.server import summarise
from benchmarks.inputs import LIGHT_SIZE, Workload, build_light, build_nuclei
from benchmarks.load import NO_ANSWER, Answer, Load
from benchmarks.ours import SharedEngine
from benchmarks.servers import contenders
from benchmarks.servers.contenders import CONTENDERS, OURS
from pipeline.decode import read_image_hw

FASTAPI = replace(CONTENDERS["fastapi"], environment=None)
"""In this environment, which has what it needs."""


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    workload = build_light(tmp_path_factory.mktemp("repo"))
    return replace(workload, images=dict(list(workload.images.items())[:3]))


def test_a_plain_server_answers_as_ours_does(light: Workload, tmp_path: Path) -> None:
    plan = replace(serving.PLANS["light"], warm_up_s=0.3)
    servers = [CONTENDERS[OURS], FASTAPI]
    assert serving.check_all(servers, light, plan, 1, tmp_path / "log") > 0


def test_a_visit_gives_the_numbers_of_each_load(light: Workload, tmp_path: Path) -> None:
    plan = LoadPlan((1, 2), 0.2, 0.2, True, 0.1)
    costs = serving.visit(FASTAPI, light, plan, 1, tmp_path / "log", same_rate=10.0)
    assert costs[f"{SAME_RATE}/requests"] == 2
    assert costs["errors"] == 0
    assert costs["peak_memory_mb"] > 20
    for load in ("1 clients", "2 clients", OWN_RATE, SAME_RATE, BEST):
        assert costs[f"{load}/images_per_s"] > 0
        assert 0 < costs[f"{load}/p50_ms"] <= costs[f"{load}/p99_ms"]


def test_an_answer_that_differs_is_named() -> None:
    rle = {"size": [4, 4], "counts": "04"}
    expected = {"a.jpg": {"results": []}, "b.jpg": {"results": [{"segmentation": rle}]}}
    serving.check_answers("other", expected, expected)
    found = {**expected, "b.jpg": {"results": [{"segmentation": {**rle, "counts": "13"}}]}}
    with pytest.raises(BenchmarkError, match=r"other: other answer to b\.jpg: .*'13'"):
        serving.check_answers("other", found, expected)
    with pytest.raises(BenchmarkError, match=r"other: other answer to a\.jpg: None"):
        serving.check_answers("other", {}, expected)


def test_answers_of_another_engine_may_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {OURS: {"a.jpg": 1}, "solo-serve-auto": {"a.jpg": 2}, "fastapi": {"a.jpg": 2}}
    rates = {OURS: 30.0, "solo-serve-auto": 20.0, "fastapi": 10.0}

    def run(self: contenders.Contender, *_: object) -> Any:
        return nullcontext(SimpleNamespace(url=self.name))

    monkeypatch.setattr(serving, "ask_all", lambda url, workload: answers[url])
    monkeypatch.setattr(
        serving, "warm_up", lambda server, workload, plan: {"images_per_s": rates[server.url]}
    )
    monkeypatch.setattr(contenders.Contender, "run", run)
    servers = [CONTENDERS[name] for name in answers]
    arguments = (Workload("w", tmp_path, {}, {}), serving.PLANS["nuclei"], 1, tmp_path / "log")
    assert serving.check_all(servers[:2], *arguments) == 20.0
    with pytest.raises(BenchmarkError, match=r"fastapi: other answer to a\.jpg: 2"):
        serving.check_all(servers, *arguments)


def test_ours_runs_the_engine_of_the_others_but_where_it_chooses() -> None:
    ours = {n: c.arguments for n, c in CONTENDERS.items() if c.package == "solo-serve"}
    assert {name for name in ours if not CONTENDERS[name].same_engine} == {"solo-serve-auto"}
    for name, arguments in ours.items():
        fixed = " ".join(arguments).count("--engine ort --precision fp32")
        assert fixed == CONTENDERS[name].same_engine


def test_errors_are_counted_and_have_no_latency() -> None:
    answers = [Answer(200, 0.1, 0.0), Answer(200, 0.3, 0.1), Answer(503, 9.0, 0.2)]
    row = summarise(Load([*answers, Answer(NO_ANSWER, 9.0, 0.3)]), 4.0)
    assert (row["requests"], row["errors"]) == (4, 2)
    assert row["images_per_s"] == pytest.approx(0.5)
    assert row["p50_ms"] == pytest.approx(200)


def test_a_server_that_is_missing_or_half_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "ENVIRONMENTS", tmp_path)
    (tmp_path / "litserve" / "bin").mkdir(parents=True)
    (tmp_path / "litserve" / "bin" / "python").touch()
    chosen, missing = serving.choose(["litserve", "ray-serve"])
    assert [contender.name for contender in chosen] == [OURS]
    assert missing == [
        f"{name} is not installed and is left out: python -m benchmarks serving --install "
        f"--servers {name}"
        for name in ("litserve", "ray-serve")
    ]
    (tmp_path / "litserve" / ".installed").touch()
    assert CONTENDERS["litserve"].is_installed


def test_requirements_are_pinned_as_the_project_is() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==", 1) for line in lines if "==" in line)
    for contender in CONTENDERS.values():
        if contender.environment is not None:
            file = contenders.REQUIREMENTS / f"{contender.environment}.txt"
            assert "==" in file.read_text(encoding="utf-8")
    text = (contenders.REQUIREMENTS / "pipeline.txt").read_text(encoding="utf-8")
    shared = dict(line.split("==") for line in text.splitlines() if "==" in line)
    assert shared == {name: pins[name] for name in shared}


def test_the_workloads_have_what_they_say(light: Workload) -> None:
    sizes = {read_image_hw(data) for data in light.images.values()}
    assert sizes == {LIGHT_SIZE[::-1]}
    nuclei = build_nuclei()
    assert len(nuclei.images) >= 3
    assert {read_image_hw(data) for data in nuclei.images.values()} == {(256, 256), (256, 320)}
    assert not nuclei.images.keys() & nuclei.others.keys()


def test_images_share_engine_calls_and_keep_their_results(light: Workload) -> None:
    engine = SharedEngine(light.model)
    images = [engine.decode(data) for data in light.images.values()]
    found = []
    for image, candidates in zip(images, engine.infer(images), strict=True):
        found.append(engine.encode(image, candidates))
    for data, together in zip(light.images.values(), found, strict=True):
        image = engine.decode(data)
        (alone,) = engine.infer([image])
        assert engine.encode(image, alone) == together
    assert json.loads(found[0])["results"][0]["instances"]


@pytest.mark.slow
def test_the_command_measures_what_is_installed_and_names_what_is_not(
    tmp_path: Path,
    run_case: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(contenders, "ENVIRONMENTS", tmp_path)
    options = "--servers fastapi --workloads light --rounds 1 --clients 1 --scale 0.5"
    report = run_case("serving", *options.split())
    assert report["command"].startswith("python -m benchmarks serving --servers fastapi")
    assert list(report["servers"]) == [OURS]
    assert [line.split()[0] for line in report["missing"]] == ["fastapi"]
    assert set(report["workloads"]["light"]) == {OURS, BARE}
    written = capsys.readouterr()
    assert "fastapi is not installed" in written.err
    assert "| solo-serve |" in written.out


def test_an_unknown_server_is_refused(
    run_case: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_case("serving", "--servers", "apache", status=1)
    assert "no server 'apache', expected solo-serve" in capsys.readouterr().err


def build_samples() -> Samples:
    samples = Samples()
    for drift in (1, 2, 3):  # the machine is slower in one round than in another
        for server, rate, p99_ms in ((OURS, 120.0, 10.0), ("other", 100.0, 20.0)):
            costs: dict[str, float] = {"errors": 1, "peak_memory_mb": 100, "client_cores": 0.2}
            for load, images_per_s in (("1 clients", rate / 8), ("8 clients", rate), (BEST, rate)):
                costs[f"{load}/images_per_s"] = images_per_s * drift
            costs[f"{BEST}/cpu_ms_per_image"] = 5
            numbers = {"per_second": 0.7 * rate, "p50_ms": 1, "p95_ms": 2, "p99_ms": p99_ms * drift}
            samples.add(server, costs | {f"{OWN_RATE}/{n}": v for n, v in numbers.items()})
        bare = {f"{BEST}/images_per_s": 125.0 * drift, f"{BEST}/cpu_ms_per_image": 4.0}
        samples.add(BARE, bare)
    return samples


def test_the_tables_compare_within_rounds() -> None:
    closed, latency = serving.build_tables("light", build_samples()).values()
    assert [list(row.values()) for row in closed[1:]] == [
        ["other", 25, 200, 200, "1.2 (1.2-1.2)", 5, 100, 3, 0.2],
        [BARE, "-", "-", 250, "0.96 (0.96-0.96)", 4, "-", 0, "-"],
    ]
    assert list(latency[1].values()) == ["other", 70, 1, 2, 40, "0.5 (0.5-0.5)"]


def test_the_panels_show_rates_over_clients_and_p99_over_the_rate() -> None:
    closed, opened = serving.build_panels("light", build_samples())
    assert closed.lines["other"] == [(1, 25), (8, 200)]
    assert closed.levels == {BARE: 250}
    assert opened.lines == {OURS: [(84, 20)], "other": [(70, 40)]}
