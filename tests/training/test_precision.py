"""The choice of --precision auto; the capability and the times are given, not measured."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from training.precision import (
    PRECISION_FILE,
    Numerics,
    has_native_bf16,
    read_numerics,
    settle_precision,
    write_numerics,
)

BF16 = Numerics(precision="bf16", channels_last=True)
FP32 = Numerics(precision="fp32", channels_last=False)


def options_of(precision: str = "auto", **more: object) -> argparse.Namespace:
    fields = {"device": "cpu", "channels_last": False, "restart": False} | more
    return argparse.Namespace(precision=precision, **fields)


def settle(
    options: argparse.Namespace, out: Path, times: dict[Numerics, float]
) -> tuple[float | None, str]:
    """Settles with the time of a step in each precision; any other is an error."""
    return settle_precision(options, out, times.__getitem__)


def settled(options: argparse.Namespace) -> Numerics:
    return Numerics(precision=options.precision, channels_last=options.channels_last)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.precision.has_native_bf16", lambda device: True)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({FP32: 1.23, BF16: 0.57}, BF16),
        ({FP32: 1.0, BF16: 0.94}, BF16),
        ({FP32: 1.0, BF16: 0.95}, FP32),
        ({FP32: 1.0, BF16: 0.96}, FP32),  # within what a measurement may be wrong by
        ({FP32: 0.5, BF16: 1.5}, FP32),
    ],
)
def test_the_faster_precision_is_chosen_and_kept(
    tmp_path: Path, times: dict[Numerics, float], chosen: Numerics
) -> None:
    options = options_of()
    step_s, reason = settle(options, tmp_path / "run", times)
    assert settled(options) == chosen and step_s == times[chosen]
    assert f"{chosen.precision}, because" in reason and "this CPU" in reason
    assert f"{times[FP32]:g} s in fp32" in reason and f"{times[BF16]:g} s in bf16" in reason
    assert read_numerics(tmp_path / "run" / PRECISION_FILE) == chosen
    # A resumed run measures nothing, whatever the machine can do; --restart chooses again.
    resumed = options_of()
    step_s, reason = settle(resumed, tmp_path / "run", {})
    assert settled(resumed) == chosen and step_s is None and PRECISION_FILE in reason
    restarted = options_of(restart=True)
    settle(restarted, tmp_path / "run", {FP32: 2.0, BF16: 1.0})
    assert settled(restarted) == BF16 == read_numerics(tmp_path / "run" / PRECISION_FILE)


@pytest.mark.parametrize("channels_last", [False, True])
def test_without_native_bf16_nothing_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels_last: bool
) -> None:
    monkeypatch.setattr("training.precision.has_native_bf16", lambda device: False)
    for device, name in (("cpu", "CPU"), ("cuda:0", "GPU")):
        options = options_of(device=device, channels_last=channels_last, restart=True)
        step_s, reason = settle(options, tmp_path, {})
        assert settled(options) == Numerics(channels_last=channels_last) and step_s is None
        assert reason == f"precision: fp32, because this {name} has no native bf16"
    # The same run on a machine that has it.
    monkeypatch.setattr("training.precision.has_native_bf16", lambda device: True)
    options = options_of()
    settle(options, tmp_path, {})
    assert settled(options) == Numerics(channels_last=channels_last)


@pytest.mark.usefixtures("native")
def test_a_given_precision_wins_over_what_was_chosen(tmp_path: Path) -> None:
    write_numerics(BF16, tmp_path / PRECISION_FILE)
    options = options_of("fp32")
    assert settle(options, tmp_path, {}) == (None, "precision: fp32, as given")
    assert settled(options) == Numerics() and read_numerics(tmp_path / PRECISION_FILE) == BF16


@pytest.mark.usefixtures("native")
def test_a_checkpoint_without_a_choice_goes_on_in_fp32(tmp_path: Path) -> None:
    (tmp_path / "last.pt").touch()
    options = options_of()
    assert settle(options, tmp_path, {})[0] is None
    assert settled(options) == Numerics() and not (tmp_path / PRECISION_FILE).exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "precision = ",
        'precision = "int8"\nchannels_last = true',
        'precision = "bf16"',
        'precision = "bf16"\nchannels_last = 1',
        'precision = "bf16"\nchannels_last = true\nstep_s = 1',
        "precision = [1]\nchannels_last = true",
        "\xff",
    ],
)
def test_a_choice_that_is_not_valid_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / PRECISION_FILE
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=PRECISION_FILE):
        settle(options_of(), tmp_path, {})


@pytest.mark.parametrize("numerics", [FP32, BF16, Numerics(), Numerics(precision="fp16")])
def test_a_choice_is_read_as_it_was_written(tmp_path: Path, numerics: Numerics) -> None:
    write_numerics(numerics, tmp_path / "new" / PRECISION_FILE)
    assert read_numerics(tmp_path / "new" / PRECISION_FILE) == numerics


@pytest.mark.parametrize(
    ("found", "native"),
    [
        ({"avx512_bf16": True, "amx_bf16": True}, True),
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"amx_bf16": True}, True),
        ({"bf16": True, "architecture": "arm64"}, True),
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_native_bf16_is_what_pytorch_says(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, object], native: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert has_native_bf16("cpu") is native


def test_native_bf16_of_a_gpu_and_of_an_older_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert has_native_bf16("cuda:1") is False
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert has_native_bf16("cuda:1") is True
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert has_native_bf16("cpu") is False
