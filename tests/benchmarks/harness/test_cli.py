from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest

from benchmarks.harness import BenchmarkError, cli
from benchmarks.harness.cli import build_parser, find_benchmarks, main, run
from benchmarks.harness.report import Report


def sample(
    url: Annotated[str, "whom"],
    /,
    *,
    rounds: Annotated[int, "100% that count"] = 3,
    sizes: Annotated[tuple[float, ...], "of what"] = (1.5, 2.5),
    kind: Annotated[Literal["a", "b"], "which"] = "a",
    kinds: Annotated[tuple[Literal["a", "b"], ...], "several"] = ("a",),
    before: Annotated[Path, "a checkout"],
    gpu: Annotated[Path | None, "a file"] = None,
    quick: Annotated[bool, "less"] = False,
) -> Report:
    given = (url, rounds, sizes, kind, kinds, before, gpu, quick)
    return Report(data={"given": [str(value) for value in given]})


def test_a_function_s_parameters_are_its_options() -> None:
    parser = build_parser("sample", sample, None)
    least = run(sample, parser.parse_args(["u", "--before", "x"])).data["given"]
    assert least == ["u", "3", "(1.5, 2.5)", "a", "('a',)", "x", "None", "False"]
    words = "u --before x --rounds 4 --sizes 3 --kind b --kinds a b --gpu g --quick"
    most = run(sample, parser.parse_args(words.split())).data["given"]
    assert most == ["u", "4", "(3.0,)", "b", "('a', 'b')", "x", "g", "True"]
    shown = parser.format_help()
    assert "100% that count (3)" in shown and "of what (1.5 2.5)" in shown
    assert "--out OUT" in shown and "benchmarks/results/sample.json" in shown


@pytest.mark.parametrize("words", ["u", "--before x", "u --before x --kind c", "u --before x -n"])
def test_wrong_options_are_refused(words: str) -> None:
    with pytest.raises(SystemExit):
        build_parser("sample", sample, None).parse_args(words.split())


def test_every_benchmark_is_listed_and_has_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--list"]) == 0
    printed = capsys.readouterr().out
    names = find_benchmarks()
    assert {"serving", "before_after", "fairness", "memory"} < names.keys()
    for name, text in names.items():
        assert text.endswith((".", ":", "?")) and f"  {name} " in printed
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed"]) == 2
    assert "no benchmark 'speed', expected aoti, bare" in capsys.readouterr().err


def test_errors_failures_and_a_missing_matplotlib_are_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object) -> Report:
        raise BenchmarkError("no such thing")

    out = tmp_path / "fleet.json"
    monkeypatch.setattr(cli, "run", lambda *_: Report(data={"a": 1}, failures=["a fault"]))
    assert main(["fleet", "--out", str(out)]) == 1
    assert out.is_file()
    assert "benchmarks fleet: a fault" in capsys.readouterr().err
    monkeypatch.setattr(cli, "run", refuse)
    assert main(["fleet", "--out", "-"]) == 1
    assert "benchmarks fleet: no such thing" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # its import fails
    monkeypatch.setattr(cli, "run", lambda *_: pytest.fail("measured before the refusal"))
    assert main(["fleet", "--plot", "a.png"]) == 1
    assert "--plot needs matplotlib" in capsys.readouterr().err
