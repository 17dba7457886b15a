"""The checkpoint to which a run goes back when its loss is not finite.

It is the newest one of a multiple of `checkpoint_every` from which one step has succeeded, at first
that of step 0. So it depends only on the steps, not on where a run was stopped and resumed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from service.files import replacing
from training import distributed
from training.weights.formats import load_checkpoint

ROLLBACK_FILE = "rollback.pt"
MOST = 3
"""Rollbacks of a run; each halves the learning rate."""


class Diverged(FloatingPointError):
    """The loss or the gradient of a step is not finite; the weights are still those before it."""


class Rollback:
    """The checkpoint to go back to.

    Args:
        folder: Output folder of the run.
        every: Steps between regular checkpoints.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.path = folder / ROLLBACK_FILE
        self._last, self._every = folder / "last.pt", every

    def keep(self, step: int) -> None:
        """After the first step from a regular checkpoint, makes that one the one to go back to."""
        regular = step > 1 and (step - 1) % self._every == 0
        if not (regular and distributed.is_main()):
            return
        with replacing(self.path) as partial:
            try:
                os.link(self._last, partial)  # no copy: `last.pt` is replaced, not overwritten
            except OSError:  # a file system without hard links
                shutil.copyfile(self._last, partial)

    def load(self, step: int, error: Diverged) -> dict[str, Any]:
        """The content of the checkpoint.

        Raises:
            Diverged: `error`, if the checkpoint is of the step that failed: a lower learning rate
                would not change that step.
        """
        distributed.from_main(None)  # until the first process has written it
        content = load_checkpoint(self.path)[1]
        if content["step"] == step:
            raise error
        return content


def describe_rollback(error: Diverged, step: int, count: int) -> str:
    """What a rollback to a step did, for the log."""
    return f"{error}; went back to step {step} with half the learning rate ({count} of {MOST})"


def give_up(error: Diverged, step: int) -> Diverged:
    """The error after the last rollback, to a step."""
    return Diverged(
        f"{error}, with the learning rate halved {MOST} times; last.pt is that of step {step}, "
        "and --resume-with schedule.lr=VALUE resumes it with another rate"
    )
