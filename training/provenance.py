"""Where a checkpoint comes from: the command, the commit and the data of its training."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.data.coco import CocoDataset
from training.data.digest import data_digest

UNKNOWN = "unknown"


def describe_command(program: str, arguments: Sequence[str]) -> str:
    """The command as text, with absolute paths reduced to file names."""
    parts = [Path(a).name if Path(a).is_absolute() else a for a in arguments]
    return shlex.join([program, *parts])


def find_commit() -> str | None:
    """Commit of the sources, with "-dirty" if modified; None outside a git checkout."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        found = subprocess.run(
            [*command, "--exclude", "*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() or None


def describe_data(data: CocoDataset, split: str) -> dict[str, Any]:
    """Name, extent and hash of a split.

    Raises:
        OSError: An image is missing.
    """
    return {
        "split": split,
        "images": len(data),
        "objects": data.report.objects,
        "sha256": data_digest(data),
    }


def describe_training(data: CocoDataset, split: str, command: str | None) -> dict[str, Any]:
    """What a checkpoint records of the run that writes it."""
    return {
        "command": command or UNKNOWN,
        "commit": find_commit() or UNKNOWN,
        "data": describe_data(data, split),
    }
