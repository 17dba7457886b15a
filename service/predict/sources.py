"""Where the model of a run is: in a repository, or behind a server."""

from __future__ import annotations

import argparse
from pathlib import Path

import solo_client
from pipeline.model_config import ClassSpec
from pipeline.writers import Classes
from service.errors import StartupError
from service.jobs.errors import RunFailed
from service.models.repository import find_default, find_models, read_config
from service.predict.predictors import RETRY


def find_model(folder: Path, name: str | None) -> Path:
    """The folder of a model.

    Args:
        folder: A model's folder, or a repository of models.
        name: Name in the repository; None: its default, or the only one.

    Raises:
        StartupError: The repository has no such model, or several and no default.
    """
    if (folder / "config.json").is_file():
        return folder
    folders = {path.name: path for path in find_models(folder)}
    name = name or find_default(folder)
    if name is None:
        raise StartupError(f"{folder} has the models {sorted(folders)}; name one: --model NAME")
    if name not in folders:
        raise StartupError(f"{folder} has no model {name!r}, only {sorted(folders)}")
    return folders[name]


def build_client(arguments: argparse.Namespace) -> solo_client.Client:
    """The client of `--url`.

    Raises:
        StartupError: The address is invalid.
        OSError: The file with the API key cannot be read.
    """
    key_file = arguments.api_key_file
    key = None if key_file is None else key_file.read_bytes().decode(errors="replace").strip()
    try:
        return solo_client.Client(arguments.url, api_key=key, retry=RETRY)
    except Exception as error:  # those of addresses and proxies have no common base
        raise StartupError(f"--url {arguments.url}: {error}") from error


def find_classes(arguments: argparse.Namespace, served: str | None) -> Classes:
    """The classes of the model that found the results.

    Args:
        arguments: Of the command.
        served: Its "name:version"; None if there are no results.

    Raises:
        RunFailed: The server does not describe it.
        StartupError: It is no longer in the repository.
    """
    if served is None:
        return ()
    name, _, version = served.rpartition(":")
    if arguments.url is None:
        folder = find_model(arguments.model_repo, name)
        return read_config(folder, int(version)).classes
    with build_client(arguments) as client:
        try:
            classes = client.describe_model(name, int(version))["classes"]
        except (solo_client.SoloError, KeyError) as error:
            raise RunFailed(f"the classes of {served} are not known: {error}") from error
    return tuple(ClassSpec.model_validate(spec) for spec in classes)
