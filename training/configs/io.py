"""Configurations as JSON types, and changes of single fields from the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter, ValidationError

from training.configs.schema import Config

_ADAPTER = TypeAdapter(Config)


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON types."""
    content: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return content


def config_from_dict(content: dict[str, Any]) -> Config:
    """The inverse of `config_to_dict`.

    Raises:
        ValueError: A field is unknown or has a wrong value; the message names the fields.
    """
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        fields = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ValueError(f"the configuration is not valid: {'; '.join(fields)}") from error


def apply_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """Replaces fields of a configuration.

    Args:
        config: The configuration to change.
        overrides: `FIELD=VALUE` each, e.g. `schedule.lr=0.001`. FIELD is a dotted path; VALUE is
            JSON, or a string if it is not valid JSON.

    Raises:
        ValueError: There is no such field, or the value is not valid; names the override.
    """
    content = config_to_dict(config)
    for override in overrides:
        path, equals, text = override.partition("=")
        *parents, leaf = path.split(".")
        node = content
        for name in parents:
            node = node.get(name, {}) if isinstance(node, dict) else {}
        if not equals or not isinstance(node, dict) or leaf not in node:
            raise ValueError(f"override {override!r} is not FIELD=VALUE with a known field")
        try:
            node[leaf] = json.loads(text)
        except json.JSONDecodeError:
            node[leaf] = text
    try:
        return config_from_dict(content)
    except ValueError as error:
        raise ValueError(f"overrides {list(overrides)}: {error}") from error
