from __future__ import annotations

from pathlib import Path

from service.engines.cpu import read_cpu


def test_a_processor_has_a_name_and_instruction_sets(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    core = "processor: 0\nmodel name\t: A CPU\nstepping: 4\nflags\t\t: fpu avx2\n"
    file.write_text(f"\n{core}\nprocessor: 1\nflags: other\n")
    assert read_cpu(file) == ("A CPU", "avx2 fpu")
    file.write_text("processor: 0\nFeatures\t: bf16 asimd\nCPU part\t: 0xd40\n\nFeatures: other\n")
    assert read_cpu(file) == ("0xd40", "asimd bf16")


def test_an_unknown_processor_has_no_instruction_sets(tmp_path: Path) -> None:
    assert read_cpu(tmp_path / "missing")[1] == ""
