from __future__ import annotations

import sys

import pytest

from benchmarks.worker import Worker

ECHO = """
import json, os, sys
print("a library says hello", flush=True)
for line in sys.stdin:
    print(json.dumps({"line": line.strip(), "mood": os.environ["MOOD"]}), flush=True)
"""


def test_each_line_has_an_answer_whatever_else_is_printed() -> None:
    with Worker([sys.executable, "-c", ECHO], {"MOOD": "calm"}) as worker:
        answers = [worker.ask("1"), worker.ask("two")]
    assert answers == [{"line": "1", "mood": "calm"}, {"line": "two", "mood": "calm"}]


def test_a_process_that_ends_early_is_named() -> None:
    with (
        Worker([sys.executable, "-c", "input()"]) as worker,
        pytest.raises(RuntimeError, match=r"-c input\(\) ended early"),
    ):
        worker.ask("1")
