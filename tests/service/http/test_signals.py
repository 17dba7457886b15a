"""Signals of a real process: a handler must not end or change the tests' own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import signal, sys, time
from service.http import signals

signals.hold_reloads()
signal.raise_signal(signal.SIGHUP)  # before there is a handler
print("loaded", flush=True)
with signals.handle_exit_signals(lambda number: print(number, flush=True), float(sys.argv[1])):
    while True:
        time.sleep(0.01)
"""
HANGS = 600.0


class Process:
    """A process that prints the signals it has handled, and ends by none of them."""

    def __init__(self, limit_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(limit_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        assert self.read() == "loaded"
        assert self.read() == str(int(signal.SIGHUP))  # it was kept until then

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT])
def test_a_second_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    running = Process(HANGS)
    running.send(number)
    assert running.read() == str(int(number))
    running.send(signal.SIGHUP)  # is none that ends
    assert running.read() == str(int(signal.SIGHUP))
    running.send(signal.SIGTERM)
    assert running.process.wait(60) == 128 + signal.SIGTERM
    assert running.process.communicate() == ("", "")


def test_a_process_that_does_not_end_after_a_signal_is_aborted() -> None:
    running = Process(0.3)
    running.send(signal.SIGTERM)
    assert running.process.wait(60) == 1
    assert (
        "the process has not ended within 0.3 s and is aborted"
        in (running.process.communicate()[1])
    )


def test_a_process_ends_whatever_its_daemon_threads_do() -> None:
    program = """
import atexit, logging, sys, threading, time
from service.http import signals

atexit.register(print, "the interpreter is finalised")
logging.basicConfig(stream=sys.stdout, format="%(message)s")
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
print("written", end="; ")
logging.warning("logged")
signals.end_process(7)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "written; logged\n", "")
