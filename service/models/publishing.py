"""Changes model_repo so that readers, and whoever stops it half-way, find the old or the new state.

A version is written to `.<version>.part`, which becomes `.<version>.next` when it is complete.
Renaming config.json is what publishes it: from then on `find_artefacts` takes the staged folder,
because its files are those that config.json lists. Then the folder gets its name, and the replaced
one is removed. `recover` finishes or undoes what was interrupted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.repository_config import RepositoryConfig, parse_model_config
from pipeline.strict_json import parse_json
from service.engines.artefacts import Artefacts, read_file
from service.errors import ModelRefused
from service.files import locked, replace_bytes, sync_folder
from service.models.folders import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    SETTINGS_FILE,
    RepositorySettings,
    read_repository_config,
    refusing,
    staged_folder,
)

_STAGED = re.compile(r"\.([1-9][0-9]*)\.(?:part|next|prev)")


def format_json(content: Any) -> bytes:
    """JSON as it is written in the repository."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def write_version(
    folder: Path, version: int, files: Mapping[str, bytes], config: bytes, *, keep: bool = False
) -> None:
    """Publishes a version; the repository is `locked`, and the model's folder recovered.

    Args:
        folder: The model's, which may not exist yet.
        version: The version's number.
        files: Content by name.
        config: New content of config.json.
        keep: Whether the files that the version has already stay, unless `files` replaces them.
    """
    is_new = not folder.exists()
    home = folder.with_name(f".{folder.name}.next") if is_new else folder
    part = home / str(version) if is_new else _partial_folder(folder, version)
    try:
        target = folder / str(version)
        if keep and target.is_dir():
            shutil.copytree(target, part, symlinks=True, copy_function=_link)
        else:
            part.mkdir(parents=True)
        for name, data in files.items():
            replace_bytes(part / name, data)
        if not is_new:
            os.replace(part, staged_folder(folder, version))
        sync_folder(home)
        replace_bytes(home / CONFIG_FILE, config)
    except BaseException:
        with suppress(OSError):
            recover(folder)
        raise
    if is_new:
        os.replace(home, folder)
        sync_folder(folder.parent)
    else:
        _take_staged(folder, version)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _take_staged(folder: Path, version: int) -> None:
    """Gives a staged version its name."""
    target, replaced = folder / str(version), _replaced_folder(folder, version)
    if target.exists():
        os.replace(target, replaced)
    os.replace(staged_folder(folder, version), target)
    sync_folder(folder)
    _remove(replaced)


def _partial_folder(folder: Path, version: int) -> Path:
    return folder / f".{version}.part"


def _replaced_folder(folder: Path, version: int) -> Path:
    return folder / f".{version}.prev"


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def recover(folder: Path) -> None:
    """Finishes or undoes what was interrupted in a model's folder; the repository is locked.

    A staged version whose files are those that config.json lists was published; others were not.
    """
    _remove(folder.with_name(f".{folder.name}.next"))
    if not folder.is_dir():
        return
    found = [match for path in folder.iterdir() if (match := _STAGED.fullmatch(path.name))]
    for version in sorted({int(match[1]) for match in found}):
        staged, replaced = staged_folder(folder, version), _replaced_folder(folder, version)
        if _is_published(folder, version, staged):
            _take_staged(folder, version)
        elif replaced.exists() and not (folder / str(version)).exists():
            os.replace(replaced, folder / str(version))
        for left in (staged, replaced, _partial_folder(folder, version)):
            _remove(left)
    for partial in folder.glob(".*.partial"):
        partial.unlink()


def _is_published(folder: Path, version: int, staged: Path) -> bool:
    try:
        config = read_repository_config(folder).for_version(version)
        Artefacts(staged, config.files).verify()
    except (OSError, ConfigError, ModelRefused):
        return False
    return True


def edit_config(folder: Path, change: Callable[[dict[str, Any], RepositoryConfig], None]) -> None:
    """Changes config.json of a model.

    Args:
        folder: The model's.
        change: Changes the content; the parsed content is passed too.

    Raises:
        ModelRefused: config.json is wrong, or would be.
        OSError: It cannot be written.
    """
    file = folder / CONFIG_FILE
    with locked(folder.parent):
        with refusing(file):
            text = read_file(file, MAX_CONFIG_BYTES)
            parsed = parse_model_config(text)
        recover(folder)
        content = parse_json(text)
        change(content, parsed)
        with refusing(file):
            _ = parse_model_config(json.dumps(content)).served_versions
        replace_bytes(file, format_json(content))


def write_default(root: Path, name: str | None) -> None:
    """Makes a model the default of the repository; None: no model.

    Raises:
        OSError: repository.json cannot be written.
    """
    settings = RepositorySettings(default_model=name)
    with locked(root):
        replace_bytes(root / SETTINGS_FILE, format_json(settings.model_dump()))
