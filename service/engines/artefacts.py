"""The files of a model version, each verified against its SHA-256 when it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.model_config import FileSpec
from service.errors import ModelRefused

ONNX_FILE = "model.onnx"
_CHUNK_BYTES = 1 << 20
# Files with other suffixes are external data of the graphs.
_ARTEFACT_SUFFIXES = (".onnx", ".pt2", ".json")


@dataclass(frozen=True)
class Artefacts:
    """A version's folder and the files listed in config.json.

    Attributes:
        folder: The version's folder.
        files: Size and SHA-256 by file name.

    Raises:
        ModelRefused: model.onnx is not listed, or a file name is a path.
    """

    folder: Path
    files: Mapping[str, FileSpec]

    def __post_init__(self) -> None:
        for name in self.files:
            if Path(name).name != name or name in ("", ".", ".."):
                raise ModelRefused(
                    self.folder / name, "a file name in config.json must not be a path"
                )
        if ONNX_FILE not in self.files:
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

    def _read(self, name: str) -> bytes:
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise ModelRefused(self.folder / name, error.strerror or str(error)) from error
        self._compare(name, len(data), hashlib.sha256(data).hexdigest())
        return data

    def _verify(self, name: str) -> None:
        """Verifies a file in chunks, without holding it in memory."""
        path, digest, size = self.folder / name, hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
        except OSError as error:
            raise ModelRefused(path, error.strerror or str(error)) from error
        self._compare(name, size, digest.hexdigest())

    def _compare(self, name: str, size: int, digest: str) -> None:
        path, spec = self.folder / name, self.files[name]
        if size != spec.bytes:
            raise ModelRefused(
                path, f"has {size} bytes, config.json says {spec.bytes}: truncated or modified"
            )
        if digest != spec.sha256:
            raise ModelRefused(path, f"its SHA-256 is {digest}, config.json says {spec.sha256}")
