"""Self-configuration of a run: statistics of the data, rules, the time of a step, a file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from service.cores import count_cores
from service.files import replace_text
from training import distributed
from training.configs import list_configs
from training.configs.rules import ConfigPlan, choose_config, fit_schedule
from training.configs.schema import BackboneKind, Config
from training.configs.statistics import Machine
from training.configs.toml_files import format_config, load_config
from training.data.coco import CocoDataset
from training.data.statistics import measure_statistics
from training.weights.initial import read_network
from training.weights.sources import has_efficientnet

CONFIG_FILE = "config.toml"


def name_of(data: Path) -> str:
    """Name of a self-configured model: the data's folder; a name of the zoo gets a suffix."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", data.resolve().name).lstrip("_.-")[:200] or "model"
    return f"{name}_auto" if name in list_configs() else name


def read_configuration(out: Path) -> Config | None:
    """The configuration that an earlier start of the run wrote, which is said; None: there is none.

    It is the same in every process.

    Raises:
        ValueError: The file is not valid, or there is a checkpoint but no such file.
    """
    path = out / CONFIG_FILE
    exists, trained = distributed.from_main((path.exists(), (out / "last.pt").exists()))
    if exists:
        if distributed.is_main():
            print(
                f"solo-train: {path} of an earlier start is used; --hours does not change it, "
                "--restart chooses anew"
            )
        return load_config(str(path))
    if trained:
        raise ValueError(
            f"{out} has a checkpoint of a named configuration; name it, or choose another --out"
        )
    return None


def configure(
    name: str,
    data: CocoDataset,
    *,
    device: str,
    hours: float,
    init: str | None,
    change: Callable[[Config], Config],
    time_step: Callable[[Config], tuple[float, str]],
) -> ConfigPlan:
    """The configuration for a data set and a time budget.

    Args:
        name: Of the configuration.
        data: The training split, without contrast rule.
        device: `cpu`, `cuda`, ...
        hours: Time budget.
        init: The user's initial weights, as in `training.weights.initial.initialise`.
        change: The user's changes.
        time_step: Time of a training step of a configuration, s, and a line on how it is run.

    Raises:
        ValueError: The data has no objects, a change is not valid, or there are no such weights.
    """
    if not 0 < hours < float("inf"):
        raise ValueError(f"--hours is {hours}, expected a positive number")
    machine = Machine(
        gpu=device.startswith("cuda"), cores=count_cores(), efficientnet=has_efficientnet()
    )
    start: Config | BackboneKind | Literal["imagenet"] | None = None
    if init:
        start = read_network(init) or "imagenet"
    plan = choose_config(name, measure_statistics(data), machine, start)
    plan = replace(plan, config=replace(change(plan.config), classes=data.classes))
    if distributed.is_main():
        print("solo-train: timing the steps of the chosen configuration", flush=True)
    step_s, reason = distributed.from_main(time_step(plan.config))
    plan = replace(plan, reasons=(*plan.reasons, reason))
    plan = fit_schedule(plan, len(data), budget_s=hours * 3600, step_s=step_s)
    return replace(plan, config=change(plan.config))


def write_configuration(plan: ConfigPlan, out: Path) -> Path:
    """Writes config.toml with the reasons as comments."""
    path = out / CONFIG_FILE
    comments = "".join(f"# {reason}\n" for reason in plan.reasons)
    replace_text(path, f"{comments}\n{format_config(plan.config)}")
    return path
