"""Files of `torch.save` that others wrote: what is read, what is refused, what never runs."""

from __future__ import annotations

import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.tiny_solo import save_tiny_checkpoint, tiny_config
from training.weights.formats import CheckpointError, OwnCheckpointError, read_weights

WEIGHTS = {"neck.a": torch.arange(6.0).reshape(2, 3), "neck.b": torch.tensor(7)}


def save(path: Path, content: Any, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


class Trap:
    """A pickle that creates a file when it is loaded without protection."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.write_text, (self.marker, "run")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("content", "notes"),
    [
        (WEIGHTS, []),
        ({"state_dict": WEIGHTS}, []),
        ({"model": WEIGHTS, "meta": None}, []),
        (
            {"state_dict": WEIGHTS, "optimizer": {"lr": 1}, "epoch": 3, "meta": {"epoch": 3}},
            ["entries that hold no weights of the model: epoch, optimizer"],
        ),
        (
            {"state_dict": {f"module.module.{k}": v for k, v in WEIGHTS.items()}},
            ["the prefix 'module.' of (distributed) data parallel training is removed"] * 2,
        ),
    ],
)
def test_the_usual_layouts(tmp_path: Path, content: Any, notes: list[str], legacy: bool) -> None:
    found = read_weights(save(tmp_path / "a.pth", content, legacy))
    assert found.tensors.keys() == WEIGHTS.keys() and found.notes == notes
    assert all(torch.equal(found.tensors[key], value) for key, value in WEIGHTS.items())


@pytest.mark.parametrize(
    ("meta", "names"),
    [
        ({"CLASSES": ("cat", "dog")}, ("cat", "dog")),
        ({"CLASSES": "cat"}, ("cat",)),
        ({"dataset_meta": {"classes": ["cat", "dog"]}}, ("cat", "dog")),
        ({"dataset_meta": {"CLASSES": ("cat",)}, "CLASSES": ("old",)}, ("cat",)),
        ({"dataset_meta": None, "CLASSES": None}, ()),
        ({"CLASSES": ["cat", 2]}, ()),
        ({}, ()),
    ],
)
def test_class_names_of_the_meta(tmp_path: Path, meta: Any, names: tuple[str, ...]) -> None:
    path = save(tmp_path / "a.pth", {"meta": meta, "state_dict": WEIGHTS})
    assert read_weights(path).class_names == names


def write_with_mmengine(path: Path, legacy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint as mmengine's runner writes it: logs and settings are objects of its classes."""
    buffers = types.ModuleType("mmengine.logging.history_buffer")
    configs = types.ModuleType("mmengine.config.config")
    exec(
        "class HistoryBuffer:\n"
        "    def mean(self): pass\n"
        "    def __getstate__(self):\n"
        "        return {'log': self.log, 'methods': {'mean': HistoryBuffer.mean}}\n",
        buffers.__dict__,
    )
    exec("class ConfigDict(dict): pass", configs.__dict__)
    with monkeypatch.context() as patch:
        for module in (buffers, configs):
            for name in ("mmengine", module.__name__.rpartition(".")[0]):
                patch.setitem(sys.modules, name, types.ModuleType(name))
            patch.setitem(sys.modules, module.__name__, module)
        buffer = buffers.HistoryBuffer()
        buffer.log = np.arange(3.0)
        settings = configs.ConfigDict(lr=0.01)
        settings.note = "an attribute"
        meta = {"CLASSES": ("cat",), "cfg": settings, "seed": np.int64(3), "best": np.float32(0.5)}
        log = {"log_scalars": {"loss": buffer}, "flag": np.bool_(True), "who": np.array(["a"])}
        save(path, {"meta": meta, "message_hub": log, "state_dict": WEIGHTS}, legacy)


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_of_mmengine_and_numpy_are_not_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    write_with_mmengine(tmp_path / "a.pth", legacy, monkeypatch)
    assert "mmengine" not in sys.modules
    found = read_weights(tmp_path / "a.pth")
    assert found.tensors.keys() == WEIGHTS.keys() and found.class_names == ("cat",)
    assert found.notes == ["entries that hold no weights of the model: message_hub"]
    with pytest.raises(CheckpointError, match="needs the Python module 'mmengine"):
        read_weights(tmp_path / "a.pth", allow_pickle=True)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    marker = tmp_path / "marker"
    path = save(tmp_path / "a.pth", {"state_dict": WEIGHTS, "hook": Trap(marker)}, legacy)
    refusal = r"its pickle would call \S+\..*--allow-pickle.*runs any code"
    with pytest.raises(CheckpointError, match=refusal):
        read_weights(path)
    assert not marker.exists()
    assert read_weights(path, allow_pickle=True).tensors.keys() == WEIGHTS.keys()
    assert marker.read_text() == "run"


def test_the_stand_ins_let_no_other_code_through(tmp_path: Path) -> None:
    """`builtins.getattr` is replaced, not allowed: what it would have found cannot be called."""

    class Sneaky:
        def __reduce__(self) -> Any:
            return getattr(Path, "write_text"), (tmp_path / "marker", "run")  # noqa: B009

    content = {"state_dict": WEIGHTS, "x": Sneaky()}
    path = tmp_path / "a.pth"
    with path.open("wb") as file:
        torch.save(content, file, pickle_protocol=2)
    with pytest.raises(CheckpointError):
        read_weights(path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<!DOCTYPE html>", r"it begins with b'<!DOCTYPE html>'"),
        (b"version https://git-lfs", "cannot be read as a checkpoint: it begins with"),
        (b"", "cannot be read as a checkpoint: it begins with"),
        (b"PK\x03\x04 and then nothing", "cannot be read"),
        (pickle.dumps(3, protocol=4)[:3], "may be damaged|is damaged"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, message: str, allow: bool) -> None:
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"a\.pth.*({message})"):
        read_weights(tmp_path / "a.pth", allow_pickle=allow)


def test_damage_is_not_blamed_on_the_protection(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps(3, protocol=4)[:3])
    with pytest.raises(CheckpointError, match=r"cannot be read .* it may be damaged") as caught:
        read_weights(tmp_path / "a.pth", allow_pickle=True)
    assert "--allow-pickle" not in str(caught.value)
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(CheckpointError, match=r"cannot be read .* it may be damaged") as caught:
        read_weights(tmp_path / "a.pth")
    assert "--allow-pickle" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_is_refused(tmp_path: Path, legacy: bool) -> None:
    path = save(tmp_path / "a.pth", {"w": torch.zeros(5000)}, legacy)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        read_weights(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*a\.pth"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        (torch.zeros(2), "holds a Tensor"),
        ({}, "no state dict of tensors: it is empty"),
        ({"state_dict": {}}, "it is empty"),
        ({"a": torch.zeros(1), "b": 3}, r"it has b \(int\)"),
        ({3: torch.zeros(1)}, r"it has 3 \(Tensor\)"),
        ({f"k{i}": i for i in range(9)}, r"k4 \(int\) and 4 more"),
        ({"a": torch.tensor([1.0, float("nan")])}, "not finite: a"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_weights(save(tmp_path / "a.pth", content))


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    state = {"a": torch.ones(2, dtype=torch.float16), "b": torch.ones(2), "n": torch.tensor(1)}
    found = read_weights(save(tmp_path / "a.pth", state))
    assert [t.dtype for t in found.tensors.values()] == [torch.float32, torch.float32, torch.int64]
    assert found.notes == ["1 tensors are converted to float32"]


def test_our_own_checkpoint_needs_no_import(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "a.pt", tiny_config())
    with pytest.raises(OwnCheckpointError, match="solo-export read it as it is"):
        read_weights(tmp_path / "a.pt")
