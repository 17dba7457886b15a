from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from service.engines.base import BackendOptions
from service.engines.choose import build_backend
from service.errors import DeviceError, ModelRefused, StartupError
from service.models import repository as registry
from service.models.repository import load_repository, load_version, read_config
from tests.support import fake_gpu
from tests.support.blob_model import build_graph, draw_picture, model_config, publish
from tests.support.model_folder import edit_config

OPTIONS = BackendOptions(device="cpu", threads=1)


def add_version(folder: Path, version: int, graph: bytes) -> None:
    entry = model_config(graph, folder.name, version)["versions"]
    edit_config(folder, lambda content: content["versions"].update(entry))
    (folder / str(version)).mkdir()
    (folder / str(version) / "model.onnx").write_bytes(graph)


def test_a_sound_model_is_loaded_and_segments(tmp_path: Path) -> None:
    model = load_version(publish(tmp_path), None, OPTIONS)
    assert (model.config.name, model.version) == ("blobs", 1)
    assert (model.backend.name, model.backend.device) == ("onnxruntime", "cpu")
    found = model.segment(draw_picture(48, 64, {"red": (4, 8, 12, 16), "blue": (30, 30, 10, 10)}))
    assert [(i.label, i.bbox_xywh, i.area) for i in found] == [
        (0, (4, 8, 12, 16), 192),
        (2, (30, 30, 10, 10), 100),
    ]


def test_an_image_of_many_tiles_is_segmented_in_batches(tmp_path: Path) -> None:
    model = load_version(publish(tmp_path, limits={"max_batch": 2}), None, OPTIONS)
    found = model.segment(draw_picture(150, 200, {"green": (50, 70, 12, 20)}), max_instances=1)
    assert [(i.label, i.bbox_xywh) for i in found] == [(1, (50, 70, 12, 20))]


def test_the_highest_version_is_the_latest(tmp_path: Path) -> None:
    folder = publish(tmp_path, version=9)
    add_version(folder, 10, build_graph())
    assert load_version(folder, None, OPTIONS).version == 10
    assert load_version(folder, 9, OPTIONS).version == 9


def truncate(folder: Path) -> None:
    file = folder / "1" / "model.onnx"
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    file = folder / "1" / "model.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def remove_graph(folder: Path) -> None:
    (folder / "1" / "model.onnx").unlink()


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"name": "blobs",', encoding="utf-8")


def misspell_a_field(folder: Path) -> None:
    edit_config(folder, lambda content: content.update(mask_strid=4))


def drop_versions(folder: Path) -> None:
    edit_config(folder, lambda content: content.update(versions={}))


def name_another_model(folder: Path) -> None:
    edit_config(folder, lambda content: content.update(name="other"))


def list_no_graph(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        files = content["versions"]["1"]["files"]
        files["weights.bin"] = files.pop("model.onnx")

    edit_config(folder, change)


def point_outside(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        files = content["versions"]["1"]["files"]
        files["../../secret"] = files["model.onnx"]

    edit_config(folder, change)


def claim_another_stride(folder: Path) -> None:
    edit_config(folder, lambda content: content.update(mask_stride=8))


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (truncate, "model.onnx", "bytes, config.json says"),
        (flip_a_bit, "model.onnx", "its SHA-256 is"),
        (remove_graph, "model.onnx", "No such file"),
        (remove_config, "config.json", "No such file"),
        (break_json, "config.json", "not valid JSON"),
        (misspell_a_field, "config.json", "mask_strid"),
        (drop_versions, "config.json", "no version"),
        (name_another_model, "config.json", "'other'"),
        (list_no_graph, "1", "no model.onnx"),
        (point_outside, "secret", "must not be a path"),
        (claim_another_stride, "model.onnx", "mask_stride 8"),
    ],
)
def test_a_damaged_model_is_refused_by_file_and_reason(
    tmp_path: Path, damage: Callable[[Path], None], file: str, reason: str
) -> None:
    folder = publish(tmp_path)
    damage(folder)
    with pytest.raises(ModelRefused, match=reason) as caught:
        load_version(folder, None, OPTIONS)
    assert caught.value.file.name == file
    assert str(caught.value.file) in str(caught.value)


def republish(folder: Path, graph: bytes) -> None:
    """Puts a graph in with a hash that is right, so that only the graph is wrong."""
    (folder / "1" / "model.onnx").write_bytes(graph)
    versions = model_config(graph)["versions"]
    edit_config(folder, lambda content: content.update(versions=versions))


def test_a_file_that_is_no_graph_is_refused_though_its_hash_is_right(tmp_path: Path) -> None:
    folder = publish(tmp_path)
    republish(folder, b"surely no graph")
    with pytest.raises(ModelRefused, match="cannot load the graph"):
        load_version(folder, None, OPTIONS)


def test_a_graph_with_other_outputs_is_refused(tmp_path: Path) -> None:
    graph = onnx.load_from_string(build_graph())
    graph.graph.output.pop()
    folder = publish(tmp_path)
    republish(folder, graph.SerializeToString())
    with pytest.raises(ModelRefused, match=r"outputs are .* must be .*mask_probs"):
        load_version(folder, None, OPTIONS)


