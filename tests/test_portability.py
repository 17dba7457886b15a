"""What needs no fork and no POSIX can be imported without them."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT_POSIX = """
import importlib, os, pkgutil, signal, sys

ours = ("pipeline", "service", "solo_client", "training")

def load():
    for name in sys.argv[1:]:
        package = importlib.import_module(name)
        for found in pkgutil.walk_packages(getattr(package, "__path__", []), name + "."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)

load()  # the libraries, which have branches of their own
for name in [name for name in sys.modules if name.split(".")[0] in ours]:
    del sys.modules[name]
for name in ("fcntl", "grp", "posix", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in ("fork", "geteuid", "getuid", "killpg", "register_at_fork", "sched_getaffinity"):
    delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "pthread_kill", "pthread_sigmask"):
    delattr(signal, name)
sys.platform = "win32"
load()
print(sum(name.split(".")[0] in ours for name in sys.modules), "modules")
"""


@pytest.mark.parametrize(
    ("packages", "least"),
    [
        (("solo_client",), 8),
        (("service.predict", "service.models", "pipeline"), 40),
        (("training",), 60),
        (("service.__main__",), 60),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_packages_are_imported_without_posix(packages: tuple[str, ...], least: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX, *packages], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    count, _ = done.stdout.split()
    assert int(count) >= least
