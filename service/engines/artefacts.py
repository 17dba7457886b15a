"""The files of a model version, each verified against its SHA-256 when it is read."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.model_config import FileSpec
from service.errors import ModelRefused

ONNX_FILE = "model.onnx"
EXITS_FILE = "model.exits.onnx"
"""The same network with early exits, which the CPU prefers."""
MAX_GRAPH_BYTES = 2**31 - 1
"""Of an ONNX file: the limit of protobuf. Larger networks have data files beside the graph."""
_CHUNK_BYTES = 1 << 20
# Files with other suffixes are external data of the graphs.
_ARTEFACT_SUFFIXES = (".onnx", ".pt2", ".json")


def open_file(path: Path) -> BinaryIO:
    """Opens a regular file for reading, without waiting.

    Raises:
        OSError: It cannot be opened, or is not a regular file: reading a FIFO or device may never
            end.
    """
    _require_regular(path, os.stat(path).st_mode)  # opening a device may already have an effect
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
    try:
        _require_regular(path, os.fstat(file.fileno()).st_mode)
    except OSError:
        file.close()
        raise
    return file


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {_describe_type(mode)}, not a regular file", str(path))


def _describe_type(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def read_file(path: Path, max_bytes: int) -> bytes:
    """Reads a regular file whose size is checked first.

    Raises:
        OSError: It cannot be read, is not a regular file, or is larger.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, max_bytes) + 1)
    if max(size, len(data)) > max_bytes:
        raise OSError(
            errno.EFBIG, f"it has {max(size, len(data))} bytes, the limit is {max_bytes}", str(path)
        )
    return data


@dataclass(frozen=True)
class Artefacts:
    """A version's folder and the files listed in config.json.

    Attributes:
        folder: The version's folder.
        files: Size and SHA-256 by file name.

    Raises:
        ModelRefused: No float32 graph is listed, or a file name is a path.
    """

    folder: Path
    files: Mapping[str, FileSpec]

    def __post_init__(self) -> None:
        for name in self.files:
            if Path(name).name != name or name in ("", ".", ".."):
                raise ModelRefused(
                    self.folder / name, "a file name in config.json must not be a path"
                )
        if ONNX_FILE not in self.files and EXITS_FILE not in self.files:
            raise ModelRefused(
                self.folder, f"config.json lists {sorted(self.files)}, but no {ONNX_FILE}"
            )

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read_graph(self, name: str) -> bytes | Path:
        """Verifies a graph and returns it.

        Returns:
            The verified bytes; or the path if the version has external data files, which the
            engine has to read itself.

        Raises:
            ModelRefused: A file is missing or differs from config.json.
        """
        data_files = [file for file in self.files if not file.endswith(_ARTEFACT_SUFFIXES)]
        if not data_files:
            return self._read(name)
        for file in (name, *data_files):
            self._verify(file)
        return self.folder / name

    def verify(self) -> None:
        """Compares every file with config.json.

        Raises:
            ModelRefused: A file is missing or differs.
        """
        for name in self.files:
            self._verify(name)

    def _read(self, name: str) -> bytes:
        path, spec = self.folder / name, self.files[name]
        try:
            with open_file(path) as file:
                self._check_size(name, os.fstat(file.fileno()).st_size)
                if spec.bytes > MAX_GRAPH_BYTES:
                    raise ModelRefused(
                        path, f"has {spec.bytes} bytes, a graph has at most {MAX_GRAPH_BYTES}"
                    )
                data = file.read(spec.bytes + 1)
        except OSError as error:
            raise ModelRefused(path, error.strerror or str(error)) from error
        self._compare(name, len(data), hashlib.sha256(data).hexdigest())
        return data

    def _verify(self, name: str) -> None:
        """Verifies a file in chunks, without holding it in memory."""
        path, digest, size = self.folder / name, hashlib.sha256(), 0
        try:
            with open_file(path) as file:
                self._check_size(name, os.fstat(file.fileno()).st_size)
                while size <= self.files[name].bytes and (chunk := file.read(_CHUNK_BYTES)):
                    digest.update(chunk)
                    size += len(chunk)
        except OSError as error:
            raise ModelRefused(path, error.strerror or str(error)) from error
        self._compare(name, size, digest.hexdigest())

    def _check_size(self, name: str, size: int) -> None:
        path, spec = self.folder / name, self.files[name]
        if size != spec.bytes:
            raise ModelRefused(
                path, f"has {size} bytes, config.json says {spec.bytes}: truncated or modified"
            )

    def _compare(self, name: str, size: int, digest: str) -> None:
        self._check_size(name, size)
        path, spec = self.folder / name, self.files[name]
        if digest != spec.sha256:
            raise ModelRefused(path, f"its SHA-256 is {digest}, config.json says {spec.sha256}")
