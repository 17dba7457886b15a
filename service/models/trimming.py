"""Removes from a repository the files that no server on a CPU reads: half of the bundled models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.repository_config import RepositoryConfig
from service.engines.choose import list_cpu_files
from service.models.folders import find_artefacts
from service.models.publishing import edit_config
from service.models.repository import read_config


def trim_model(folder: Path) -> int:
    """Leaves of each version what engines on a CPU may read; config.json lists no more than that.

    Args:
        folder: The model's.

    Returns:
        Bytes of the files that were removed.

    Raises:
        ModelRefused: config.json is wrong, or a file is missing or damaged; nothing has changed.
        OSError: A file cannot be written or removed.
    """
    removed: dict[Path, int] = {}

    def change(content: dict[str, Any], before: RepositoryConfig) -> None:
        for version in before.version_numbers:
            config = read_config(folder, version)
            artefacts = find_artefacts(folder, config)
            artefacts.verify()
            kept = list_cpu_files(config.files)
            files = content["versions"][str(version)]["files"]
            for name in config.files.keys() - kept:
                del files[name]
                removed[artefacts.folder / name] = config.files[name].bytes

    edit_config(folder, change)
    for file in removed:  # not listed any more, so it is no fault if this is interrupted
        file.unlink()
    return sum(removed.values())
