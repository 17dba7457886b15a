from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from service.engines.base import BackendOptions, Precision
from service.errors import ModelRefused, StartupError
from service.models.command import list_versions
from service.models.repository import load_repository
from service.models.trimming import trim_model
from tests.support.blob_model import build_graph, draw_picture, publish
from tests.support.model_folder import add_version, edit_config

BUNDLED = Path(__file__).resolve().parents[3] / "model_repo"


def add_files(folder: Path, version: int, *names: str) -> None:
    """Adds graphs to a version."""
    graph = build_graph()
    entry = {"sha256": hashlib.sha256(graph).hexdigest(), "bytes": len(graph)}
    for name in names:
        (folder / str(version) / name).write_bytes(graph)
    edit_config(
        folder,
        lambda content: content["versions"][str(version)]["files"].update(
            dict.fromkeys(names, entry)
        ),
    )


def graphs_of(folder: Path, version: int) -> list[str]:
    return sorted(path.name for path in (folder / str(version)).iterdir())


def test_graphs_that_no_cpu_reads_are_removed(tmp_path: Path) -> None:
    folder = publish(tmp_path)
    add_version(folder, 2)
    add_files(folder, 1, "model.fp16.onnx", "model.int8.onnx", "model.sm_90.fp16.pt2")
    names = ("model.exits.onnx", "model.int8.onnx", "model.int8.exits.onnx", "model.bf16.onnx")
    add_files(folder, 2, *names)
    (folder / "2" / "parity.json").write_text("{}")
    size = len(build_graph())
    assert trim_model(folder) == 5 * size
    assert graphs_of(folder, 1) == ["model.int8.onnx", "model.onnx"]
    assert graphs_of(folder, 2) == ["model.exits.onnx", "model.int8.exits.onnx", "parity.json"]
    assert [entry.fault for entry in list_versions(tmp_path)] == ["", ""]
    assert [entry.precisions for entry in list_versions(tmp_path)] == [("fp32", "int8")] * 2
    assert trim_model(folder) == 0


def test_a_repository_with_a_damaged_file_is_left_alone(tmp_path: Path) -> None:
    folder = publish(tmp_path)
    add_files(folder, 1, "model.fp16.onnx")
    config = (folder / "config.json").read_bytes()
    (folder / "1" / "model.fp16.onnx").write_bytes(b"damaged")
    with pytest.raises(ModelRefused):
        trim_model(folder)
    assert (folder / "config.json").read_bytes() == config
    assert graphs_of(folder, 1) == ["model.fp16.onnx", "model.onnx"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_bundled_models_answer_as_before(tmp_path: Path, precision: Precision) -> None:
    root = tmp_path / "repo"
    shutil.copytree(BUNDLED, root, ignore=shutil.ignore_patterns("weights.pt"))
    freed = sum(trim_model(root / name) for name in ("nuclei", "facades"))
    assert freed > 30e6
    options = BackendOptions(device="cpu", precision=precision, precision_fallback=True)
    before, after = load_repository(BUNDLED, options), load_repository(root, options)
    picture = draw_picture(200, 240, {"red": (40, 60, 30, 30)})
    for name, versions in before.models.items():
        for version, model in versions.items():
            trimmed = after.models[name][version]
            assert trimmed.backend.precision == model.backend.precision
            assert repr(trimmed.segment(picture)) == repr(model.segment(picture))
    before.close()
    after.close()


def test_a_half_precision_that_was_removed_is_refused_by_name(tmp_path: Path) -> None:
    folder = publish(tmp_path)
    add_files(folder, 1, "model.fp16.onnx")
    trim_model(folder)
    with pytest.raises(StartupError, match=r"model\.fp16\.onnx: precision fp16 was asked for"):
        load_repository(tmp_path, BackendOptions(device="cpu", precision="fp16"))
