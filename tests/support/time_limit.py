"""Ends a test that exceeds its time limit; pytest-timeout knows the limits."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import io
import os
import threading
from typing import Any

import pytest

SLOW_S = 1800
"""Limit of a test that is slow or installs packages; of any other: `timeout` in pyproject.toml."""


EXIT_S = 60
"""Limit of the end of the process, which waits for threads that are not daemons."""


class TimeLimits:
    """Prints what exceeded its limit and the stacks of all threads and tasks; ends the process.

    Both methods of pytest-timeout leave a gap: `signal` raises in the main thread and cannot end a
    process that waits for a thread, `thread` prints nothing in a worker of xdist.
    """

    def __init__(self) -> None:
        self._stderr = os.dup(2)  # pytest captures number 2 itself while a test runs
        self._timer: threading.Timer | None = None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Gives slow tests their limit."""
        for item in items:
            slow = any(item.get_closest_marker(name) for name in ("slow", "network"))
            if slow and item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(SLOW_S))

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> bool:
        """Starts the clock of a test, instead of pytest-timeout."""
        self._start(item.nodeid, settings.timeout)
        return True

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_cancel_timer(self) -> bool:
        """Stops the clock."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return True

    def pytest_unconfigure(self, config: pytest.Config) -> None:
        """Starts the clock of the end of the process; a worker is ended by xdist."""
        if not hasattr(config, "workerinput"):
            self._start("the end of the process", EXIT_S)

    def _start(self, what: str, limit_s: float) -> None:
        self._timer = threading.Timer(limit_s, self._end, [what, limit_s])
        self._timer.name = "time limit"
        self._timer.daemon = True
        self._timer.start()

    def _end(self, what: str, limit_s: float) -> None:
        text = io.StringIO()
        print(f"\n{what} exceeded its time limit of {limit_s:g} s", file=text)
        for task in [each for each in gc.get_objects() if type(each) is asyncio.Task]:
            if not task.done():
                task.print_stack(file=text)
        for thread in threading.enumerate():
            print(f"Thread {thread.ident or 0:#018x} is {thread.name}", file=text)
        os.write(self._stderr, text.getvalue().encode())
        faulthandler.dump_traceback(self._stderr, all_threads=True)
        os._exit(1)
