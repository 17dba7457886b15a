"""A server that is killed again and again loses no job and no file, and repeats none."""

from __future__ import annotations

import base64
import os
import random
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from solo_client import Client, ImageFailed, Retry, SoloError
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.receiver import receive_webhooks
from tests.support.server import CPU_FLAGS, ServerProcess, run_server

SMALL = encode_picture(draw_picture())
LARGE = encode_picture(draw_picture(400, 400))
FILES = [SMALL, LARGE, b"no image", SMALL, LARGE, SMALL]
SECRET = "whsec_" + base64.b64encode(bytes(32)).decode()


def build_flags(tmp_path: Path) -> list[str]:
    publish(tmp_path / "repo")
    flags = [
        "--model-repo",
        f"{tmp_path / 'repo'}",
        *CPU_FLAGS,
        "--jobs-dir",
        f"{tmp_path / 'jobs'}",
    ]
    flags += ["--jobs-webhook-hosts", "127.0.0.1", "--jobs-webhook-private", "true"]
    return [*flags, "--jobs-webhook-secret", SECRET]


class Submitter:
    """Sends one job after another, each until it is accepted, to whatever server there is.

    Attributes:
        jobs: Ids by idempotency key.
        url: The server's; empty while there is none.
    """

    def __init__(self, webhook: str) -> None:
        self.jobs: dict[str, str] = {}
        self.url = ""
        self._webhook = webhook
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.1):
            if not self.url:
                continue
            key = f"job-{len(self.jobs)}"
            with suppress(SoloError, OSError), Client(self.url, retry=Retry(attempts=1)) as client:
                job = client.submit_job(FILES, webhook=self._webhook, idempotency_key=key)
                self.jobs[key] = job.id

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def kill_often(tmp_path: Path, kills: int, seed: int) -> None:
    flags, chance = build_flags(tmp_path), random.Random(seed)
    with receive_webhooks() as receiver:
        submitter = Submitter(receiver.url)
        try:
            for number in range(kills):
                with run_server(tmp_path / f"log{number}", *flags) as server:
                    submitter.url = server.url
                    time.sleep(chance.random() * 1.5)
                    server.process.kill()
        finally:
            submitter.end()
        assert submitter.jobs, "no job was accepted"
        with run_server(tmp_path / "log", *flags) as server, Client(server.url) as client:
            check_all(server, client, submitter)
            deadline_s = time.monotonic() + 60
            ids = set(submitter.jobs.values())
            while (told := {h["webhook-id"] for h, _ in list(receiver.received)}) < ids:
                assert time.monotonic() < deadline_s, ids - told
                time.sleep(0.1)
            assert told >= ids


def check_all(server: ServerProcess, client: Client, submitter: Submitter) -> None:
    """Every accepted job is there once, and has each file once, with what a request gives."""
    listed = [job.id for job in client.list_jobs()]
    assert len(listed) == len(set(listed)) and set(submitter.jobs.values()) <= set(listed)
    # A job may have been stored without its answer having been read.
    assert len(listed) - len(submitter.jobs) in (0, 1)
    expected = [
        found.code if isinstance(found, ImageFailed) else [i.rle for i in found.instances]
        for found in client.segment_many(FILES)
    ]
    for job in listed:
        done = client.wait_for_job(job, timeout_s=120)
        assert (done.total, done.done, done.failed) == (6, 5, 1)
        url = f"{server.url}/v2/jobs/{job}/results"
        entries = httpx.get(url).raise_for_status().json()["results"]
        assert Counter(entry["number"] for entry in entries) == Counter(range(1, 7))
        found = [
            e["error"]["code"] if "error" in e else [i["segmentation"] for i in e["instances"]]
            for e in entries
        ]
        assert found == expected


def test_a_few_kills(tmp_path: Path) -> None:
    kill_often(tmp_path, 4, seed=1)


@pytest.mark.slow
def test_fifty_kills(tmp_path: Path) -> None:
    kill_often(tmp_path, 50, seed=2)


def test_workers_share_a_job_and_one_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    flags = [*build_flags(tmp_path), "--workers", "2"]
    with run_server(tmp_path / "log", *flags) as server, Client(server.url) as client:
        job = client.submit_job([LARGE] * 40)
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        workers = [
            int(pid)
            for pid in children.read_text().split()
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(workers) == 2
        while not client.show_job(job.id).done:
            time.sleep(0.02)
        os.kill(workers[0], signal.SIGKILL)
        done = client.wait_for_job(job.id, timeout_s=120)
        assert (done.done, done.failed) == (40, 0)
        found = client.read_job(job.id)
        masks = {str([i.rle for i in f.instances]) for f in found if not isinstance(f, ImageFailed)}
        assert len(found) == 40 and len(masks) == 1
