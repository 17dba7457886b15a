"""What `benchmarks lease` runs on a GPU that is lent for minutes, the most valuable steps first.

Also the files that such a machine needs, and the summary of what was measured.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.gpu.subjects import PAPER_FPS
from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import ROOT, Row
from benchmarks.harness.steps import OK, Outcome, Step
from benchmarks.requirements import write_list

CARRY_LIMIT_BYTES = 64 << 20
LEFT_BEHIND = (
    "*.exits.onnx",
    "*.int8.onnx",
    "benchmarks/results/*",
    "benchmarks/servers/*",
    "docs/*",
    "docker/*",
    "model_repo/facades/*/weights.pt",
    "service/http/web/samples/*",
    "tests/browser/*",
    "tests/data/parity/*",
    "tests/fuzz/corpus/*",
)
"""Tracked files that no step reads."""
SUMMARY_CHARS = 12_000
TARGETS = {
    ("solo_512_r50", "engine", 16): 450,
    ("solo_512_r50", "one size", 0): 360,
    ("solo_512_r50", "mix", 0): 250,
    ("solo_r50", "engine", 16): 200,
}
"""Images a second: of an engine by its batch, or end to end with the best number of clients."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """Where and on what the steps run.

    Attributes:
        folder: For results and packages.
        data: Labelled nuclei with the splits `train` and `val`.
        pictures: JPEGs for the mix of sizes; None generates them.
        rehearse: On the CPU, with tiny networks and short loads.
    """

    folder: Path
    data: Path | None
    pictures: Path | None
    rehearse: bool


def list_steps(lease: Lease) -> list[Step]:
    """All steps, by value; compilation goes on beside the tests of the kernels."""
    rehearse = lease.rehearse
    place = ["--device", "cpu"] if rehearse else ["--device", "cuda"]
    precision = ["--precision", "fp32" if rehearse else "bf16"]
    packages = ["--packages", str(lease.folder / "packages")]
    small, large = ("tiny_vanilla", "tiny_decoupled") if rehearse else ("solo_512_r50", "solo_r50")
    quick = ["--seconds", "0.5"]
    if rehearse:
        quick = ["--quick", "--threads", "1", "--engine-threads", "1"]
    brief = ["--seconds", "0.3"] if rehearse else []
    kept = [*place, *precision, *packages]
    compiled = {small: "compile_small", large: "compile_large"}
    sanitizer = shutil.which("compute-sanitizer")
    no_data = None if lease.data else "--data is missing"

    def gpu(name: str, model: str, engine: str, batches: str, limit_s: float, **how: Any) -> Step:
        flags = [*kept, *quick, "--models", model, "--engines", *engine.split()]
        flags += ["--batches", *(("1", "2") if rehearse else batches.split())]
        return _benchmark(name, "gpu", flags, limit_s, **how)

    def server(name: str, model: str) -> Step:
        loads = ["--clients", "16", "64", "128"]
        loads = ["--clients", "1", "2", "--batch", "2"] if rehearse else loads
        mix = ["--pictures", str(lease.pictures)] if lease.pictures else []
        flags = ["--model", model, *kept, *loads, *mix, *brief]
        return _benchmark(name, "gpu_server", flags, 150, needs=(compiled[model],))

    compile_flags = [*kept, "--max-batch", "2"] if rehearse else kept
    training = ["--data", str(lease.data), "--run", str(lease.folder / "training"), *place]
    training += [*precision, "--seconds", "1" if rehearse else "120"]
    return [
        _benchmark("environment", "environment", place, 90),
        *(
            _benchmark(step, "compile", [*compile_flags, "--models", model], 240, background=True)
            for model, step in compiled.items()
        ),
        _benchmark("kernels_correct", "device_tests", [*place, *["--few"] * rehearse], 120),
        _benchmark(
            "kernels_sanitized",
            "device_tests",
            [*place, "--sanitizer"],
            90,
            obstacle=None if sanitizer else "there is no compute-sanitizer in PATH",
        ),
        _benchmark(
            "kernels_timed",
            "kernels",
            ["--batches", "1", "16", "--repeats", "20"],
            90,
            obstacle="there is no GPU" if rehearse else None,
        ),
        gpu("eager_small", small, "eager", "1 8 16", 75),
        gpu("engine_small", small, "aoti", "1 8 16 32", 90, needs=(compiled[small],)),
        gpu("eager_large", large, "eager", "1 8 16", 75),
        gpu("engine_large", large, "aoti", "1 8 16 32", 90, needs=(compiled[large],)),
        server("server_small", small),
        _benchmark(
            "ap",
            "device_ap",
            [*place, "--data", str(lease.data), *["--precisions", "fp32"] * rehearse],
            90,
            obstacle=no_data,
        ),
        _benchmark(
            "training",
            "device_training",
            [*training, *["--quick"] * rehearse],
            180,
            obstacle=no_data,
        ),
        gpu("other_engines", small, "ort" if rehearse else "ort trt", "1 8 16", 150),
        server("server_large", large),
    ]


def _benchmark(name: str, case: str, flags: Sequence[str], limit_s: float, **how: Any) -> Step:
    command = [sys.executable, "-m", "benchmarks", case, *flags, "--out", "{out}"]
    return Step(name=name, command=command, limit_s=limit_s, **how)


def list_carried(extra: Sequence[Path] = ()) -> dict[str, int]:
    """Files that the machine needs, and their bytes.

    Args:
        extra: Files and folders beside the tracked ones, such as data and wheels.

    Raises:
        BenchmarkError: They are too large together, or one does not exist.
    """
    command = ["git", "ls-files", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in done.stdout.split("\0") if name]
    kept = [name for name in names if not any(fnmatch(name, pattern) for pattern in LEFT_BEHIND)]
    sizes = {name: (ROOT / name).stat().st_size for name in kept if (ROOT / name).is_file()}
    for path in extra:
        if not path.exists():
            raise BenchmarkError(f"{path} does not exist")
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        sizes |= {str(file): file.stat().st_size for file in files if file.is_file()}
    total = sum(sizes.values())
    if total >= CARRY_LIMIT_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        raise BenchmarkError(
            f"{total} bytes are to be carried, the limit is {CARRY_LIMIT_BYTES}; the largest: "
            f"{', '.join(largest)}"
        )
    return sizes


def pack(target: Path, extra: Sequence[Path] = ()) -> dict[str, int]:
    """Copies what is carried to an empty folder, what is `extra` into its folder `carried`.

    A list of the packages that the steps import lies beside it.

    Returns:
        Bytes of each part of the tree.

    Raises:
        BenchmarkError: See `list_carried`; or the folder is not empty.
    """
    if target.exists() and any(target.iterdir()):
        raise BenchmarkError(f"{target} is not empty")
    parts: dict[str, int] = {}
    for name, size in list_carried(extra).items():
        root = next((path for path in extra if Path(name).is_relative_to(path)), None)
        place = Path(name) if root is None else "carried" / Path(name).relative_to(root.parent)
        copy = target / place
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy)
        part = place.parts[1] if place.parts[0] == "carried" else place.parts[0]
        parts[part] = parts.get(part, 0) + size
    requirements = write_list(target)
    parts[requirements.name] = requirements.stat().st_size
    return parts


def write_rehearsal_data(target: Path, images: int = 2) -> Path:
    """The smallest images of the tests' nuclei as a folder with the splits `train` and `val`."""
    source = ROOT / "tests" / "data" / "nuclei"
    truth = json.loads((source / "annotations" / "val.json").read_text(encoding="utf-8"))
    smallest = sorted(truth["images"], key=lambda image: image["height"] * image["width"])
    truth["images"] = smallest[:images]
    kept = {image["id"] for image in truth["images"]}
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in kept]
    for folder in ("annotations", "images"):
        (target / folder).mkdir(parents=True, exist_ok=True)
    for image in truth["images"]:
        shutil.copy2(source / "images" / image["file_name"], target / "images")
    for split in ("train", "val"):
        text = json.dumps(truth)
        (target / "annotations" / f"{split}.json").write_text(text, encoding="utf-8")
    return target


