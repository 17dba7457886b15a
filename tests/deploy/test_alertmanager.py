"""The configuration that docker/alertmanager/start.sh makes of the variables of .env."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

START = Path(__file__).resolve().parents[2] / "docker/alertmanager/start.sh"


def start(folder: Path, **variables: str) -> tuple[dict[str, Any], str]:
    """The configuration, and what is said; a stand-in for Alertmanager prints its configuration."""
    program = folder / "alertmanager"
    program.write_text(
        '#!/bin/sh\nfor each in "$@"; do\n'
        '  case "$each" in --config.file=*) cat "${each#*=}";; esac\ndone\n'
    )
    program.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", str(START)],
        env={**variables, "PATH": path, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded: dict[str, Any] = yaml.safe_load(done.stdout)
    return loaded, done.stderr


def test_without_a_receiver_alerts_are_listed_and_a_line_says_so(tmp_path: Path) -> None:
    config, said = start(tmp_path)
    assert config["receivers"] == [{"name": "operators"}]
    assert config["route"]["receiver"] == "operators"
    assert "no receiver is set" in said


def test_all_receivers_at_once(tmp_path: Path) -> None:
    config, said = start(
        tmp_path,
        ALERT_WEBHOOK_URL="https://example.com/?a=1&b=#c",
        ALERT_SLACK_URL="https://hooks.example.com/x",
        ALERT_SLACK_CHANNEL="#operations",
        ALERT_EMAIL_TO="a@example.com, b@example.com",
        ALERT_EMAIL_FROM="solo@example.com",
        ALERT_SMTP_HOST="smtp.example.com:587",
        ALERT_SMTP_USER="solo",
        ALERT_SMTP_PASSWORD="it's: {a} $secret",
        ALERT_GROUP_WAIT="1s",
    )
    assert said == ""
    (receiver,) = config["receivers"]
    assert receiver["webhook_configs"] == [{"url": "https://example.com/?a=1&b=#c"}]
    (slack,) = receiver["slack_configs"]
    assert (slack["api_url"], slack["channel"]) == ("https://hooks.example.com/x", "#operations")
    (email,) = receiver["email_configs"]
    assert email["to"] == "a@example.com, b@example.com"
    assert email["auth_password"] == "it's: {a} $secret"
    assert config["route"]["group_wait"] == "1s"


@pytest.mark.parametrize("missing", ["ALERT_EMAIL_FROM", "ALERT_SMTP_HOST"])
def test_an_incomplete_mail_receiver_stops_the_start(tmp_path: Path, missing: str) -> None:
    variables = {
        "ALERT_EMAIL_TO": "a@example.com",
        "ALERT_EMAIL_FROM": "b@example.com",
        "ALERT_SMTP_HOST": "smtp.example.com:25",
    }
    del variables[missing]
    with pytest.raises(subprocess.CalledProcessError) as caught:
        start(tmp_path, **variables)
    assert missing in caught.value.stderr
