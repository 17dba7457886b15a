"""The steps of `benchmarks lease`, what is carried, and the summary; no step runs here."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from benchmarks import lease
from benchmarks.gpu.subjects import PAPER_FPS
from benchmarks.harness import BenchmarkError
from benchmarks.harness.cli import build_parser
from benchmarks.harness.report import ROOT, markdown_table
from benchmarks.harness.steps import FAILED, NOT_RUN, OK, Outcome, Step
from benchmarks.lease import (
    SUMMARY_CHARS,
    Lease,
    describe,
    list_carried,
    list_steps,
    pack,
    tabulate_speeds,
    tabulate_steps,
    write_rehearsal_data,
)
from training.data.coco import CocoDataset

needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no checkout")


def plan(tmp_path: Path, **changes: Any) -> list[Step]:
    content = {"folder": tmp_path, "data": tmp_path, "pictures": None, "rehearse": False}
    return list_steps(Lease(**{**content, **changes}))


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_step_is_a_command_that_exists(tmp_path: Path, rehearse: bool) -> None:
    found = plan(tmp_path, rehearse=rehearse, pictures=tmp_path)
    names = [step.name for step in found]
    assert len(set(names)) == len(names) == 15
    for step in found:
        module, case, *flags = step.command[2:]
        assert module == "benchmarks" and "{out}" in flags
        benchmark = getattr(importlib.import_module(f"benchmarks.cases.{case}"), case)
        options = build_parser(case, benchmark, None).parse_args(flags)
        if hasattr(options, "device"):
            assert options.device == ("cpu" if rehearse else "cuda")
        assert set(step.needs) <= set(names[: names.index(step.name)])


def test_the_first_call_fits_into_400_seconds_and_what_is_measured_needs_its_package(
    tmp_path: Path,
) -> None:
    found = {step.name: step for step in plan(tmp_path)}
    assert [name for name, step in found.items() if step.background] == [
        "compile_small",
        "compile_large",
    ]
    assert found["engine_small"].needs == found["server_small"].needs == ("compile_small",)
    assert found["engine_large"].needs == ("compile_large",)
    kernels = [found[name].limit_s for name in found if name.startswith("kernels")]
    assert found["compile_small"].limit_s <= sum(kernels)  # it ends beside them
    assert next(iter(found)) == "environment"


def test_without_data_the_steps_that_need_it_say_so(tmp_path: Path) -> None:
    missing = {step.name: step.obstacle for step in plan(tmp_path, data=None)}
    assert missing["ap"] == missing["training"] == "--data is missing"


@needs_git
def test_what_is_carried_is_the_tree_without_what_no_step_reads() -> None:
    sizes = list_carried()
    assert 1 << 20 < sum(sizes.values()) < lease.CARRY_LIMIT_BYTES
    assert {"pyproject.toml", "benchmarks/lease.py", "model_repo/nuclei/config.json"} <= set(sizes)
    assert not any(name.endswith((".exits.onnx", ".int8.onnx")) for name in sizes)
    assert not any(name.startswith(("docs/", "docker/", "tests/fuzz/corpus/")) for name in sizes)


@needs_git
def test_too_much_to_carry_names_the_largest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "CARRY_LIMIT_BYTES", sum(list_carried().values()) + 1000)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a.whl").write_bytes(bytes(999))
    assert str(tmp_path / "wheels" / "a.whl") in list_carried([tmp_path / "wheels"])
    (tmp_path / "wheels" / "b.whl").write_bytes(bytes(1))
    with pytest.raises(BenchmarkError, match=r"bytes are to be carried.*model\.onnx"):
        list_carried([tmp_path / "wheels"])
    with pytest.raises(BenchmarkError, match=r"missing\.whl does not exist"):
        list_carried([tmp_path / "missing.whl"])


def test_what_is_packed_lies_as_in_the_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"Makefile": 1, "benchmarks/lease.py": 2}
    monkeypatch.setattr(lease, "list_carried", lambda extra: {**small, f"{extra[0]}/x/one.jpg": 3})
    data = tmp_path / "data"
    (data / "x").mkdir(parents=True)
    (data / "x" / "one.jpg").write_bytes(b"jpg")
    target = tmp_path / "target"
    parts = pack(target, [data])
    assert parts.pop("lease-requirements.txt") > 100
    assert parts == {"Makefile": 1, "benchmarks": 2, "data": 3}
    assert (target / "carried" / "data" / "x" / "one.jpg").read_bytes() == b"jpg"
    assert (target / "Makefile").read_bytes() == (ROOT / "Makefile").read_bytes()
    with pytest.raises(BenchmarkError, match="target is not empty"):
        pack(target, [data])


def test_data_of_a_rehearsal_are_a_dataset(tmp_path: Path) -> None:
    folder = write_rehearsal_data(tmp_path)
    for split in ("train", "val"):
        dataset = CocoDataset(folder, split)
        assert len(dataset) == 2
        assert sum(len(record.objects) for record in dataset.records) > 10


ENGINE = {
    "model": "solo_512_r50",
    "engine": "aotinductor",
    "precision": "bf16",
    "batches": [
        {"batch": 1, "engine_images_per_s": 225.0},
        {"batch": 16, "engine_images_per_s": 500.04},
        {"batch": 32, "error": "out of memory"},
    ],
}
LOAD = {"model": "solo_512_r50", "clients": 64, "images_per_s": 361.0, "mean_batch": 12.5}
RESULTS = [
    Outcome(step="environment", status=OK, data={"ceilings": {"bf16_matrix_tflop_s": 790.0}}),
    Outcome(step="engine_small", status=OK, seconds=61.4, data={"rows": [ENGINE]}),
    Outcome(
        step="server",
        status=OK,
        data={"rows": [{**LOAD, "pictures": "one size"}, {**LOAD, "pictures": "mix"}]},
    ),
    Outcome(step="broken", status=FAILED, reason="exit status 1: a | b\n" + "x" * 5000),
    Outcome(step="late", status=NOT_RUN, reason="the time is over"),
]


def test_speeds_stand_beside_the_papers_and_the_targets() -> None:
    rows = tabulate_speeds(RESULTS)
    assert [row["images/s"] for row in rows] == [225.0, 500.0, 361.0, 361.0]
    assert [row["times"] for row in rows] == ["10.0", "22.2", "16.0", "16.0"]
    assert {row["paper, V100"] for row in rows} == {PAPER_FPS["solo_512_r50"]} == {22.5}
    assert [row["target"] for row in rows] == ["-", 450, 360, 250]
    assert rows[3]["how"] == "server, mix, 64 clients, mean batch 12.5"
    assert lease.find_ceilings(RESULTS) == {"bf16_matrix_tflop_s": 790.0}
    assert lease.find_ceilings(RESULTS[1:]) == {} and tabulate_speeds([]) == []


def test_the_summary_is_bounded_whatever_steps_say() -> None:
    rows = tabulate_steps([*RESULTS, *RESULTS[3:4] * 20])
    text = markdown_table(rows)
    assert len(text) < SUMMARY_CHARS / 2
    assert all(line.count("|") == 5 for line in text.splitlines())
    assert rows[3]["result"].startswith("exit status 1: a / b x")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"passed": 90, "failed": 0}, "90 passed"),
        ({"rows": [{"engine": "ort", "AP": 0.5}]}, "ort AP 0.5"),
        ({"images_per_s": 3.0, "first_loss": 4.0, "last_loss": 1.5}, "3.0 images/s, loss 4.0 to"),
        ({"cases": [{"both_ms_per_image": 2.0}, {"both_ms_per_image": 0.5}]}, "0.5 ms an image"),
        ({"rows": [{"file": "a.pt2", "MB": 3.0, "s": 9}]}, "a.pt2 3.0 MB in 9 s"),
        ({"rows": [ENGINE], "skipped": [{"engine": "trt", "reason": "none"}]}, "trt: none"),
        ({}, ""),
    ],
)
def test_a_result_is_described_in_a_few_words(data: dict[str, Any], text: str) -> None:
    assert text in describe(Outcome(step="a", status=OK, data=data))
