"""Publishes a version in model_repo: its files, and config.json with their SHA-256.

    <model_repo>/<name>/config.json
    <model_repo>/<name>/<version>/model.onnx, parity.json
    <model_repo>/<name>/<version>/model.<variant>.<ext>, parity.<variant>.json

Servers, and whoever interrupts it, find the old or the new state, see `service.models.publishing`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.config_json import (
    add_version,
    describe_file,
    read_repository,
    read_version,
    replace_files,
)
from export.errors import GraphError, PublishError
from export.gpu_graph import GPU_FILES, require_gpu_graph
from pipeline.model_config import FileSpec, ModelConfig
from service.files import locked
from service.models.repository import (
    CONFIG_FILE,
    ONNX_FILE,
    find_default,
    format_json,
    read_default,
    recover,
    write_default,
    write_version,
)
from training.weights.formats import WEIGHTS_FILE

PARITY_FILE = "parity.json"
ARTEFACT_NAME = re.compile(r"model(\.[a-z0-9_]+){2,}")


@dataclass(frozen=True)
class Artefact:
    """A file of a version other than model.onnx, with its report.

    Attributes:
        name: model.<variant>.<ext>, e.g. model.int8.onnx.
        data: Content of the file.
        parity: Parity report; must have passed.

    Raises:
        PublishError: The name does not have this form.
    """

    name: str
    data: bytes
    parity: dict[str, Any]

    def __post_init__(self) -> None:
        if ARTEFACT_NAME.fullmatch(self.name) is None:
            raise PublishError(f"{self.name!r} does not have the form model.<variant>.<ext>")

    @property
    def parity_name(self) -> str:
        """parity.<variant>.json, e.g. parity.int8.json."""
        return f"parity.{self.name.removeprefix('model.').rpartition('.')[0]}.json"


@dataclass(frozen=True)
class Release:
    """A version to publish.

    Attributes:
        config: Includes version number, graph hash and provenance.
        graph: Content of model.onnx.
        parity: Its parity report; must have passed.
        artefacts: Additional files; added to `config` by `publish`.
        weights: weights.pt, described in the provenance; None: the version has none.
        reports: Further files by name, which servers do not read.
    """

    config: ModelConfig
    graph: bytes
    parity: dict[str, Any]
    artefacts: tuple[Artefact, ...] = ()
    weights: bytes | None = None
    reports: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """The version number, also the name of its folder."""
        return self.config.version


def next_version(folder: Path) -> int:
    """One more than the highest version in config.json or as a folder."""
    repository = read_repository(folder)
    existing = list(repository.version_numbers) if repository else []
    if folder.is_dir():
        existing += [int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdecimal()]
    return max(existing, default=0) + 1


def require_free(root: Path, name: str, version: int, *, force: bool = False) -> None:
    """Checks that a version may be written.

    Raises:
        PublishError: It already exists and `force` is False.
    """
    repository = read_repository(root / name)
    listed = repository is not None and version in repository.version_numbers
    target = root / name / str(version)
    if (listed or target.exists()) and not force:
        raise PublishError(f"{target} already exists; choose another version or use --force")


def publish(root: Path, release: Release, *, force: bool = False) -> Path:
    """Writes a version.

    Args:
        root: model_repo; created if necessary.
        release: The version.
        force: Replace the version if it exists.

    Returns:
        The version's folder.

    Raises:
        PublishError: A parity report has not passed, a graph cannot run on GPUs, the version
            already exists, or the existing config.json is invalid. Nothing is changed then.
        OSError: It cannot be written.
    """
    folder = root / release.config.name
    target = folder / str(release.version)
    _require_passed(target / ONNX_FILE, release.parity)
    for artefact in release.artefacts:
        _require_passed(target / artefact.name, artefact.parity)
    if describe_file(release.graph) != release.config.files[ONNX_FILE].model_dump():
        raise PublishError(
            f"{target} is not published: {ONNX_FILE} differs from its entry in config.json"
        )
    _require_gpu_graphs(target, {ONNX_FILE: release.graph} | _name_files(release.artefacts))
    require_free(root, release.config.name, release.version, force=force)
    config = _list_artefacts(release.config, release.artefacts)
    add_version(folder, config)  # an invalid config.json fails before anything is written
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        recover(folder)
        require_free(root, release.config.name, release.version, force=force)
        content = format_json(add_version(folder, config))
        write_version(folder, release.version, _list_files(release), content)
    return target


def _list_files(release: Release) -> dict[str, bytes]:
    """Content of a version's files by name."""
    files = {ONNX_FILE: release.graph, PARITY_FILE: format_json(release.parity)}
    files |= release.reports
    if release.weights is not None:
        files[WEIGHTS_FILE] = release.weights
    return files | _name_files(release.artefacts)


