"""config.json of a model: its versions, and which of them are served.

Top-level sections hold for every version; a version's entry may replace any of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.errors import ConfigError
from pipeline.model_config import MAX_CLASSES, ModelConfig, ModelName, PositiveInt, Spec
from pipeline.strict_json import parse_json

SCHEMA_VERSION = 1
_MOST_ERRORS = 5
_LONGEST_REASON = 1000
_LONGEST_NAME = 80


class LatestVersions(Spec):
    """The highest versions, as many as asked for."""

    policy: Literal["latest"] = "latest"
    count: PositiveInt = 1


class AllVersions(Spec):
    """Every version."""

    policy: Literal["all"] = "all"


class SpecificVersions(Spec):
    """The versions that are named."""

    policy: Literal["specific"] = "specific"
    versions: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class ShadowedVersion(Spec):
    """One version; another one segments a share of its images too, to be compared.

    Attributes:
        live: The version that is served.
        shadow: The other one.
        share: Of the images, 0..1.
        images: That are compared before anything is decided.
        promote_at: Mean agreement from which on the shadow is served in its place.
        reject_below: Mean agreement below which the shadow is rejected.
        max_failures: Images that the shadow may fail on; more reject it.
        max_slowdown: Most engine time of the shadow, relative to the served version's.
    """

    policy: Literal["shadow"] = "shadow"
    live: PositiveInt
    shadow: PositiveInt
    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    images: PositiveInt = 200
    promote_at: Annotated[float, Field(ge=0, le=1)] = 0.95
    reject_below: Annotated[float, Field(ge=0, le=1)] = 0.8
    max_failures: Annotated[int, Field(ge=0)] = 2
    max_slowdown: Annotated[float, Field(gt=0)] = 2.0

    @model_validator(mode="after")
    def _check(self) -> ShadowedVersion:
        if self.live == self.shadow:
            raise ValueError(f"version {self.live} cannot be its own shadow")
        if self.reject_below > self.promote_at:
            raise ValueError(
                f"reject_below {self.reject_below} is above promote_at {self.promote_at}"
            )
        return self


VersionPolicy = Annotated[
    LatestVersions | AllVersions | SpecificVersions | ShadowedVersion, Field(discriminator="policy")
]


class RepositoryConfig(Spec):
    """config.json: shared sections and the versions."""

    schema_version: Literal[1] = 1
    name: ModelName
    task: str = "segmentation"
    description: str = ""
    input: dict[str, Any] | None = None
    classes: Annotated[list[dict[str, Any]], Field(max_length=MAX_CLASSES)] | None = None
    card: dict[str, Any] | None = None
    candidates: int | None = None
    mask_stride: int | None = None
    postprocess: dict[str, Any] | None = None
    limits: dict[str, Any] | None = None
    canvases: list[Any] | None = None
    serve: VersionPolicy = LatestVersions()
    versions: dict[Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")], dict[str, Any]]

    @property
    def version_numbers(self) -> list[int]:
        """Ascending."""
        return sorted(int(v) for v in self.versions)

    @property
    def served_versions(self) -> list[int]:
        """Those that are to be served at once, ascending.

        Raises:
            ConfigError: There is no version, or one that is named is not there.
        """
        present = self.version_numbers
        if not present:
            raise ConfigError(f"model {self.name!r} names no version")
        if isinstance(self.serve, AllVersions):
            return present
        if isinstance(self.serve, LatestVersions):
            return present[-self.serve.count :]
        wanted = self.wanted_versions
        missing = sorted(wanted - set(present))
        if missing:
            raise ConfigError(
                f"model {self.name!r} is to be served in {missing}, but has only {present}"
            )
        return [self.serve.live] if isinstance(self.serve, ShadowedVersion) else sorted(wanted)

    @property
    def wanted_versions(self) -> set[int]:
        """Those that are named, a shadow too; empty if none is."""
        if isinstance(self.serve, ShadowedVersion):
            return {self.serve.live, self.serve.shadow}
        return set(self.serve.versions) if isinstance(self.serve, SpecificVersions) else set()

    def for_version(self, version: int) -> ModelConfig:
        """The shared sections with what the version replaces.

        Raises:
            ConfigError: No such version, or a section that is not valid.
        """
        if str(version) not in self.versions:
            raise ConfigError(
                f"model {self.name!r} has no version {version}, only {self.version_numbers}"
            )
        shared = self.model_dump(exclude={"schema_version", "serve", "versions"}, exclude_none=True)
        content = {**shared, **self.versions[str(version)], "version": version}
        try:
            return ModelConfig.model_validate(content)
        except ValidationError as error:
            raise ConfigError(f"model {self.name!r} version {version}: {_reason(error)}") from error


def _reason(error: ValidationError) -> str:
    """The first faults, by field, abbreviated: a file may have any number, of any length."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    parts = [f"{_join(e['loc'])}: {e['msg']}" for e in found[:_MOST_ERRORS]]
    if len(found) > _MOST_ERRORS:
        parts.append(f"and {len(found) - _MOST_ERRORS} more")
    text = "; ".join(parts)
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."


def _join(location: tuple[int | str, ...]) -> str:
    names = map(str, location)
    return ".".join(n if len(n) <= _LONGEST_NAME else f"{n[:_LONGEST_NAME]}..." for n in names)


def parse_model_config(text: str | bytes) -> RepositoryConfig:
    """Parses config.json.

    Raises:
        ConfigError: Not JSON, or a field is missing, unknown or wrong; the message names it.
    """
    try:
        return RepositoryConfig.model_validate(parse_json(text))
    except ValidationError as error:
        raise ConfigError(f"config.json: {_reason(error)}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config.json is not valid JSON: {error}") from error
