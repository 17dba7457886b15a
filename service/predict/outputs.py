"""Where a run writes, checked before the work."""

from __future__ import annotations

import errno
import io
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.types import UInt8
from service.errors import StartupError
from service.files import replace_bytes
from service.jobs.errors import ImageUnusable, RunFailed, describe
from service.jobs.files import as_line
from service.jobs.pictures import mark_picture

START = b"[\n"
"""Of a file with results; the first result or the end of the list follows."""
_JOURNAL = ".partial"
UNFINISHED = ".partial-new"
REPLACED = ".partial-old"
"""Ends of the names of a folder that is written, and of one that it replaces."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of writing that every image would get."""
RESULT_STARTS = (START + b'{"image_id":', START + b"]")


@dataclass(frozen=True)
class Outputs:
    """The files and the folder that a run writes.

    Attributes:
        out: The file with the results, or the folder of `is_folder`.
        overlays: Folder for pictures, or None.
        is_folder: Whether the results are a folder of files.
    """

    out: Path
    overlays: Path | None
    is_folder: bool = False

    @property
    def journal(self) -> Path:
        """The results while the run is not complete."""
        return self.out.with_name(self.out.name + _JOURNAL)

    def name_own(self) -> dict[Path, str]:
        """What these paths, which may exist, are."""
        names = [f"{self.out.name}{end}" for end in ("", _JOURNAL, f"{_JOURNAL}-wal")]
        own = dict.fromkeys(map(self.out.with_name, names), "a file that this command writes")
        if self.is_folder:
            folders = [f"{self.out.name}{end}" for end in ("", UNFINISHED, REPLACED)]
            own |= dict.fromkeys(map(self.out.with_name, folders), "the folder of --out")
        return own if self.overlays is None else {**own, self.overlays: "the folder of --overlays"}

    def create(self) -> None:
        """Makes the folders.

        Raises:
            OSError: They cannot be made, or the pictures' folder cannot be written.
        """
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if self.overlays is not None:
            self.overlays.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.overlays).close()
        if self.out.is_dir() and not self.is_folder:
            raise StartupError(f"--out {self.out} is a folder")


def encode_picture(pixels: UInt8) -> bytes:
    """A PNG of pixels [H, W, 3] that a later run does not take for an image."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=mark_picture())
    return file.getvalue()


def write_picture(path: Path, picture: bytes) -> None:
    """Writes a picture with masks.

    Raises:
        ImageUnusable: It cannot be written.
        RunFailed: No picture could be.
    """
    try:
        replace_bytes(path, picture, durable=False)
    except OSError as error:
        kind = RunFailed if error.errno in _FULL else ImageUnusable
        raise kind(f"cannot write {as_line(path)}: {describe(error)}") from error


def check_outputs(
    out: Path, overlays: Path | None, starts: tuple[bytes, ...] | None = RESULT_STARTS
) -> Outputs:
    """The outputs that a command names; links to files are followed.

    Args:
        out: The file with the results.
        overlays: Folder for pictures, or None.
        starts: What a file begins with that may be replaced; None: `out` is a folder.

    Raises:
        StartupError: `out` is not a file, or not one with results, which could be replaced; or
            `overlays` is not a folder.
    """
    if starts is not None:
        _check_file(out, starts)
    if overlays is not None and overlays.exists() and not overlays.is_dir():
        raise StartupError(f"--overlays {overlays} is not a folder")
    return Outputs(Path(os.path.realpath(out)), overlays, is_folder=starts is None)


def _check_file(out: Path, starts: tuple[bytes, ...]) -> None:
    try:
        status = out.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise StartupError(f"--out {out}: {describe(error)}") from error
    if stat.S_ISDIR(status.st_mode):
        raise StartupError(f"--out {out} is a folder (directory); name a file in it")
    if not stat.S_ISREG(status.st_mode):
        raise StartupError(f"--out {out} is not a regular file")
    if not os.access(out, os.W_OK):
        raise StartupError(f"--out {out} is not writable")
    with open(out, "rb") as file:
        start = file.read(max(map(len, starts)))
    if start.strip() and not start.startswith(starts):
        raise StartupError(
            f"--out {out} exists and was not written by this command; remove it or name another"
        )
