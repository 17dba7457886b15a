"""Changes of a configuration from the command line: `schedule.lr=0.001`."""

from __future__ import annotations

import json
from collections.abc import Iterable

from training.checkpoint import CheckpointError, config_from_dict, config_to_dict
from training.configs.schema import Config


def apply_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """Replaces fields by dotted path; values are JSON, anything else is taken as a string.

    Raises:
        ValueError: No such field, or a value that does not fit; names the override.
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
    except CheckpointError as error:
        raise ValueError(f"overrides {list(overrides)}: {error}") from error
