"""Requests made from the OpenAPI document, and broken on purpose: none makes the server fail."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx
import pytest

from benchmarks.load import read_metrics
from tests.reliability.conftest import Report
from tests.support.blob_model import publish
from tests.support.server import CPU_FLAGS, run_server

EXAMPLES = 60
"""For each operation and kind of test."""

# A deadline of 1 ms is missed, as it was asked for.
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""


def count_statuses(metrics: dict[str, float]) -> Counter[int]:
    """Answers by status."""
    statuses: Counter[int] = Counter()
    for name, value in metrics.items():
        found = re.match(r'solo_requests_total{.*status="(.*?)"', name)
        if found:
            statuses[int(found[1])] += int(value)
    return statuses


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed"
)
def test_no_request_of_the_openapi_document_is_a_server_error(
    tmp_path: Path, report: Report
) -> None:
    publish(tmp_path / "repo")
    log = tmp_path / "log"
    flags = ["--model-repo", str(tmp_path / "repo"), *CPU_FLAGS, "--model-control", "true"]
    flags += ["--jobs-dir", str(tmp_path / "jobs")]
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG, encoding="utf-8")
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    command += ["--checks", "not_a_server_error"]
    command += ["--max-examples", str(EXAMPLES), "--seed", "1", "--workers", "1", "--no-color"]
    # Unloading the only model makes the rest of the run a row of honest 503s.
    command += ["--exclude-path-regex", "unload", "--suppress-health-check", "all"]
    with run_server(log, *flags) as server:
        done = subprocess.run(
            [*command, f"{server.url}/openapi.json"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert httpx.get(f"{server.url}/v2/health/ready").status_code == 200
        metrics = read_metrics(server.url)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    statuses = count_statuses(metrics)
    report("requests", statuses.total())
    report("by_status", ", ".join(f"{status}: {n}" for status, n in sorted(statuses.items())))
    assert statuses.total() > 500
    assert {status for status in statuses if status >= 500} <= {504}
    assert "Traceback" not in log.read_text(encoding="utf-8")
