"""Packages of the paper's networks, compiled as `solo-export --aoti` does, and kept in a folder.

`benchmarks gpu --packages` and `benchmarks gpu_server --packages` find them there.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from benchmarks.gpu.engines import Device, EngineRecipe, find_package
from benchmarks.gpu.subjects import build_subject
from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import Report, Row
from export.errors import ExportError
from service.engines.aoti_package import PackagePrecision


def compile(
    *,
    packages: Annotated[Path, "folder for the packages"],
    models: Annotated[tuple[str, ...], "networks"] = ("solo_512_r50", "solo_r50"),
    device: Annotated[Device, "what they are for"] = "cuda",
    precision: Annotated[PackagePrecision, "of the convolutions and masks"] = "bf16",
    max_batch: Annotated[int, "most canvases in a call"] = 32,
) -> Report:
    recipe = EngineRecipe(device=device, precision=precision)
    rows: list[Row] = []
    for name in models:
        began_s = time.perf_counter()
        try:
            file = find_package(build_subject(name, max_batch), recipe, packages)
        except ExportError as error:
            raise BenchmarkError(f"{name}: {error}") from error
        seconds = round(time.perf_counter() - began_s, 1)
        size_mb = round(file.stat().st_size / 1e6, 1)
        rows.append({"model": name, "file": file.name, "MB": size_mb, "s": seconds})
    return Report(data={"rows": rows}, tables={"": rows}, packages=("torch", "triton"))