def _name_files(artefacts: Sequence[Artefact]) -> dict[str, bytes]:
    files = {}
    for artefact in artefacts:
        files[artefact.parity_name] = format_json(artefact.parity)
        files[artefact.name] = artefact.data
    return files


def keep_default(root: Path, name: str) -> str | None:
    """Makes the only model of a repository its default before another one, `name`, is published.

    Requests that name no model are answered by the only one; they would be refused otherwise.

    Returns:
        The model's name, if it has become the default.
    """
    if not root.is_dir() or read_default(root) is not None:
        return None
    default = find_default(root)
    if default is None or default == name:
        return None
    write_default(root, default)
    return default


def describe_served(target: Path, kept: str | None = None, image: Path | None = None) -> list[str]:
    """What servers do with a version that was published, and how to ask for it.

    Args:
        target: The version's folder.
        kept: What `keep_default` returned before.
        image: An image for the example.
    """
    folder, root = target.parent, target.parent.parent
    name, version, where = folder.name, int(target.name), f"--model-repo {shlex.quote(str(root))}"
    lines = []
    repository = read_repository(folder)
    served = [] if repository is None else repository.served_versions
    if version not in served:
        lines.append(
            f"warning: {CONFIG_FILE} serves version {', '.join(map(str, served))} of {name}, not "
            f"{version}; to serve it: solo-models serve {name} {version} {where}"
        )
    else:
        lines.append(f"version {version} of {name} is served")
    default = find_default(root)
    if kept is not None:
        lines.append(f"{kept} was the only model and is now recorded as the default")
    if default is None:
        lines.append(
            "warning: requests that name no model are refused, because several are served; to "
            f"choose the default: solo-models default {name} {where}"
        )
    else:
        lines.append(f"requests that name no model are answered by {default}")
    if version in served:
        query = f"model={name}" + (f"&version={version}" if version != max(served) else "")
        file = shlex.quote(f"images=@{image or 'IMAGE'}")
        lines += [
            f"to serve it: solo-serve {where}",
            f"to ask it: curl -F {file} 'http://localhost:8000/segment?{query}'",
            "and in the browser: http://localhost:8000",
        ]
    return lines


def add_artefacts(
    folder: Path, version: int, artefacts: Sequence[Artefact], *, force: bool = False
) -> None:
    """Adds files to a published version.

    Args:
        folder: The model's folder in model_repo.
        version: Version number.
        artefacts: The files.
        force: Replace files that config.json already lists.

    Raises:
        PublishError: The version does not exist, a report has not passed, a graph cannot run on
            GPUs, or a file is already listed. Nothing is changed then.
    """
    target = folder / str(version)
    for artefact in artefacts:
        _require_passed(target / artefact.name, artefact.parity)
    _require_gpu_graphs(target, _name_files(artefacts))
    read_version(folder, version)
    with locked(folder.parent):
        recover(folder)
        current = read_version(folder, version)
        listed = sorted({artefact.name for artefact in artefacts} & set(current.files))
        if listed and not force:
            raise PublishError(f"{target / listed[0]} already exists; --force replaces it")
        config = replace_files(folder, _list_artefacts(current, artefacts))
        write_version(folder, version, _name_files(artefacts), format_json(config), keep=True)


def _require_passed(file: Path, parity: dict[str, Any]) -> None:
    if parity.get("passed") is not True:
        raise PublishError(f"{file} is not published: its parity report has not passed")


def _require_gpu_graphs(target: Path, files: Mapping[str, bytes]) -> None:
    for name in sorted(GPU_FILES.intersection(files)):
        try:
            require_gpu_graph(files[name])
        except GraphError as error:
            raise PublishError(f"{target / name} is not published: {error}") from error


def _list_artefacts(config: ModelConfig, artefacts: Sequence[Artefact]) -> ModelConfig:
    """The configuration with the files, and with what their precisions cost, if measured."""
    added = {a.name: FileSpec.model_validate(describe_file(a.data)) for a in artefacts}
    ap_cost = dict(config.ap_cost)
    for artefact in artefacts:
        measured, precision = artefact.parity.get("AP"), artefact.parity.get("precision")
        if precision is not None:
            ap_cost.pop(precision, None)  # of the file that is replaced
            if measured is not None:
                ap_cost[precision] = round(measured["fp32"] - measured["variant"], 4)
    return config.model_copy(update={"files": {**config.files, **added}, "ap_cost": ap_cost})
