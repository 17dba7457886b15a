"""Configurations as TOML files, and the command solo-config.

A file holds a whole configuration, or `base = "NAME"` and the fields that differ from the zoo's.
TOML has no null, so the string "none" stands for it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from training.configs import get_config, list_configs
from training.configs.io import apply_overrides, config_from_dict, config_to_dict
from training.configs.schema import Config

NULL = "none"
TEXT_FIELDS = {"name", "description"}
"""Fields in which "none" is a text."""
UNION_TAGS = {"resize": "rule", "nms": "kind"}
"""Tables whose fields depend on this tag; with another tag they replace the base's table."""


def load_config(name_or_file: str) -> Config:
    """A configuration of the zoo by its name, or one of a file whose name ends with `.toml`.

    Raises:
        ValueError: There is no such name, or the file is missing or not valid; names it.
    """
    if not name_or_file.endswith(".toml"):
        return get_config(name_or_file)
    path = Path(name_or_file)
    try:
        return parse_config(path.read_text(encoding="utf-8-sig"), path.stem)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def parse_config(text: str, default_name: str) -> Config:
    """A configuration from the text of a TOML file.

    Args:
        text: A whole configuration, or a `base` and the differences.
        default_name: The name of a configuration that does not give one.

    Raises:
        ValueError: The text is not TOML, the base is unknown, or a field is unknown or has a wrong
            value; names the field's path.
    """
    try:
        content = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    base = content.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ValueError(f"base is {base!r}, expected the name of a configuration")
    changes = {"name": default_name, **_with_nulls(content)}
    if base is None:
        return config_from_dict(changes)
    return config_from_dict(_merge(config_to_dict(get_config(base)), changes))


def _with_nulls(node: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _with_nulls(value)
        if isinstance(value, dict)
        else None
        if value == NULL and key not in TEXT_FIELDS
        else value
        for key, value in node.items()
    }


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `changes`, table by table."""
    merged = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            tag = UNION_TAGS.get(key)
            replaces = tag in value and value[tag] != old.get(tag)
            merged[key] = value if replaces else _merge(old, value)
        else:
            merged[key] = value
    return merged


def format_config(config: Config) -> str:
    """A whole configuration as TOML that `parse_config` reads back."""
    return "\n".join(_table(config_to_dict(config), ())) + "\n"


def _table(content: dict[str, Any], path: tuple[str, ...]) -> list[str]:
    """Lines of a table: its plain fields first, then its tables."""
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    lines = [f"{key} = {_value(value)}" for key, value in content.items() if key not in tables]
    if path and (lines or not tables):
        lines = ["", f"[{'.'.join(path)}]", *lines]
    for key, value in tables.items():
        lines += _table(value, (*path, key))
    return lines


def _value(value: Any) -> str:
    """A value in TOML; JSON's notation is TOML's for texts and numbers."""
    if value is None:
        return f'"{NULL}"'
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        items = [_value(item) for item in value]
        if value and isinstance(value[0], dict):
            return "[\n" + "".join(f"  {item},\n" for item in items) + "]"
        return f"[{', '.join(items)}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def build_parser() -> argparse.ArgumentParser:
    """The command line of solo-config."""
    parser = argparse.ArgumentParser(
        prog="solo-config",
        description="Shows configurations as TOML. A file for solo-train needs only the fields "
        'that differ: base = "nuclei", then [schedule] and epochs = 20, for example.',
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names and descriptions of the bundled configurations")
    show = commands.add_parser("show", help="print a whole configuration")
    show.add_argument("config", metavar="NAME|FILE.toml", help="a bundled name or a file")
    show.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change one field, e.g. schedule.lr=0.001; repeatable",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(arguments)
    if options.command == "list":
        for name in list_configs():
            print(f"{name:30} {get_config(name).description}")
        return 0
    try:
        config = apply_overrides(load_config(options.config), options.set)
    except ValueError as error:
        print(f"solo-config: {error}", file=sys.stderr)
        return 1
    print(format_config(config), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
