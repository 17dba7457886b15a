from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from service.observe.logs import JsonFormatter, TextFormatter, configure_logging


@pytest.fixture(autouse=True)
def _restore_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_json_line_has_the_message_and_extra_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "json")
    logger = logging.getLogger("service.test")
    logger.debug("not shown")
    logger.info("request %d", 7, extra={"request_id": "a\nb", "status": 200})
    (text,) = capsys.readouterr().err.splitlines()
    line = json.loads(text)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "service.test",
        "message": "request 7",
        "request_id": "a\nb",
        "status": 200,
    }


def test_private_attributes_of_records_are_omitted() -> None:
    record = logging.makeLogRecord({"msg": "done", "_ray_timestamp_ns": 17, "status": 200})
    line = json.loads(JsonFormatter().format(record))
    assert set(line) == {"time", "level", "logger", "message", "status"}


def test_a_json_line_has_the_traceback_and_values_without_a_json_type() -> None:
    try:
        raise ValueError("17 is wrong")
    except ValueError:
        record = logging.makeLogRecord({"msg": "failed", "exc_info": sys.exc_info(), "where": {1}})
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert "ValueError: 17 is wrong" in line["exception"]
    assert line["where"] == "{1}"


def test_text_lines(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("warning", "text")
    logging.getLogger("service.test").info("not shown")
    logging.getLogger("service.test").warning("shown")
    assert capsys.readouterr().err.endswith("WARNING service.test: shown\n")


HOSTILE = {
    "a\n2026-01-01 00:00:00,000 ERROR forged: x": r"a\n2026-01-01 00:00:00,000 ERROR forged: x",
    "a\r\x1b[31m\x00\x07\x7f": r"a\r\x1b[31m\x00\x07\x7f",
    "a\x85\x9b31m": r"a\x85\x9b31m",
    "a\u2028b\u2029": r"a\u2028b\u2029",
    "\u202egnp.exe\u2066\u200f\ufeff": r"\u202egnp.exe\u2066\u200f\ufeff",
    "\udcff\U000e0001": r"\udcff\U000e0001",
    "细胞 é 😀 \\n": "细胞 é 😀 \\n",
}
"""What stands for it in a text line."""


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_leaves_its_line_or_reaches_the_terminal(
    capsys: pytest.CaptureFixture[str], text: str
) -> None:
    configure_logging("info", "text")
    logging.getLogger(f"service.{text}").info("request %s", text, extra={"path": text})
    (line,) = capsys.readouterr().err.split("\n")[:-1]
    assert line.endswith(f"request {HOSTILE[text]}")
    assert line.isprintable()
    assert f"service.{HOSTILE[text]}: " in line


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("value", [str, lambda text: [text], lambda text: {text: {text}}])
def test_json_has_every_text_escaped_and_whole(
    capsys: pytest.CaptureFixture[str], text: str, value: Any
) -> None:
    configure_logging("info", "json")
    logging.getLogger(f"service.{text}").info("request %s", text, extra={"path": value(text)})
    (line,) = capsys.readouterr().err.split("\n")[:-1]
    assert line.isprintable()
    content = json.loads(line)
    assert content["message"] == f"request {text}"
    assert content["logger"] == f"service.{text}"
    assert content["level"] == "info"
    if value is str:
        assert content["path"] == text


def fail(text: str) -> logging.LogRecord:
    try:
        raise ValueError(text)
    except ValueError:
        return logging.makeLogRecord({"msg": "failed", "exc_info": sys.exc_info(), "name": "a"})


@pytest.mark.parametrize("text", HOSTILE)
def test_a_traceback_cannot_imitate_a_record(text: str) -> None:
    first, *others = TextFormatter().format(fail(text)).split("\n")
    assert first.endswith("a: failed")
    assert len(others) >= 3
    assert all(line.startswith("  ") and line.isprintable() for line in others)
    line = JsonFormatter().format(fail(text))
    assert line.isprintable()
    assert text in json.loads(line)["exception"]
