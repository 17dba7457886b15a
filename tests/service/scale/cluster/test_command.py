from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from service.__main__ import main
from service.scale.cluster import command
from service.scale.cluster.settings import ClusterSettings
from tests.support.waiting import poll_until


def fail(*flags: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["ray", *flags])
    return str(caught.value.code)


def test_every_setting_has_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail("--help") == "0"
    text = capsys.readouterr().out
    for name, setting in ClusterSettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert setting.description, name


def test_what_is_wrong_is_said_before_ray_starts(tmp_path: Path) -> None:
    reason = fail("--num-gpus", "-1")
    assert reason.startswith("solo-serve ray: error: --num-gpus: ")
    pytest.importorskip("ray", reason="Ray is not installed")
    assert "model repository" in fail("--model-repo", f"{tmp_path / 'no'}")


def test_without_ray_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "requires the extra 'ray'" in fail()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_hangup_does_not_end_it_and_other_signals_do(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def send() -> None:
        poll_until(
            lambda: signal.getsignal(signal.SIGHUP) is not before, timeout_s=30, pause_s=0.01
        )
        os.kill(os.getpid(), signal.SIGHUP)
        poll_until(lambda: "--model-poll-s" in caplog.text, timeout_s=30, pause_s=0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGHUP)
    sender = threading.Thread(target=send)
    sender.start()
    command._wait_for_signal()
    sender.join()
    assert signal.getsignal(signal.SIGHUP) is before
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])