def tabulate_steps(outcomes: Sequence[Outcome]) -> list[Row]:
    """A line for each step."""
    return [
        {
            "step": outcome.step,
            "status": outcome.status,
            "s": round(outcome.seconds),
            "result": describe(outcome),
        }
        for outcome in outcomes
    ]


def describe(outcome: Outcome) -> str:
    """A few words: a number of the result, or why there is none."""
    data = outcome.data or {}
    rows = data.get("rows") or [{}]
    if outcome.status != OK:
        text = outcome.reason
    elif "passed" in data:
        text = f"{data['passed']} passed"
    elif "AP" in rows[0]:
        text = ", ".join(f"{row['engine']} AP {row['AP']}" for row in rows)
    elif "images_per_s" in data:
        text = f"{data['images_per_s']} images/s, loss {data['first_loss']} to {data['last_loss']}"
    elif "cases" in data:
        best = min(case["both_ms_per_image"] for case in data["cases"])
        text = f"NMS and run lengths {best} ms an image at best"
    elif "file" in rows[0]:
        text = ", ".join(f"{row['file']} {row['MB']} MB in {row['s']} s" for row in rows)
    else:
        text = "; ".join(f"{s['engine']}: {s['reason']}" for s in data.get("skipped", ()))
    return " ".join(text.replace("|", "/").split())[:160]


def tabulate_speeds(outcomes: Sequence[Outcome]) -> list[Row]:
    """Images a second of each engine and server, beside the paper's V100 and the targets."""
    lines: list[Row] = []
    for outcome in outcomes:
        for row in (outcome.data or {}).get("rows", ()) if outcome.status == OK else ():
            for entry in row.get("batches", ()):
                if "error" not in entry:
                    how = f"{row['engine']} {row['precision']}, batch {entry['batch']}"
                    key = (row["model"], "engine", entry["batch"])
                    lines.append(_speed(row["model"], how, entry["engine_images_per_s"], key))
            if "pictures" in row:
                how = f"server, {row['pictures']}, {row['clients']} clients"
                how += f", mean batch {row['mean_batch']}"
                key = (row["model"], row["pictures"], 0)
                lines.append(_speed(row["model"], how, row["images_per_s"], key))
    return lines


def _speed(model: str, how: str, images_per_s: float, key: tuple[str, str, int]) -> Row:
    paper = PAPER_FPS.get(model)
    return {
        "model": model,
        "how": how,
        "images/s": round(images_per_s, 1),
        "paper, V100": paper or "-",
        "times": f"{images_per_s / paper:.1f}" if paper else "-",
        "target": TARGETS.get(key, "-"),
    }


def find_ceilings(outcomes: Sequence[Outcome]) -> Mapping[str, float]:
    """The measured limits of the machine; empty if they were not measured."""
    for outcome in outcomes:
        if outcome.step == "environment" and outcome.data:
            found: Mapping[str, float] = outcome.data.get("ceilings", {})
            return found
    return {}


if __name__ == "__main__":
    from benchmarks.harness.cli import main

    raise SystemExit(main(["lease", *sys.argv[1:]]))
