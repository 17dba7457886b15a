"""solo-models: what a model repository serves, and how to change it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from pipeline.errors import ConfigError
from pipeline.model_config import Precision
from pipeline.repository_config import RepositoryConfig, ShadowedVersion, parse_model_config
from service.engines.choose import exits_file, graph_file
from service.errors import ModelRefused, StartupError, make_printable
from service.models.folders import (
    explain_refusal,
    find_artefacts,
    find_default,
    find_published,
    read_repository_config,
    refusing,
)
from service.models.publishing import edit_config, write_default
from service.models.repository import CONFIG_FILE, read_config
from service.models.trimming import trim_model

EPILOG = """\
examples:
  solo-models list                     versions, what is served, whether the files are intact
  solo-models default nuclei           requests that name no model are answered by nuclei
  solo-models serve nuclei 1 3         serve these versions, whatever is published later
  solo-models serve nuclei latest      serve the highest version again
  solo-models shadow nuclei 3          compare version 3 with the one that is served
  solo-models rollback nuclei          serve the version before the one that is served
  solo-models trim                     remove the files that no server on a CPU reads

Changes are written in one step. A server that watches the repository (SOLO_MODEL_POLL_S) takes
them up; any other when the model is loaded again.
"""
POLICIES = ("latest", "all")
SHADOW_OPTIONS = ("share", "images", "promote_at", "reject_below", "max_failures", "max_slowdown")


@dataclass(frozen=True)
class VersionEntry:
    """A line of `solo-models list`.

    Attributes:
        model: The model's name.
        version: None if config.json cannot be read.
        is_served: Whether config.json wants it served.
        is_default: Whether it answers requests that name no model.
        precisions: Those that it has a graph of.
        wanted_precision: The one that config.json asks for; None: the server's.
        size_bytes: Of all its files.
        fault: Why it cannot be served; empty if all files are those that config.json lists.
    """

    model: str
    version: int | None
    is_served: bool = False
    is_default: bool = False
    precisions: tuple[str, ...] = ()
    wanted_precision: str | None = None
    size_bytes: int = 0
    fault: str = ""


def list_versions(root: Path) -> list[VersionEntry]:
    """Every version of every model of a repository; reads all files.

    Raises:
        StartupError: `root` cannot be read.
    """
    default = find_default(root)
    return [entry for folder in find_published(root) for entry in _list_model(folder, default)]


def _list_model(folder: Path, default: str | None) -> list[VersionEntry]:
    name = make_printable(folder.name)
    try:
        with refusing(folder / CONFIG_FILE):
            config = read_repository_config(folder)
            _ = config.served_versions
    except ModelRefused as error:
        return [VersionEntry(name, None, fault=explain_refusal(error, folder.parent))]
    return [
        _describe_version(folder, config, version, is_default=name == default)
        for version in config.version_numbers
    ]


def _describe_version(
    folder: Path, repository: RepositoryConfig, version: int, *, is_default: bool
) -> VersionEntry:
    served = repository.served_versions
    entry = VersionEntry(
        make_printable(folder.name),
        version,
        is_served=version in served,
        is_default=is_default and version == served[-1],
    )
    try:
        config = read_config(folder, version)
        entry = replace(
            entry,
            precisions=tuple(
                precision
                for precision in get_args(Precision)
                if {graph_file(precision), exits_file(precision)} & config.files.keys()
            ),
            wanted_precision=config.limits.precision,
            size_bytes=sum(file.bytes for file in config.files.values()),
        )
        find_artefacts(folder, config).verify()
    except ModelRefused as error:
        return replace(entry, fault=explain_refusal(error, folder.parent))
    return entry


def format_table(entries: Sequence[VersionEntry]) -> str:
    """Lines of `solo-models list`, in columns."""
    rows = [("MODEL", "VERSION", "SERVED", "DEFAULT", "PRECISIONS", "MB", "FILES")]
    for entry in entries:
        precisions = ",".join(entry.precisions)
        if entry.wanted_precision is not None:
            precisions += f" (asks for {entry.wanted_precision})"
        rows.append(
            (
                entry.model,
                "-" if entry.version is None else str(entry.version),
                "yes" if entry.is_served else "no",
                "yes" if entry.is_default else "no",
                precisions or "-",
                f"{entry.size_bytes / 1e6:.1f}",
                entry.fault or "verified",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def find_model_folder(root: Path, name: str) -> Path:
    """A model's folder.

    Raises:
        StartupError: The repository has no such model.
    """
    folders = {folder.name: folder for folder in find_published(root)}
    if name not in folders:
        raise StartupError(f"{root} has no model {name!r}, only {sorted(folders)}")
    return folders[name]


def serve_versions(folder: Path, policy: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Changes which versions of a model are served; the files of all of them are verified first.

    Args:
        folder: The model's.
        policy: The new `serve` section of config.json.

    Returns:
        The versions that were served before, and those that are served now.

    Raises:
        ModelRefused: A version is missing or damaged; nothing has changed.
    """
    versions: list[list[int]] = []

    def change(content: dict[str, Any], before: RepositoryConfig) -> None:
        with refusing(folder / CONFIG_FILE):
            after = parse_model_config(json.dumps({**content, "serve": policy})).served_versions
        for version in {*after, policy.get("shadow", after[0])}:
            find_artefacts(folder, read_config(folder, version)).verify()
        versions.extend((_served_before(before), after))
        content["serve"] = policy

    edit_config(folder, change)
    return versions[0], versions[1]


