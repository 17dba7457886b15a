"""The layout of model_repo: what is read of it besides the models' files.

<model_repo>/repository.json               the default model, if one was chosen
<model_repo>/<model>/config.json
<model_repo>/<model>/<version>/model.onnx  and other files
<model_repo>/<model>/.<version>.next/      a version that is being published, see `publishing`
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.model_config import ModelConfig, ModelName, Spec
from pipeline.repository_config import RepositoryConfig, parse_model_config
from pipeline.strict_json import parse_json
from service.engines.artefacts import Artefacts, read_file
from service.engines.base import BackendError
from service.errors import (
    DeviceError,
    ModelRefused,
    RepositoryUnreadable,
    StartupError,
    UnknownModel,
    make_printable,
)

CONFIG_FILE = "config.json"
SETTINGS_FILE = "repository.json"
MAX_CONFIG_BYTES = 1024 * 1024
FileStamp = tuple[int, ...]


class RepositorySettings(Spec):
    """repository.json."""

    default_model: ModelName | None = None


@dataclass(frozen=True)
class Stamp:
    """What tells a changed model: inode, size and times, or the error number, of its files.

    Attributes:
        config: Of config.json.
        files: Of all files of its versions, by path.
    """

    config: FileStamp
    files: Mapping[str, FileStamp | None]


@contextmanager
def refusing(file: Path) -> Iterator[None]:
    """Whatever fails within refuses one model, with `file` and the reason; not a missing device.

    Raises:
        ModelRefused, DeviceError
    """
    try:
        yield
    except (ModelRefused, DeviceError):
        raise
    except OSError as error:
        raise ModelRefused(file, error.strerror or str(error)) from error
    except (ConfigError, BackendError) as error:
        raise ModelRefused(file, str(error)) from error
    except Exception as error:
        raise ModelRefused(file, f"{type(error).__name__}: {error}") from error


def list_models(root: Path) -> list[Path]:
    """Folders of `root` by name, and links that lead nowhere; hidden ones are skipped.

    Raises:
        OSError: `root` cannot be read.
    """
    with os.scandir(root) as entries:
        return sorted(root / entry.name for entry in entries if _may_be_model(entry))


def _may_be_model(entry: os.DirEntry[str]) -> bool:
    try:
        return not entry.name.startswith(".") and stat.S_ISDIR(entry.stat().st_mode)
    except OSError:
        return True  # reading config.json gives the reason


def find_models(root: Path, *, may_be_empty: bool = False) -> list[Path]:
    """As `list_models`, for a start.

    Raises:
        StartupError: `root` is not a readable folder, or is empty and must not be.
    """
    try:
        folders = list_models(root)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StartupError(f"model repository {str(root)!r} is not a folder") from error
    except OSError as error:
        raise StartupError(f"model repository {str(root)!r}: {error.strerror}") from error
    if not folders and not may_be_empty:
        raise StartupError(f"model repository {str(root)!r} has no model folders")
    return folders


def find_folder(root: Path, name: str) -> Path:
    """A model's folder by a name from outside: looked up, never joined into a path.

    Raises:
        UnknownModel: There is no such folder.
        RepositoryUnreadable: `root` cannot be read.
    """
    try:
        folders = list_models(root)
    except OSError as error:
        reason = error.strerror or error
        raise RepositoryUnreadable(f"the model repository cannot be read: {reason}") from error
    for folder in folders:
        if make_printable(folder.name) == name:
            return folder
    raise UnknownModel(f"the repository has no folder {name!r}")


def explain_refusal(error: ModelRefused | DeviceError, root: Path) -> str:
    """Why a model is refused, without the folders above the repository."""
    if isinstance(error, DeviceError):
        return str(error)
    is_inside = error.file.is_relative_to(root)
    file = error.file.relative_to(root) if is_inside else error.file
    return f"{make_printable(str(file))}: {error.reason}"


def read_repository_config(folder: Path) -> RepositoryConfig:
    """Reads config.json of a model's folder.

    Raises:
        OSError, ConfigError: It cannot be read, or is wrong.
    """
    return parse_model_config(read_file(folder / CONFIG_FILE, MAX_CONFIG_BYTES))


def read_default(root: Path) -> str | None:
    """The default model that repository.json names; None if it or the file is missing.

    Raises:
        ModelRefused: The file cannot be read, or is wrong.
    """
    file = root / SETTINGS_FILE
    try:
        content = parse_json(read_file(file, MAX_CONFIG_BYTES))
        return RepositorySettings.model_validate(content).default_model
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelRefused(file, error.strerror or str(error)) from error
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        first = f"{'.'.join(map(str, faults[0]['loc']))}: {faults[0]['msg']}"
        raise ModelRefused(file, first[:1000]) from error
    except ValueError as error:
        raise ModelRefused(file, str(error)) from error


def find_default(root: Path) -> str | None:
    """The model of requests that name none: the one that repository.json names, or the only one.

    Raises:
        StartupError: `root` or repository.json cannot be read.
    """
    names = [folder.name for folder in find_published(root)]
    recorded = read_default(root)
    return names[0] if recorded is None and len(names) == 1 else recorded


def find_published(root: Path) -> list[Path]:
    """Folders that have a config.json, readable or not.

    Raises:
        StartupError: `root` cannot be read.
    """
    folders = find_models(root, may_be_empty=True)
    return [folder for folder in folders if _stamp(folder / CONFIG_FILE) is not None]


def staged_folder(folder: Path, version: int) -> Path:
    """Where a version is written before config.json lists it."""
    return folder / f".{version}.next"


def find_artefacts(folder: Path, config: ModelConfig) -> Artefacts:
    """The files of a version, where they are if publishing was interrupted.

    Raises:
        ModelRefused: No float32 graph is listed, or a file name is a path.
    """
    published = Artefacts(folder / str(config.version), config.files)
    staged = Artefacts(staged_folder(folder, config.version), config.files)
    if staged.folder.is_dir():
        with suppress(ModelRefused):  # config.json does not list it yet
            staged.verify()
            return staged
    return published


def read_stamps(folders: Iterable[Path]) -> dict[str, Stamp]:
    """Stamps of the models that have a config.json, by the printable name of the folder."""
    stamps = {}
    for folder in folders:
        config = _stamp(folder / CONFIG_FILE)
        if config is not None:
            stamps[make_printable(folder.name)] = Stamp(config, _stamp_files(folder))
    return stamps


def _stamp(path: Path) -> FileStamp | None:
    """A file's stamp; None if it is missing."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return (error.errno or 0,)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _stamp_files(folder: Path) -> dict[str, FileStamp | None]:
    paths: list[Path] = []
    for pattern in ("[0-9]*/*", ".[0-9]*.next/*"):
        with suppress(OSError):
            paths += folder.glob(pattern)
    return {str(path.relative_to(folder)): _stamp(path) for path in paths}
