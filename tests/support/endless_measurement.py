"""solo-train that measures a step without end: `FOLDER ARGUMENT...`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import training.precision
from training.data.loader import Batch
from training.train import main as train
from training.trainer import Trainer


def main(folder: Path, arguments: list[str]) -> int:
    """Stays for ten minutes in the third step; each process leaves a file in `folder` before."""

    def compute(trainer: Trainer, batches: Sequence[Batch]) -> dict[str, float]:
        if trainer.step == 2:
            (folder / f"in_{trainer.share.rank}").touch()
            time.sleep(600)
        return dict.fromkeys(("category", "mask", "total", "num_positives"), 0.0)

    training.precision.has_native_bf16 = lambda device: True
    Trainer._backward = compute  # type: ignore[assignment, method-assign]
    return train(arguments)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2:]))