def _served_before(config: RepositoryConfig) -> list[int]:
    try:
        return config.served_versions
    except ConfigError:  # it names a version that is missing
        return []


def find_previous(folder: Path) -> int:
    """The version before the highest that is served.

    Raises:
        ModelRefused: config.json is wrong, or there is none.
    """
    with refusing(folder / CONFIG_FILE):
        config = read_repository_config(folder)
        current = config.served_versions[-1]
        earlier = [version for version in config.version_numbers if version < current]
        if not earlier:
            raise ConfigError(
                f"version {current} is served, and there is none before it, only "
                f"{config.version_numbers}"
            )
    return earlier[-1]


def find_current(folder: Path) -> int:
    """The highest version that is served.

    Raises:
        ModelRefused: config.json is wrong.
    """
    with refusing(folder / CONFIG_FILE):
        return read_repository_config(folder).served_versions[-1]


def parse_policy(texts: Sequence[str]) -> dict[str, Any]:
    """The `serve` section that the arguments of `solo-models serve` mean.

    Raises:
        StartupError: They are neither versions, nor "latest" or "all" alone.
    """
    if len(texts) == 1 and texts[0] in POLICIES:
        return {"policy": texts[0]}
    if not all(text.isascii() and text.isdecimal() and len(text) < 10 for text in texts):
        raise StartupError(f"{' '.join(texts)!r}: give version numbers, or one of {POLICIES}")
    return {"policy": "specific", "versions": [int(text) for text in texts]}


def build_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="solo-models",
        description="Shows and changes what a model repository serves.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--model-repo",
        type=Path,
        default=Path(os.environ.get("SOLO_MODEL_REPO") or "model_repo"),
        help="repository (default: $SOLO_MODEL_REPO, else model_repo)",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common])

    added = add("list", "Lists versions, and verifies their files; exits 1 if one is damaged.")
    added.add_argument("--json", action="store_true", help="as a JSON array")
    added = add("default", "Shows or sets the model of requests that name none.")
    wanted = added.add_mutually_exclusive_group()
    wanted.add_argument("model", nargs="?", help="the new default")
    wanted.add_argument("--clear", action="store_true", help="no default: the only model, if any")
    added = add("serve", "Sets which versions of a model are served.")
    added.add_argument("model")
    added.add_argument(
        "versions", nargs="+", metavar="VERSION", help="version numbers, or latest, or all"
    )
    added = add("shadow", "Compares a version with the served one, on a share of the images.")
    added.add_argument("model")
    added.add_argument("version", type=int)
    for name in SHADOW_OPTIONS:
        kind = ShadowedVersion.model_fields[name]
        default = kind.default
        added.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"({default})"
        )
    added = add("rollback", "Serves the version before the one that is served.")
    added.add_argument("model")
    add("trim", "Removes the files that no server on a CPU reads: other graphs, GPUs' packages.")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        The exit status.

    Raises:
        StartupError: It cannot be done; says why.
        OSError: A file cannot be written.
    """
    root: Path = arguments.model_repo
    if arguments.command == "list":
        entries = list_versions(root)
        if arguments.json:
            print(json.dumps([asdict(entry) for entry in entries], indent=2))
        else:
            print(format_table(entries))
        return int(any(entry.fault for entry in entries))
    if arguments.command == "default":
        _change_default(root, arguments.model, clear=arguments.clear)
        return 0
    if arguments.command == "trim":
        for folder in find_published(root):
            print(f"{folder.name}: {trim_model(folder) / 1e6:.1f} MB removed")
        return 0
    folder = find_model_folder(root, arguments.model)
    if arguments.command == "serve":
        policy = parse_policy(arguments.versions)
    elif arguments.command == "shadow":
        options = {name: getattr(arguments, name) for name in SHADOW_OPTIONS}
        policy = {"policy": "shadow", "live": find_current(folder), "shadow": arguments.version}
        policy |= options
    else:
        policy = {"policy": "specific", "versions": [find_previous(folder)]}
    before, after = serve_versions(folder, policy)
    print(f"{arguments.model} is served in version {_join(after)}, before in {_join(before)}")
    if arguments.command == "shadow":
        print(f"version {arguments.version} is compared with it, and the better one stays")
    _print_advice(arguments.model)
    return 0


def _change_default(root: Path, name: str | None, *, clear: bool) -> None:
    if name is not None:
        folder = find_model_folder(root, name)
        read_config(folder)
    if name is not None or clear:
        write_default(root, name)
    default = find_default(root)
    if default is None:
        names = [folder.name for folder in find_published(root)]
        print(f"no default: requests that name none of {names} are refused")
    else:
        print(f"{default} answers requests that name no model")
    if name is not None or clear:
        _print_advice(default or "MODEL")


def _print_advice(name: str) -> None:
    print(
        "Servers that watch the repository (SOLO_MODEL_POLL_S) take this up; for others:\n"
        f"  curl -X POST http://HOST:PORT/v2/repository/models/{name}/load"
    )


def _join(versions: Sequence[int]) -> str:
    return ", ".join(map(str, versions)) or "none"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exits 1 with the reason if it fails."""
    parsed = build_parser().parse_args(arguments)
    try:
        status = run(parsed)
    except (StartupError, OSError) as error:
        sys.exit(f"solo-models: error: {error}")
    sys.exit(status)


if __name__ == "__main__":
    main()
