"""Logging to standard error: as text, or as one JSON object per line for log collectors."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Literal

import orjson

from service.observe.standard_error import StandardErrorHandler

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {
    *("message", "asctime", "taskName"),
    "color_message",  # uvicorn's copy of the message with terminal colours
}
"""Attributes of every record; all others were passed as `extra`."""


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
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def configure_logging(level: str, style: Literal["text", "json"]) -> None:
    """Configures the root logger to write to standard error.

    Args:
        level: Minimum level, e.g. "info".
        style: Format of a line.
    """
    handler = StandardErrorHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Malformed bodies are reported to the client; its warnings would only repeat that.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
