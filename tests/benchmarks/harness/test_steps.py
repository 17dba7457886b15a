"""Steps of plain Python: what succeeds, fails, hangs, writes garbage; and runs that go on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import steps
from benchmarks.harness.process import find_processes, kill_processes
from benchmarks.harness.report import ROOT
from benchmarks.harness.steps import FAILED, NOT_RUN, OK, TIMED_OUT, Journal, Outcome, Step
from benchmarks.harness.steps import StepRunner as Runner

WRITE = "import sys; open(sys.argv[1], 'w').write('{\"value\": 1}')"
HANG = "import time; time.sleep(600)"


def python(code: str, name: str = "step", **options: Any) -> Step:
    command = [sys.executable, "-S", "-c", code, "{out}"]
    return Step(name=name, command=command, **{"limit_s": 60, **options})


def run(folder: Path, *found: Step, seconds: float = 60, **options: Any) -> list[Outcome]:
    return Runner(folder, seconds=seconds).run(found, **options)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('last words'); raise SystemExit(3)", r"exit status 3: last words"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "exit status -11"),
        ("print('nothing')", "it wrote no result: nothing"),
        ("import sys; open(sys.argv[1], 'wb').write(b'\\xff{')", "its result is no JSON"),
        ("import sys; open(sys.argv[1], 'w').write('')", "its result is no JSON"),
        ("import sys; open(sys.argv[1], 'w').write('[1]')", "no JSON object"),
        (f"{WRITE}; print('so far'); sys.exit(1)", "exit status 1: so far"),
    ],
)
def test_a_step_that_fails_says_why_and_the_next_one_runs(
    tmp_path: Path, code: str, reason: str
) -> None:
    folder = tmp_path / "not" / "there"
    failed, after = run(folder, python(code), python(WRITE, "after"))
    assert failed.status == FAILED and reason in failed.reason
    assert (after.status, after.data, after.reason) == (OK, {"value": 1}, "")
    assert Journal(folder / "results.jsonl").read() == {"step": failed, "after": after}
    assert (folder / "results.jsonl").read_bytes().count(b"\n") == 2


def test_a_command_that_does_not_exist_is_named(tmp_path: Path) -> None:
    (outcome,) = run(tmp_path, Step(name="a", command=["/no/such/program"], limit_s=5))
    assert outcome.status == FAILED and "/no/such/program" in outcome.reason


def test_a_step_that_hangs_ends_with_all_that_it_started(tmp_path: Path) -> None:
    """Its child has a session and a mark of its own, like a server that it measures."""
    inner = f"{tmp_path}.inner".replace(":", "")
    code = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-S', '-c', {HANG!r}], start_new_session=True,"
        f" env={{**os.environ, 'BENCHMARK_MARK': os.environ['BENCHMARK_MARK'] + ':{inner}'}})\n"
        "print('child', child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "GRACE_S", 0.1)
        (outcome,) = run(tmp_path, python(code, limit_s=1.5))
    assert outcome.status == TIMED_OUT
    assert "no end after 2 s: child" in outcome.reason
    assert find_processes(inner) == []


def test_what_has_an_outcome_is_not_run_again(tmp_path: Path) -> None:
    count = "import sys, pathlib; p = pathlib.Path(sys.argv[1]).parent / 'n'; "
    count += "p.write_text(p.read_text() + 'x' if p.exists() else 'x'); "
    found = [python(count + WRITE, "good"), python(count + "sys.exit(1)", "bad")]
    first = run(tmp_path, *found)
    assert [outcome.status for outcome in first] == [OK, FAILED]
    assert run(tmp_path, *found) == first
    assert (tmp_path / "outputs" / "n").read_text() == "xx"
    assert [o.status for o in run(tmp_path, *found, retry=True)] == [OK, FAILED]
    assert (tmp_path / "outputs" / "n").read_text() == "xxx"


def test_a_journal_that_was_cut_short_is_continued(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "results.jsonl")
    whole = Outcome(step="a", status=OK, seconds=1.5, data={"n": [1, 2]})
    journal.append(whole)
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(b'\xfe\n[]\n{"step": "x"}\n{"step": "b", "status": "o')
    assert journal.read() == {"a": whole}
    later = Outcome(step="c", status=FAILED, reason="a\nb")
    journal.append(later)
    assert journal.read() == {"a": whole, "c": later}


def test_needs_background_and_obstacles(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        python("import time; time.sleep(0.3); " + WRITE, "slow", background=True),
        python(WRITE, "meanwhile"),
        python(WRITE, "after", needs=("slow",)),
        python("raise SystemExit(1)", "broken", background=True),
        python(WRITE, "never", needs=("broken", "slow")),
        python(WRITE, "impossible", obstacle="there is no such tool"),
        python(WRITE, "odd", needs=("impossible",)),
        python("import time; time.sleep(0.2); " + WRITE, "last", background=True),
    )
    by_name = {outcome.step: outcome for outcome in found}
    assert [outcome.step for outcome in found][:3] == ["slow", "meanwhile", "after"]
    assert {name for name, o in by_name.items() if o.status == OK} == {
        "slow",
        "meanwhile",
        "after",
        "last",
    }
    assert by_name["never"].seconds == 0
    assert by_name["never"].reason == "broken has no result"
    assert by_name["impossible"].reason == "there is no such tool"
    assert by_name["odd"].reason == "impossible has no result"
    names = list(Journal(tmp_path / "results.jsonl").read())
    assert names[0] == "meanwhile"
    assert sorted(names) == ["after", "broken", "last", "meanwhile", "slow"]


def test_when_the_time_is_over_no_step_begins_and_a_later_run_takes_it(tmp_path: Path) -> None:
    found = [python(HANG, "long"), python(WRITE, "rest")]
    long, rest = run(tmp_path, *found, seconds=0.5)
    assert long.status == TIMED_OUT and long.seconds < 30
    assert (rest.status, rest.reason) == (NOT_RUN, "the time is over")
    again = run(tmp_path, *found)
    assert [outcome.status for outcome in again] == [TIMED_OUT, OK]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_goes_on_with_the_step_that_it_was_in(
    tmp_path: Path, number: signal.Signals
) -> None:
    """After SIGTERM nothing is left; what SIGKILL leaves is ended by the next run."""
    code = (
        "import pathlib, sys\n"
        "from tests.benchmarks.harness.test_steps import HANG, WRITE, python, run\n"
        "run(pathlib.Path(sys.argv[1]), python(WRITE, 'first'), python(HANG, 'second'))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT) as runner:
        log = tmp_path / "logs" / "second.log"
        deadline_s = time.monotonic() + 60
        while not log.exists() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        mark = Runner(tmp_path, seconds=0)._mark_of(python(HANG, "second"))
        while not find_processes(mark) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        runner.send_signal(number)
    try:
        left = find_processes(mark)
        assert len(left) == (0 if number == signal.SIGTERM else 1)
        lines = (tmp_path / "results.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == ["first"]
        found = run(tmp_path, python("raise SystemExit(1)", "first"), python(WRITE, "second"))
        assert [outcome.status for outcome in found] == [OK, OK]
        assert find_processes(mark) == []
    finally:
        kill_processes(mark)


def test_logs_are_in_one_archive_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "LOG_BYTES", 1000)
    runner = Runner(tmp_path, seconds=60)
    runner.run([python("print('x' * 5000 + 'end')", "loud"), python(WRITE, "quiet")])
    with tarfile.open(runner.pack_logs()) as tar:
        assert sorted(tar.getnames()) == ["loud.log", "quiet.log"]
        member = tar.extractfile("loud.log")
        assert member is not None
        text = member.read()
    assert len(text) == 1000 and text.endswith(b"end\n")
    logs = (tmp_path / "logs").iterdir()
    assert sorted(path.name for path in logs) == ["loud.log", "quiet.log"]


def test_no_steps_give_no_outcomes(tmp_path: Path) -> None:
    assert run(tmp_path) == []
