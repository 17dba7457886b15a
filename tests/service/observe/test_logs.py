from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from service.observe.logs import JsonFormatter, configure_logging


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
