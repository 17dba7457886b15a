"""--precision auto: the faster of float32 and bfloat16 on this machine, kept by a resumed run."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from service.files import replace_text
from training import distributed
from training.objective import DTYPES, Precision

PRECISION_FILE = "precision.toml"
_LEAST_GAIN = 0.95
"""bfloat16 is chosen if a step takes less than this part of the time in float32."""
_NATIVE_BF16 = ("amx_bf16", "avx512_bf16", "bf16")
"""PyTorch's names of the instruction sets that multiply bfloat16; the last one is ARM's."""


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """What rounding depends on besides the configuration: precision and memory layout."""

    precision: Precision = "fp32"
    channels_last: bool = False


MeasureStep = Callable[[Numerics], float]
"""Time of a training step, s."""


def has_native_bf16(device: str) -> bool:
    """Whether the device multiplies bfloat16 without emulation."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    query = getattr(torch.cpu, "get_capabilities", None)  # not in every version
    return query is not None and any(query().get(name, False) for name in _NATIVE_BF16)


def settle_precision(
    options: argparse.Namespace, out: Path, measure_step: MeasureStep
) -> tuple[float | None, str]:
    """Replaces `options.precision` and `channels_last` if the precision is `auto`.

    A choice is written to the run's folder, where a resumed run finds it, also on another machine.
    A checkpoint without one was trained with the default precision.

    Args:
        options: Of solo-train.
        out: Folder of the run.
        measure_step: Not called if there is nothing to choose.

    Returns:
        The time of a step if it was measured, and the reason in a line.

    Raises:
        ValueError: The file in the folder is not valid.
    """
    if options.precision != "auto":
        return None, f"precision: {options.precision}, as given"
    path = out / PRECISION_FILE
    exists, trained = distributed.from_main((path.exists(), (out / "last.pt").exists()))
    step_s = None
    if exists and not options.restart:
        chosen = read_numerics(path)
        reason = f"precision: that of {path}: {chosen.precision}"
    elif trained and not options.restart:
        chosen, reason = Numerics(), f"precision: fp32, as that of {out / 'last.pt'}"
    else:
        chosen, step_s, reason = _choose(options, measure_step)
        if distributed.is_main():
            write_numerics(chosen, path)
    options.precision, options.channels_last = chosen.precision, chosen.channels_last
    return step_s, reason


def _choose(
    options: argparse.Namespace, measure_step: MeasureStep
) -> tuple[Numerics, float | None, str]:
    device = "this GPU" if options.device.startswith("cuda") else "this CPU"
    plain = Numerics(channels_last=options.channels_last)
    if not distributed.from_main(has_native_bf16(options.device)):
        return plain, None, f"precision: fp32, because {device} has no native bf16"
    candidates = [plain, Numerics(precision="bf16", channels_last=True)]
    full_s, short_s = (distributed.from_main(measure_step(numerics)) for numerics in candidates)
    faster = int(short_s < _LEAST_GAIN * full_s)
    reason = (
        f"precision: {candidates[faster].precision}, because a step takes {short_s:.3g} s in bf16 "
        f"with channels-last layout and {full_s:.3g} s in fp32 on {device}"
    )
    return candidates[faster], (full_s, short_s)[faster], reason


def read_numerics(path: Path) -> Numerics:
    """What `write_numerics` wrote.

    Raises:
        ValueError: It is not valid; names the file and the value.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    precision, channels_last = content.get("precision"), content.get("channels_last")
    if precision not in list(DTYPES) or not isinstance(channels_last, bool) or len(content) != 2:
        raise ValueError(
            f"{path} holds {content}, expected precision ({', '.join(DTYPES)}) and channels_last "
            "(true or false)"
        )
    return Numerics(precision=precision, channels_last=channels_last)


def write_numerics(numerics: Numerics, path: Path) -> None:
    """Writes a TOML file."""
    layout = str(numerics.channels_last).lower()
    replace_text(path, f'precision = "{numerics.precision}"\nchannels_last = {layout}\n')
