"""model_repo: which models there are, which may be served, and their engines.

    <model_repo>/<model>/config.json
    <model_repo>/<model>/<version>/model.onnx and other precisions' and engines' files

A file is hashed before anything is built from it, and one that is not used is left alone; what
differs from config.json is refused with the file's name and the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.model_config import ModelConfig
from service.engines.artefacts import ONNX_FILE
from service.engines.base import BackendOptions
from service.engines.choose import build_backend
from service.errors import ModelRefused, StartupError, make_printable
from service.models.folders import (
    CONFIG_FILE,
    Stamp,
    find_artefacts,
    find_default,
    find_models,
    find_published,
    read_default,
    read_repository_config,
    read_stamps,
    refusing,
)
from service.models.loaded import LoadedModel, warm_up
from service.models.publishing import (
    edit_config,
    format_json,
    recover,
    write_default,
    write_version,
)

__all__ = [
    "CONFIG_FILE",
    "ONNX_FILE",
    "LoadedModel",
    "ModelRefused",
    "Repository",
    "edit_config",
    "find_default",
    "find_models",
    "find_published",
    "format_json",
    "load_repository",
    "load_version",
    "read_config",
    "read_default",
    "read_repository_config",
    "recover",
    "write_default",
    "write_version",
]

logger = logging.getLogger(__name__)


def load_version(
    folder: Path, version: int | None = None, options: BackendOptions | None = None
) -> LoadedModel:
    """Verifies and builds one version of the model in `folder`, and runs it once.

    Args:
        folder: A model's folder of model_repo.
        version: Default: the highest that config.json names.
        options: Engine, device, precision and threads.

    Raises:
        ModelRefused: Names the file and says why.
        DeviceError: `cuda` was asked for and does not work.
    """
    config = read_config(folder, version)
    with refusing(folder / CONFIG_FILE):
        options = _options_of(config, options)
    file = folder / str(config.version) / ONNX_FILE
    with refusing(file):
        artefacts = find_artefacts(folder, config)
        backend = build_backend(artefacts, options, config, partial(warm_up, config=config))
    asked = backend.precision if options.free_precision else options.precision
    return LoadedModel(config, config.version, backend, asked)


def _options_of(config: ModelConfig, options: BackendOptions | None) -> BackendOptions:
    """The server's options with what the model's config.json sets for itself.

    Raises:
        ConfigError: The model is for a GPU that the process does not have.
    """
    options, limits = options or BackendOptions(), config.limits
    if limits.gpus is not None and options.device != "cpu":
        if max(limits.gpus) >= len(options.gpus):
            raise ConfigError(
                f"limits.gpus names position {max(limits.gpus)}, the process has "
                f"{len(options.gpus)} GPUs (SOLO_DEVICES)"
            )
        options = replace(options, gpus=tuple(options.gpus[i] for i in limits.gpus))
    return replace(
        options,
        slots=limits.instances or options.slots,
        threads=limits.threads or options.threads,
        precision=limits.precision or options.precision,
        free_precision=options.free_precision and limits.precision is None,
    )


def read_served_versions(folder: Path) -> list[int]:
    """Which versions config.json of a model's folder wants served, ascending.

    Raises:
        ModelRefused: It is missing or wrong, or has not what it wants served.
    """
    with refusing(folder / CONFIG_FILE):
        return read_repository_config(folder).served_versions


def read_config(folder: Path, version: int | None = None) -> ModelConfig:
    """Reads config.json of a model's folder; nothing else is read.

    Raises:
        ModelRefused: It is missing or wrong, has no such version, or names another model.
    """
    with refusing(folder / CONFIG_FILE):
        repository = read_repository_config(folder)
        if version is None:
            if not repository.version_numbers:
                raise ConfigError("it names no version")
            version = repository.version_numbers[-1]
        config = repository.for_version(version)
        name = folder.resolve().name
        if config.name != name:
            raise ConfigError(f"it names the model {config.name!r}, but the folder is {name!r}")
    return config


@dataclass(frozen=True)
class Repository:
    """What a scan of model_repo found.

    Attributes:
        root: The repository's folder.
        models: The models that can be served, by name and version.
        refused: Why the others are not, by folder name.
        options: How their engines were built, and will be again.
        default: The default model that repository.json names.
        stamps: Of the models' files before they were read.
    """

    root: Path
    models: Mapping[str, Mapping[int, LoadedModel]]
    refused: Mapping[str, ModelRefused]
    options: BackendOptions = field(default_factory=BackendOptions)
    default: str | None = None
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    def rebuild(self, model: LoadedModel) -> LoadedModel:
        """The same version with another engine.

        Raises:
            ModelRefused: Its files have changed or are gone.
        """
        return load_version(self.root / model.config.name, model.version, self.options)

    def close(self) -> None:
        """Frees all engines."""
        for versions in self.models.values():
            for model in versions.values():
                model.backend.close()


def load_model(
    folder: Path, options: BackendOptions, kept: Mapping[int, LoadedModel] | None = None
) -> dict[int, LoadedModel]:
    """Loads the versions of a model that its config.json wants served: all of them or none.

    Args:
        folder: A model's folder of model_repo.
        options: How engines are built.
        kept: Versions that are loaded already; those that have not changed are taken over.

    Raises:
        ModelRefused: Names the file and says why.
        DeviceError: `cuda` was asked for and does not work.
    """
    loaded: dict[int, LoadedModel] = {}
    built: list[LoadedModel] = []
    try:
        for version in read_served_versions(folder):
            same = (kept or {}).get(version)
            if same is not None and same.config == read_config(folder, version):
                loaded[version] = same
                continue
            model = load_version(folder, version, options)
            built.append(model)
            loaded[version] = model
            _log_loaded(model)
    except BaseException:
        for model in built:
            model.backend.close()
        raise
    return loaded


def _log_loaded(model: LoadedModel) -> None:
    backend = model.backend
    logger.info(
        "model %s version %d is ready on %s (%s, %s): %s",
        model.config.name,
        model.version,
        backend.device,
        backend.name,
        backend.precision,
        backend.reason,
    )
    if backend.precision != model.asked_precision:
        logger.warning(
            "model %s version %d is served in %s, not in %s",
            model.config.name,
            model.version,
            backend.precision,
            model.asked_precision,
        )


def load_repository(
    root: Path, options: BackendOptions | None = None, *, may_be_empty: bool = False
) -> Repository:
    """Loads the versions of every model that its config.json wants served.

    A broken model does not stop the others.

    Args:
        root: The repository's folder.
        options: Engine, device, precision and threads.
        may_be_empty: Whether the models may all come later.

    Raises:
        StartupError: `root` cannot be read; or no model can be served, which says why.
        DeviceError: `cuda` was asked for and does not work.
    """
    options = options or BackendOptions()
    models: dict[str, dict[int, LoadedModel]] = {}
    refused: dict[str, ModelRefused] = {}
    folders = find_models(root, may_be_empty=may_be_empty)
    stamps = read_stamps(folders)
    try:
        default = read_default(root)
    except ModelRefused as error:
        logger.error("there is no default model: %s", error)
        default = None
    for folder in folders:
        name = make_printable(folder.name)
        try:
            models[name] = load_model(folder, options)
        except ModelRefused as error:
            logger.error("model %s is refused: %s", name, error)
            refused[name] = error
    if not models and not may_be_empty:
        reasons = "; ".join(str(error) for error in refused.values())
        raise StartupError(f"no model of {str(root)!r} can be served: {reasons}")
    return Repository(root, models, refused, options, default, stamps)