def test_a_graph_with_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    graph = onnx.load_from_string(build_graph())
    for tensor in (*graph.graph.input, *graph.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = 1
    folder = publish(tmp_path)
    republish(folder, graph.SerializeToString())
    with pytest.raises(ModelRefused, match="must be dynamic"):
        load_version(folder, None, OPTIONS)


def test_a_version_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="no version 7"):
        read_config(publish(tmp_path), 7)


def test_a_version_may_replace_shared_sections(tmp_path: Path) -> None:
    folder = publish(tmp_path)
    edit_config(folder, lambda c: c["versions"]["1"].update(limits={"max_batch": 3}))
    assert read_config(folder).limits.max_batch == 3


def test_a_broken_model_does_not_stop_the_others(model_repo: Path) -> None:
    repository = load_repository(model_repo, OPTIONS)
    assert sorted(repository.models) == ["blobs", "wide"]
    assert list(repository.refused) == ["broken"]
    assert "broken/1/model.onnx" in str(repository.refused["broken"])


def test_a_repository_without_a_sound_model_is_refused_with_all_reasons(tmp_path: Path) -> None:
    truncate(publish(tmp_path, "first"))
    remove_config(publish(tmp_path, "second"))
    with pytest.raises(StartupError, match=r"first/1/model.onnx.*second/config.json"):
        load_repository(tmp_path, OPTIONS)


def test_a_repository_that_is_no_folder_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="has no model folders"):
        load_repository(tmp_path, OPTIONS)
    with pytest.raises(StartupError, match="missing' is not a folder"):
        load_repository(tmp_path / "missing", OPTIONS)


def test_the_precision_asked_for_is_served_from_its_own_file(tmp_path: Path) -> None:
    folder, graph = publish(tmp_path), build_graph()
    (folder / "1" / "model.int8.onnx").write_bytes(graph)
    entry = model_config(graph)["versions"]["1"]["files"]["model.onnx"]
    edit_config(folder, lambda c: c["versions"]["1"]["files"].update({"model.int8.onnx": entry}))
    truncate(folder)  # the float32 graph, which is not used
    model = load_version(folder, None, BackendOptions(device="cpu", threads=1, precision="int8"))
    assert model.backend.precision == "int8"


def test_a_precision_that_was_not_exported_is_refused_with_the_command(tmp_path: Path) -> None:
    options = BackendOptions(device="cpu", threads=1, precision="fp16")
    with pytest.raises(ModelRefused, match=r"make it with: solo-export .* --precision fp16"):
        load_version(publish(tmp_path), None, options)


def test_cuda_is_never_replaced_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    providers = ["CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    with pytest.raises(DeviceError, match="device cuda"):
        load_version(publish(tmp_path), None, BackendOptions(device="cuda", threads=1))


def test_auto_says_what_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    model = load_version(publish(tmp_path), None, BackendOptions(device="auto", threads=1))
    assert model.backend.device == "cpu"


def test_a_model_may_set_its_own_instances_and_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[BackendOptions] = []

    def record(artefacts: Any, options: BackendOptions, *rest: Any) -> Any:
        seen.append(options)
        return build_backend(artefacts, options, *rest)

    monkeypatch.setattr(registry, "build_backend", record)
    folder = publish(tmp_path)
    plain = load_version(folder, 1, BackendOptions(device="cpu", threads=1))
    edit_config(folder, lambda c: c.update(limits={"max_batch": 2, "instances": 3, "threads": 2}))
    special = load_version(folder, 1, BackendOptions(device="cpu", threads=1))
    assert [(options.slots, options.threads) for options in seen] == [(None, 1), (3, 2)]
    assert (plain.backend.concurrency, special.backend.concurrency) == (1, 3)
    edit_config(folder, lambda c: c.update(limits={"instances": 0}))
    with pytest.raises(ModelRefused, match="instances"):
        load_version(folder, 1)


def test_a_model_is_placed_on_some_of_the_processs_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = fake_gpu.install(monkeypatch)
    folder = publish(tmp_path, limits={"gpus": [1]})
    options = BackendOptions(device="cuda", gpus=(0, 2))
    model = load_version(folder, None, options)
    assert {asked[0][1]["device_id"] for asked in session.asked} == {"2"}
    model.backend.close()
    with pytest.raises(ModelRefused, match=r"names position 1, the process has 1 GPUs"):
        load_version(folder, None, BackendOptions(device="cuda"))
    load_version(folder, None, OPTIONS).backend.close()  # on the CPU it says nothing


@pytest.mark.parametrize("gpus", [[], [0, 0], [-1], [1024], [True], "0"])
def test_a_placement_that_makes_no_sense_is_refused(tmp_path: Path, gpus: object) -> None:
    folder = publish(tmp_path, limits={"gpus": gpus})
    with pytest.raises(ModelRefused, match="gpus"):
        read_config(folder)
