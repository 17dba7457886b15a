"""Logging to standard error: as text, or as one JSON object per line for log collectors.

Records contain text of clients: paths, names, messages of errors. In both formats all characters
that are not printable (line ends, escape sequences, other control characters, marks of the writing
direction) are escaped, so that a record cannot imitate another one.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal

import orjson

from service.observe.standard_error import StandardErrorHandler

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {
    *("message", "asctime", "taskName"),
    "color_message",  # uvicorn's copy of the message with terminal colours
}
"""Attributes of every record; all others were passed as `extra`."""


def escape_text(text: str) -> str:
    r"""Text with `\n`, `\x1b`, `\u2028` and the like for all characters that are not printable."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class TextFormatter(logging.Formatter):
    """Formats a record as one line; the indented lines of its traceback follow."""

    def __init__(self) -> None:
        super().__init__(TEXT_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Returns the first line."""
        return escape_text(super().formatMessage(record))

    def formatException(
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None]
        | tuple[None, None, None],
    ) -> str:
        """Returns the traceback; messages of errors in it cannot begin a line of the log."""
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"  {escape_text(line)}" for line in lines)


class JsonFormatter(logging.Formatter):
    """Formats a record as JSON: time, level, logger, message, `extra` fields, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the record as one line of JSON; values JSON lacks are written with `str`."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{
                name: value
                for name, value in vars(record).items()
                # Ray adds private attributes to every record.
                if name not in _STANDARD_ATTRIBUTES and not name.startswith("_")
            },
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            text = orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
        except orjson.JSONEncodeError:  # of undecodable file names
            text = json.dumps({name: str(value) for name, value in line.items()})
        if text.isprintable():
            return text
        return "".join(c if c.isprintable() else _escape_in_json(c) for c in text)


def _escape_in_json(character: str) -> str:
    if character.isascii():  # DEL, which JSON allows as it is
        return f"\\u{ord(character):04x}"
    return json.dumps(character)[1:-1]


def configure_logging(level: str, style: Literal["text", "json"]) -> None:
    """Configures the root logger to write to standard error.

    Args:
        level: Minimum level, e.g. "info".
        style: Format of a line.
    """
    handler = StandardErrorHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
