from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pipeline.model_config import FileSpec
from service.engines.artefacts import Artefacts
from service.errors import ModelRefused


def write(folder: Path, **files: bytes) -> Artefacts:
    """Writes files, given by name with `_` for `.`, and lists them as config.json would."""
    specs = {}
    for key, data in files.items():
        name = key.replace("_", ".")
        (folder / name).write_bytes(data)
        specs[name] = FileSpec(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    return Artefacts(folder, specs)


def test_a_graph_is_returned_as_its_verified_bytes(tmp_path: Path) -> None:
    artefacts = write(tmp_path, model_onnx=b"full", model_fp16_onnx=b"half")
    assert artefacts.read_graph("model.fp16.onnx") == b"half"
    assert "model.fp16.onnx" in artefacts
    assert "model.int8.onnx" not in artefacts


def test_only_the_files_read_are_verified(tmp_path: Path) -> None:
    files = {"model_onnx": b"full", "model_fp16_onnx": b"half", "model_cpu_fp32_pt2": b"code"}
    artefacts = write(tmp_path, parity_json=b"{}", **files)
    (tmp_path / "model.fp16.onnx").write_bytes(b"HALF")
    (tmp_path / "model.cpu.fp32.pt2").unlink()
    (tmp_path / "parity.json").unlink()
    assert artefacts.read_graph("model.onnx") == b"full"
    with pytest.raises(ModelRefused, match=r"model\.fp16\.onnx: its SHA-256 is"):
        artefacts.read_graph("model.fp16.onnx")


def test_a_graph_with_external_data_is_a_path_and_its_data_are_verified(tmp_path: Path) -> None:
    artefacts = write(tmp_path, model_onnx=b"graph", model_onnx_data=bytes(3_000_000))
    assert artefacts.read_graph("model.onnx") == tmp_path / "model.onnx"
    (tmp_path / "model.onnx.data").write_bytes(bytes(2_999_999) + b"1")
    with pytest.raises(ModelRefused, match=r"model\.onnx\.data: its SHA-256 is"):
        artefacts.read_graph("model.onnx")
    (tmp_path / "model.onnx.data").write_bytes(bytes(10))
    with pytest.raises(ModelRefused, match=r"has 10 bytes, config\.json says 3000000"):
        artefacts.read_graph("model.onnx")
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ModelRefused, match="No such file"):
        artefacts.read_graph("model.onnx")


@pytest.mark.parametrize("name", ["", ".", "..", "../secret", "/etc/passwd", "a/model.onnx"])
def test_a_file_name_that_is_a_path_is_rejected(tmp_path: Path, name: str) -> None:
    spec = FileSpec(sha256="0" * 64, bytes=1)
    with pytest.raises(ModelRefused, match="must not be a path"):
        Artefacts(tmp_path, {"model.onnx": spec, name: spec})


def test_a_version_without_the_float32_graph_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=r"lists \['model.fp16.onnx'\], but no model.onnx"):
        write(tmp_path, model_fp16_onnx=b"half")
