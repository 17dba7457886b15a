from __future__ import annotations

import hashlib
import io
import json
import platform
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.model_config import FileSpec
from service.engines.aoti_package import (
    METADATA_KEY,
    PackageInfo,
    describe_cpu,
    find_misfit,
    name_package,
    name_target,
    read_info,
    read_verified,
)
from service.engines.base import BackendError

INFO = PackageInfo(
    config="tiny",
    target="sm_90",
    precision="bf16",
    torch="2.13.0",
    machine=platform.machine(),
    max_batch=8,
    max_canvas_hw=(1344, 1344),
    fixed_canvas=False,
    onnx_sha256="0" * 64,
)


def build_archive(metadata: object, count: int = 1) -> bytes:
    """A ZIP archive with what `read_info` reads of a package."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for index in range(count):
            name = f"model/data/aotinductor/model/{index}.wrapper_metadata.json"
            archive.writestr(name, json.dumps(metadata))
    return buffer.getvalue()


def misfit(info: PackageInfo, target: str = "sm_90", torch: str = "2.13.1+cu130") -> str | None:
    return find_misfit(info, target=target, torch_version=torch, cpu_capability="AVX512_VNNI")


def test_a_package_says_what_was_written_into_it() -> None:
    assert read_info(build_archive({**INFO.to_metadata(), "AOTI_CPU_ISA": "AVX2"})) == INFO


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no archive", "no AOTInductor package"),
        (build_archive({}, count=0), "0 models"),
        (build_archive(INFO.to_metadata(), count=2), "2 models"),
        (build_archive({"other": "x"}), "does not say what it is for"),
        (build_archive({METADATA_KEY: "{}"}), "does not say what it is for"),
        (build_archive({METADATA_KEY: '{"surprise": 1}'}), "does not say what it is for"),
        (build_archive(replace(INFO, precision="fp8").to_metadata()), "fp8"),  # type: ignore[arg-type]
        (build_archive(INFO.to_metadata())[:-30], "no AOTInductor package"),
    ],
)
def test_what_is_no_package_of_ours_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        read_info(data)


def test_a_package_for_this_machine_fits() -> None:
    assert misfit(INFO) is None
    assert misfit(replace(INFO, host_cpu=describe_cpu())) is None


def test_a_cpu_is_its_model_and_its_instruction_sets(
    tmp_path: Path,
) -> None:
    info = tmp_path / "cpuinfo"
    found = []
    for flags in ("avx2 fma", "fma avx2", "fma avx2 avx512f", ""):
        info.write_text(f"model name\t: Some CPU\nflags\t\t: {flags}\n\nprocessor : 1\n")
        found.append(describe_cpu(info))
    assert found[0] == found[1] and len(set(found)) == 3
    assert all(name.startswith("Some CPU ") for name in found)
    info.unlink()
    assert describe_cpu(info).startswith(platform.processor())


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (replace(INFO, target="sm_80"), "for sm_80, this is sm_90"),
        (replace(INFO, target="cpu"), "for cpu, this is sm_90"),
        (replace(INFO, torch="2.12.0"), "torch 2.12.0, this is torch 2.13.1"),
        (replace(INFO, machine="riscv64"), "for riscv64 hosts"),
        (replace(INFO, host_cpu="Z80 0123"), f"for the CPU Z80 0123, this is {describe_cpu()}"),
    ],
)
def test_a_package_for_another_machine_says_which(info: PackageInfo, message: str) -> None:
    assert message in str(misfit(info))


def test_a_cpu_without_avx2_is_refused() -> None:
    info = replace(INFO, machine="x86_64", target="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "x86_64")
        found = find_misfit(info, target="cpu", torch_version="2.13.0", cpu_capability="DEFAULT")
        assert "needs a CPU with AVX2" in str(found)


def test_names() -> None:
    assert name_package(name_target((9, 0)), "fp16") == "model.sm_90.fp16.pt2"
    assert name_package(name_target(None), "fp32") == "model.cpu.fp32.pt2"


def test_only_the_published_bytes_are_read(tmp_path: Path) -> None:
    file = tmp_path / "model.cpu.fp32.pt2"
    data = b"published"
    spec = FileSpec(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    with pytest.raises(BackendError, match="No such file"):
        read_verified(file, {file.name: spec})
    file.write_bytes(data)
    assert read_verified(file, {file.name: spec}) == data
    with pytest.raises(BackendError, match=r"lists \['model.onnx'\], but no model.cpu"):
        read_verified(file, {"model.onnx": spec})
    file.write_bytes(b"publishee")
    with pytest.raises(BackendError, match="its SHA-256 is"):
        read_verified(file, {file.name: spec})
