from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny import TINY
from training.configs.io import config_to_dict
from training.model.solo import Solo
from training.weights.formats import (
    CheckpointError,
    check_fit,
    list_names,
    load_checkpoint,
    load_model,
    load_weights,
    save_checkpoint,
)


def build() -> Solo:
    torch.manual_seed(0)
    return Solo(TINY.model, TINY.num_classes)


def write(path: Path, **changes: Any) -> Solo:
    model = build()
    state = {"model": model.state_dict(), "ema": {}, "step": 5, **changes}
    save_checkpoint(path, TINY, state)
    return model


def test_round_trip(tmp_path: Path) -> None:
    model = write(tmp_path / "a" / "last.pt")
    config, content = load_checkpoint(tmp_path / "a" / "last.pt")
    assert config == TINY and content["step"] == 5
    for key, value in model.state_dict().items():
        assert torch.equal(content["model"][key], value)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["last.pt"]


def test_the_average_is_what_is_evaluated(tmp_path: Path) -> None:
    model = build()
    average = {k: v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    write(tmp_path / "last.pt", ema=average)
    config, loaded = load_model(tmp_path / "last.pt")
    assert config == TINY and not loaded.training
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, average[key])


def test_without_an_average_the_weights_themselves(tmp_path: Path) -> None:
    model = write(tmp_path / "last.pt")
    _, loaded = load_model(tmp_path / "last.pt")
    assert torch.equal(loaded.head.category_out.weight, model.head.category_out.weight)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere\.pt"):
        load_checkpoint(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 not a zip", b"\x80\x02}q\x00."])
def test_a_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_truncated_file(tmp_path: Path, share: float) -> None:
    path = tmp_path / "last.pt"
    write(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"last\.pt cannot be read"):
        load_checkpoint(path)


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path)


class Dangerous:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "solo-serve checkpoint", "x": Dangerous()}, "bad.pt")
    with pytest.raises(CheckpointError, match=r"bad\.pt"):
        load_checkpoint(Path("bad.pt"))
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.zeros(3)])
def test_a_foreign_checkpoint(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match=r"foreign\.pt is not a solo-serve checkpoint"):
        load_checkpoint(tmp_path / "foreign.pt")


def rewrite(path: Path, **changes: Any) -> None:
    content = torch.load(path, weights_only=True)
    content.update(changes)
    torch.save({k: v for k, v in content.items() if v is not None}, path)


def test_another_format_version(tmp_path: Path) -> None:
    write(tmp_path / "last.pt")
    rewrite(tmp_path / "last.pt", format_version=99)
    with pytest.raises(CheckpointError, match="format version 99, expected 1"):
        load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("key", ["config", "model", "ema"])
def test_an_incomplete_checkpoint(tmp_path: Path, key: str) -> None:
    write(tmp_path / "last.pt")
    rewrite(tmp_path / "last.pt", **{key: None})
    with pytest.raises(CheckpointError, match=f"it has no {key}"):
        load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"shape": 3}, "shape: Unexpected"), ({"num_classes": "many"}, "num_classes: Input should")],
)
def test_a_configuration_that_is_not_valid(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path / "last.pt")
    rewrite(tmp_path / "last.pt", config=config_to_dict(TINY) | changes)
    with pytest.raises(CheckpointError, match=rf"last\.pt: the configuration .*{message}"):
        load_checkpoint(tmp_path / "last.pt")


def test_keys_that_do_not_fit_are_named() -> None:
    state = build().state_dict()
    without = {k: v for k, v in state.items() if k != "head.category_out.bias"}
    with pytest.raises(CheckpointError, match=r"of f\.pt .*missing keys: head\.category_out\.bias"):
        load_weights(build(), without, "f.pt")
    with pytest.raises(CheckpointError, match=r"unexpected keys: fc\.weight"):
        load_weights(build(), state | {"fc.weight": torch.zeros(1)}, "f.pt")
    other = state | {"head.category_out.bias": torch.zeros(9)}
    with pytest.raises(CheckpointError, match=r"category_out\.bias \(9,\), expected \(2,\)"):
        load_weights(build(), other, "f.pt")
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        load_weights(build(), {}, "f.pt")


def test_a_message_lists_five_names() -> None:
    assert list_names("abcde") == "a, b, c, d, e"
    assert list_names(iter("abcdefg")) == "a, b, c, d, e and 2 more"


def test_offsets_among_other_keys_are_explained() -> None:
    more = {"a.conv_offset.bias": torch.zeros(1), "b": torch.zeros(1)}
    expected = r"unexpected keys \(of deformable .* this configuration does not have\): a\."
    with pytest.raises(CheckpointError, match=expected):
        check_fit(more, {}, "f.pt")
    expected = r"missing keys \(of deformable .* the file does not have\): a\.conv_offset\.bias, b"
    with pytest.raises(CheckpointError, match=expected):
        check_fit({}, more, "f.pt")


def test_a_crash_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    write(path)
    before = path.read_bytes()

    def crash(descriptor: int) -> None:
        os.truncate(tmp_path / ".last.pt.partial", 9)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        write(path, step=6)
    assert path.read_bytes() == before
    assert load_checkpoint(path)[1]["step"] == 5


def test_the_content_is_on_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    flush, rename = os.fsync, os.replace

    def flushing(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        flush(descriptor)

    def renaming(source: Path, target: Path) -> None:
        done.append(f"{source.name} -> {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "replace", renaming)
    write(tmp_path / "last.pt")
    assert done == [
        str(tmp_path / ".last.pt.partial"),
        ".last.pt.partial -> last.pt",
        str(tmp_path),
    ]


def test_a_full_disk_is_one_line_and_the_file_before_stays(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    write(path, step=5)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"last\.pt \(.* MB\) cannot be written: File too large; "
        ):
            write(path, step=6)
        with pytest.raises(OSError, match=r"new\.pt \(.*: File too large$"):
            write(tmp_path / "new.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
