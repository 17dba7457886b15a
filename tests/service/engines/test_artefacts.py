from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pipeline.model_config import FileSpec
from service.engines import artefacts as artefacts_module
from service.engines.artefacts import Artefacts, open_file, read_file
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


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for size in (0, 1, 10):
        file.write_bytes(bytes(size))
        assert read_file(file, 10) == bytes(size)
    file.write_bytes(bytes(11))
    with pytest.raises(OSError, match="it has 11 bytes, the limit is 10"):
        read_file(file, 10)
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)  # reading it would take for ever
    with pytest.raises(OSError, match="it has 1099511627776 bytes"):
        read_file(file, 10)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name, kind in {"fifo": "a FIFO", "device": "a device", "folder": "a folder"}.items():
        with pytest.raises(OSError, match=f"it is {kind}, not a regular file"):
            open_file(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "missing")
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with open_file(tmp_path / "link") as file:
        assert file.read() == b"content"


def test_a_file_that_becomes_a_fifo_before_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    stat = os.stat

    def stat_then_replace(path: Path) -> os.stat_result:
        found = stat(path)
        file.unlink()
        os.mkfifo(file)
        return found

    monkeypatch.setattr(os, "stat", stat_then_replace)
    with pytest.raises(OSError, match="a FIFO"):
        open_file(file)


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_a_graph_that_is_no_regular_file_is_refused(tmp_path: Path, kind: str) -> None:
    artefacts = write(tmp_path, model_onnx=b"graph")
    (tmp_path / "model.onnx").unlink()
    (os.mkfifo if kind == "fifo" else os.mkdir)(tmp_path / "model.onnx")
    with pytest.raises(ModelRefused, match="not a regular file"):
        artefacts.read_graph("model.onnx")


def test_a_graph_of_the_wrong_size_is_not_read(tmp_path: Path) -> None:
    artefacts = write(tmp_path, model_onnx=b"graph")
    with (tmp_path / "model.onnx").open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(ModelRefused, match=r"has 1099511627776 bytes, config\.json says 5"):
        artefacts.read_graph("model.onnx")


def test_a_graph_beyond_protobufs_limit_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artefacts = write(tmp_path, model_onnx=b"graph")
    monkeypatch.setattr(artefacts_module, "MAX_GRAPH_BYTES", 5)
    assert artefacts.read_graph("model.onnx") == b"graph"
    monkeypatch.setattr(artefacts_module, "MAX_GRAPH_BYTES", 4)
    with pytest.raises(ModelRefused, match="has 5 bytes, a graph has at most 4"):
        artefacts.read_graph("model.onnx")


def test_every_file_is_verified(tmp_path: Path) -> None:
    artefacts = write(tmp_path, model_onnx=b"graph", model_int8_onnx=b"other")
    artefacts.verify()
    (tmp_path / "model.int8.onnx").write_bytes(b"OTHER")
    with pytest.raises(ModelRefused, match=r"model\.int8\.onnx: its SHA-256"):
        artefacts.verify()
