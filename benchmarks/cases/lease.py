"""Everything that only a GPU can show, in one command for a machine that is lent for minutes.

    python -m benchmarks lease --pack-to DIR --carry DATA  # here: the files for the machine
    python -m benchmarks lease --data carried/DATA         # there, in DIR; again to go on

Steps run by value, each with a time limit; `results.jsonl` in --folder has each result at once, and
a later call skips what it has. Without a GPU only --rehearse runs, on the CPU with tiny networks.
NOT RUN ON HARDWARE.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch

from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import Report
from benchmarks.harness.steps import FAILED, TIMED_OUT, StepRunner
from benchmarks.lease import (
    SUMMARY_CHARS,
    Lease,
    find_ceilings,
    list_steps,
    pack,
    tabulate_speeds,
    tabulate_steps,
    write_rehearsal_data,
)


def lease(
    *,
    folder: Annotated[Path, "for results, logs and packages"] = Path("lease"),
    minutes: Annotated[float, "after which nothing runs any more"] = 6.5,
    data: Annotated[Path | None, "labelled nuclei, splits train and val"] = None,
    pictures: Annotated[Path | None, "JPEGs for the mix of sizes (default: generated)"] = None,
    steps: Annotated[tuple[str, ...] | None, "only these"] = None,
    retry: Annotated[bool, "run failed steps again"] = False,
    rehearse: Annotated[bool, "on the CPU with tiny networks"] = False,
    pack_to: Annotated[Path | None, "copy what the machine needs to this folder, no more"] = None,
    carry: Annotated[tuple[Path, ...], "data, pictures, wheels to pack"] = (),
) -> Report:
    if pack_to is not None:
        return report_packed(pack_to, carry)
    if not rehearse and not torch.cuda.is_available():
        raise BenchmarkError(
            f"torch {torch.__version__} finds no CUDA device; to check that all steps run: "
            "--rehearse"
        )
    folder = folder.resolve()
    if rehearse and data is None:
        data = write_rehearsal_data(folder / "data")
    for path in (data, pictures):
        if path is not None and not path.is_dir():
            raise BenchmarkError(f"{path} is not a folder")
    wanted = list_steps(
        Lease(
            folder=folder,
            data=data and data.resolve(),
            pictures=pictures and pictures.resolve(),
            rehearse=rehearse,
        )
    )
    if steps is not None:
        unknown = sorted(set(steps) - {step.name for step in wanted})
        if unknown:
            raise BenchmarkError(
                f"no step {unknown[0]!r}, expected {', '.join(s.name for s in wanted)}"
            )
        wanted = [step for step in wanted if step.name in steps]
    runner = StepRunner(folder, seconds=60 * minutes)
    outcomes = runner.run(wanted, retry=retry)
    archive = runner.pack_logs()
    speeds, ceilings = tabulate_speeds(outcomes), find_ceilings(outcomes)
    tables = {"steps": tabulate_steps(outcomes), "images a second": speeds}
    report = Report(
        data={
            "rehearsal": rehearse,
            "ceilings": ceilings,
            "speeds": speeds,
            "steps": [vars(outcome) for outcome in outcomes],
        },
        tables={title: rows for title, rows in tables.items() if rows},
        notes=[
            "ceilings: " + (", ".join(f"{k} {v}" for k, v in ceilings.items()) or "not measured"),
            f"logs: {archive}",
        ],
        packages=("torch", "triton", "onnxruntime-gpu", "tensorrt", "cuda-core"),
        failures=[f"{o.step} {o.status}" for o in outcomes if o.status in (FAILED, TIMED_OUT)],
    )
    (folder / "summary.md").write_text(report.render()[:SUMMARY_CHARS] + "\n", encoding="utf-8")
    return report


def report_packed(target: Path, extra: tuple[Path, ...]) -> Report:
    """Packs, and says what."""
    parts = pack(target, extra)
    rows = [
        {"part": part, "MB": round(size / 1e6, 2)}
        for part, size in sorted(parts.items(), key=lambda item: -item[1])
    ]
    total = sum(parts.values())
    note = f"{total / 2**20:.1f} MiB in {target}"
    return Report(data={"bytes": total, "parts": parts}, tables={"": rows}, notes=[note])
