"""The CUDA sources are what their callers believe."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from service.engines.kernels import paste as kernel_paste
from service.engines.kernels import select as kernel_select
from service.engines.kernels.launcher import SIGNATURES
from service.engines.kernels.nvrtc import HEADER, KERNELS, SOURCES

MACRO = re.compile(r"^#define (\w+)\(NAME, TYPE\)", re.MULTILINE)
KERNEL = re.compile(r"__global__ void (\w+)\(([^)]*)\)")
LETTERS = {"int": "i", "u32": "u", "float": "f", "double": "d", "long long": "l"}


def read(name: str) -> str:
    return (KERNELS / f"{name}.cu").read_text(encoding="utf-8")


def signatures(name: str) -> Iterator[tuple[str, str]]:
    """Each kernel of a source and the letters of its parameters."""
    text = re.sub(r"\s*\\\n\s*", " ", read(name))
    for match in MACRO.finditer(text):
        for instance, kind in re.findall(rf"^{match[1]}\((\w+), (\w+)\)", text, re.MULTILINE):
            line = text[match.end() : text.index("\n", match.end())]
            text += "\n" + line.replace("NAME", instance).replace("TYPE", kind)
    for kernel, parameters in KERNEL.findall(text):
        if kernel == "NAME":
            continue
        letters = ""
        for parameter in re.split(r"\s*,\s*", parameters.strip()):
            kind = " ".join(parameter.split()[:-1])
            letters += "p" if "*" in parameter else LETTERS[kind]
        yield kernel, letters


@pytest.mark.parametrize("name", SOURCES)
def test_signatures(name: str) -> None:
    declared = {kernel: types for kernel, (source, types) in SIGNATURES.items() if source == name}
    assert dict(signatures(name)) == declared


def test_every_source_is_listed() -> None:
    assert {path.name for path in KERNELS.glob("*.cu*")} == {HEADER, *(f"{s}.cu" for s in SOURCES)}


def constant(name: str, source: str) -> int:
    (value,) = re.findall(rf"const int {name} = (\d+);", read(source))
    return int(value)


def test_constants() -> None:
    assert constant("WORDS_PER_THREAD", "select") == kernel_select.WORDS_PER_THREAD
    assert constant("COLUMNS_PER_CHUNK", "paste") == kernel_paste.COLUMNS_PER_CHUNK
    assert constant("SLICES", "runs") == kernel_paste.SLICES


@pytest.mark.parametrize("name", SOURCES)
def test_threads_are_independent(name: str) -> None:
    """What the host could not run one after the other is not used."""
    text = re.sub(r"//.*", "", read(name))
    for word in ("__shared__", "__syncthreads", "__shfl", "__ballot", "cooperative_groups"):
        assert word not in text
