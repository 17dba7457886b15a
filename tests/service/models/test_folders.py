"""What is read of a repository besides the models' files."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from service.engines.base import BackendError
from service.errors import (
    DeviceError,
    ModelRefused,
    RepositoryUnreadable,
    StartupError,
    UnknownModel,
)
from service.models.folders import (
    explain_refusal,
    find_default,
    find_folder,
    find_models,
    find_published,
    list_models,
    read_default,
    read_repository_config,
    read_stamps,
    refusing,
)
from service.models.publishing import write_default
from tests.support.blob_model import publish


def test_models_are_folders_by_name_and_links_that_lead_nowhere(tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    assert [path.name for path in list_models(tmp_path)] == ["a", "b", "gone", "linked", "loop"]


def test_a_start_needs_a_folder_with_models_unless_they_may_come_later(tmp_path: Path) -> None:
    assert find_models(tmp_path, may_be_empty=True) == []
    with pytest.raises(StartupError, match="no model folders"):
        find_models(tmp_path)
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(StartupError, match="is not a folder"):
            find_models(wrong, may_be_empty=True)


def test_the_default_is_the_recorded_model_or_the_only_one(tmp_path: Path) -> None:
    assert find_default(tmp_path) is None
    publish(tmp_path, "a")
    (tmp_path / "lost+found").mkdir()
    assert find_default(tmp_path) == "a"
    publish(tmp_path, "b")
    assert find_default(tmp_path) is None
    assert [path.name for path in find_published(tmp_path)] == ["a", "b"]
    write_default(tmp_path, "b")
    assert find_default(tmp_path) == "b"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "valid dictionary"),
        ('{"default_model": "../x"}', "default_model: String should match"),
        ('{"default": "a"}', "default: Extra inputs"),
        ("[" * 100_000, "nested deeper"),
    ],
)
def test_a_wrong_repository_json_is_refused_with_the_reason(
    tmp_path: Path, text: str, reason: str
) -> None:
    (tmp_path / "repository.json").write_text(text)
    with pytest.raises(ModelRefused, match=reason) as caught:
        read_default(tmp_path)
    assert caught.value.file.name == "repository.json"


def test_a_repository_json_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "repository.json")
    with pytest.raises(ModelRefused, match="a FIFO"):
        read_default(tmp_path)


def test_a_config_that_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(file))
        with pytest.raises(OSError, match="a socket, not a regular file"):
            read_repository_config(tmp_path)


def test_a_folder_is_looked_up_by_its_printable_name(tmp_path: Path) -> None:
    folder = publish(tmp_path, "a")
    os.mkdir(os.fsencode(tmp_path) + b"/b\xff")
    assert find_folder(tmp_path, "a") == folder
    assert os.fsencode(find_folder(tmp_path, "b\\udcff")).endswith(b"/b\xff")
    for name in ("..", ".", "", "a/1", "c"):
        with pytest.raises(UnknownModel):
            find_folder(tmp_path, name)
    with pytest.raises(RepositoryUnreadable, match="cannot be read: No such file"):
        find_folder(tmp_path / "missing", "a")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConfigError("wrong"), "wrong"),
        (BackendError("fails"), "fails"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (MemoryError(), "MemoryError: "),
        (ValueError("x\ny\udc80"), "ValueError: x\\ny\\udc80"),
    ],
)
def test_whatever_fails_refuses_the_model(error: Exception, reason: str) -> None:
    with pytest.raises(ModelRefused) as caught, refusing(Path("a/config.json")):
        raise error
    assert (caught.value.file, caught.value.reason) == (Path("a/config.json"), reason)
    assert str(caught.value) == f"a/config.json: {reason}"


def test_a_refusal_and_a_missing_device_are_passed_on() -> None:
    for error in (ModelRefused(Path("b"), "known"), DeviceError("no GPU")):
        with pytest.raises(type(error)) as caught, refusing(Path("a")):
            raise error
        assert caught.value is error


def test_a_refusal_is_explained_without_the_folders_above() -> None:
    root = Path("/srv/models")
    assert explain_refusal(ModelRefused(root / "a" / "x\n", "bad"), root) == "a/x\\n: bad"
    assert explain_refusal(ModelRefused(Path("/other"), "bad"), root) == "/other: bad"
    assert explain_refusal(DeviceError("no GPU"), root) == "no GPU"


def test_stamps_tell_every_change_of_a_model(tmp_path: Path) -> None:
    folder = publish(tmp_path, "a")
    (tmp_path / "empty").mkdir()
    config, graph = folder / "config.json", folder / "1" / "model.onnx"

    def stamp() -> tuple[object, object]:
        (found,) = read_stamps(list_models(tmp_path)).values()
        return found.config, found.files

    seen = [stamp()]
    assert stamp() == seen[0]
    config.chmod(0o600)
    seen.append(stamp())
    copy = folder / "copy"
    copy.write_bytes(config.read_bytes())
    os.replace(copy, config)
    seen.append(stamp())
    assert len({repr(config) for config, _ in seen}) == 3
    assert len({repr(files) for _, files in seen}) == 1
    graph.write_bytes(graph.read_bytes() + b"x")
    assert stamp()[0] == seen[-1][0] and stamp()[1] != seen[-1][1]
    config.unlink()
    assert read_stamps(list_models(tmp_path)) == {}
    config.symlink_to(config)
    assert len(read_stamps(list_models(tmp_path))) == 1
