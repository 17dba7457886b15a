"""The checkpoint to which a run goes back when its loss is not finite.

It is the newest one of a multiple of `checkpoint_every` from which one step has succeeded, at first
that of step 0. So it depends only on the steps, not on where a run was stopped and resumed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROLLBACK_FILE = "rollback.pt"
MOST = 3
"""Rollbacks of a run; each halves the learning rate."""


class Diverged(FloatingPointError):
    """The loss or the gradient of a step is not finite; the weights are still those before it."""


def keep_for_rollback(last: Path) -> None:
    """Makes the current content of the checkpoint `last` the one to go back to."""
    target = last.with_name(ROLLBACK_FILE)
    partial = target.with_name(f"{ROLLBACK_FILE}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(last, partial)  # no copy: `last` is replaced, not overwritten
    except OSError:  # a file system without hard links
        shutil.copyfile(last, partial)
    os.replace(partial, target)
