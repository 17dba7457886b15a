"""Which distributions the steps of `benchmarks lease` import, and which of them are missing."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.harness.report import ROOT, find_version

EXTRAS = ("http", "gpu-kernels", "training", "export")
TOOLS = ("aiohttp", "hypothesis", "nvidia-ml-py", "pytest", "pytest-asyncio", "pytest-timeout")
PROJECT = "solo-serve"
FILE = "lease-requirements.txt"


def list_distributions() -> dict[str, str | None]:
    """Versions, by name, of what the steps import here, with all that this needs itself.

    None stands for what is not installed. torch and what only torch needs are left out: they belong
    to the machine.
    """
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    waiting = [
        *project["dependencies"],
        *TOOLS,
        *(line for name in EXTRAS for line in extras[name]),
    ]
    found: dict[str, str | None] = {}
    while waiting:
        requirement = Requirement(waiting.pop())
        name = normalise(requirement.name)
        if name == PROJECT:
            waiting += [line for extra in requirement.extras for line in extras[extra]]
        elif name not in found and name != "torch" and _applies(requirement):
            found[name] = find_version(name)
            waiting += _needs(name, requirement.extras)
    return dict(sorted(found.items()))


def write_list(folder: Path) -> Path:
    """The list as a requirements file, for the machine where the steps run."""
    lines = [
        name if version is None else f"{name}=={version}"
        for name, version in list_distributions().items()
    ]
    file = folder / FILE
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def find_missing(folder: Path = ROOT) -> list[str]:
    """What is not installed of the list in a folder, or of this project's without one."""
    file = folder / FILE
    names: Iterable[str] = list_distributions()
    if file.exists():
        names = [line.partition("==")[0] for line in file.read_text("utf-8").split()]
    return [name for name in names if find_version(name) is None]


def normalise(name: str) -> str:
    """A distribution's name as indexes have it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _applies(requirement: Requirement, extras: Iterable[str] = ("",)) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


def _needs(name: str, extras: Iterable[str]) -> list[str]:
    try:
        lines = requires(name) or []
    except PackageNotFoundError:
        return []
    wanted = [Requirement(line) for line in lines]
    kept = [one for one in wanted if _applies(one, ("", *extras))]
    for one in kept:
        one.marker = None  # it holds
    return [str(one) for one in kept]
