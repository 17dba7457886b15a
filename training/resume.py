"""What may differ when a run is resumed from its checkpoint with another configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.configs.io import apply_overrides, config_to_dict
from training.configs.schema import Config
from training.weights.formats import CheckpointError

CHANGEABLE = (
    "description",
    "schedule.epochs",
    "schedule.lr",
    "schedule.schedule",
    "schedule.milestones",
    "schedule.warmup_steps",
    "schedule.warmup_ratio",
    "schedule.clip_norm",
    "schedule.frozen_backbone_epochs",
    "augment",
    "loss",
    "postprocess",
)
"""Fields, or sections, that neither the state of a run nor the order of its images depends on."""
_LISTED = 5  # fields that a message lists
_SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class Change:
    """A dotted field in which two configurations differ, with its values as JSON types."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field} {_show(self.new)} (was {_show(self.old)})"


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def is_changeable(field: str) -> bool:
    """Whether a dotted field may differ from that of the checkpoint."""
    return any(field == name or field.startswith(f"{name}.") for name in CHANGEABLE)


def find_changes(old: Config, new: Config) -> list[Change]:
    """The fields in which two configurations differ."""
    return list(_compare("", config_to_dict(old), config_to_dict(new)))


def _compare(path: str, old: Any, new: Any) -> Iterator[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            below = f"{path}.{key}" if path else key
            yield from _compare(below, old.get(key), new.get(key))
    elif old != new:
        yield Change(path, old, new)


def require_resumable(
    changes: Sequence[Change],
    source: str,
    state: Mapping[str, Any],
    seed: int,
    total_steps: int,
) -> None:
    """Checks that a run can be resumed from a checkpoint.

    Args:
        changes: The fields in which its configuration differs.
        source: What a message calls the checkpoint.
        state: Its content.
        seed: Seed of the resumed run.
        total_steps: Steps of the resumed run.

    Raises:
        CheckpointError: Some fields or the seed may not change, named with both values; or the
            checkpoint is after the last step.
    """
    refused = [str(change) for change in changes if not is_changeable(change.field)]
    if state.get("seed", seed) != seed:
        refused.append(str(Change("--seed", state["seed"], seed)))
    if refused:
        more = f" and {len(refused) - _LISTED} more" if len(refused) > _LISTED else ""
        raise CheckpointError(
            f"{source} was trained with another configuration: {'; '.join(refused[:_LISTED])}"
            f"{more}. A resumed run may change {', '.join(CHANGEABLE)}; for anything else choose "
            "another --out, or --restart to begin anew"
        )
    if changes and state["step"] > total_steps:
        raise CheckpointError(
            f"{source} is at step {state['step']}, after the last of the changed schedule: "
            f"{total_steps}"
        )


def apply_resume_with(config: Config, changes: Sequence[str]) -> Config:
    """The configuration with the `FIELD=VALUE` of --resume-with.

    Raises:
        ValueError: A field may not change in a resumed run, does not exist, or the value is wrong.
    """
    for change in changes:
        field = change.partition("=")[0]
        if not is_changeable(field):
            raise ValueError(
                f"--resume-with {change}: {field} cannot change in a resumed run, only "
                f"{', '.join(CHANGEABLE)}"
            )
    return apply_overrides(config, changes)
