"""The corpus runs through every target; the search itself is `python -m tests.fuzz`."""

from __future__ import annotations

import sys

import pytest

from tests.fuzz.corpus import FOLDER, build_seeds, load_corpus, minimise, save_corpus, trace_lines
from tests.fuzz.targets import TARGETS, FuzzTarget

MOST_BYTES = 300_000


@pytest.fixture(autouse=True)
def _needs_tifffile(request: pytest.FixtureRequest) -> None:
    if "name" in request.fixturenames and request.getfixturevalue("name") == "tiff":
        pytest.importorskip("tifffile", reason="needs the extra science")


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_of_the_corpus_is_a_fault(name: str) -> None:
    inputs = load_corpus(name)
    assert len(inputs) >= 3
    for data in inputs + build_seeds(name):
        TARGETS[name].run(data)


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_reach_what_is_fuzzed(name: str) -> None:
    """Else a search would have nothing to begin with."""
    empty = trace_lines(TARGETS[name], b"")
    for seed in build_seeds(name):
        assert len(trace_lines(TARGETS[name], seed) - empty) > 10


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < MOST_BYTES
    assert {path.name for path in FOLDER.iterdir()} == set(TARGETS)


def read_digits(data: bytes) -> None:
    total = 0
    for byte in data:
        if byte == ord("a"):
            total += 1
        elif byte == ord("b"):
            total += 2
    if total > 2:
        raise ValueError


def test_inputs_that_reach_nothing_new_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    target = FuzzTarget(read_digits, (read_digits.__module__.partition(".")[0],))
    assert minimise(target, [b"a", b"aa", b"b", b"a", b"c", b"bbb"[:1] + b"a"[:0]]) == [
        b"a",
        b"b",
        b"c",
    ]
    with pytest.raises(ValueError):
        trace_lines(target, b"bb")
    assert sys.gettrace() is None


def test_a_corpus_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr("tests.fuzz.corpus.FOLDER", tmp_path)
    save_corpus("form", [b"a", b"b"])
    save_corpus("form", [b"c", b"b"])
    assert sorted(load_corpus("form")) == [b"b", b"c"]
