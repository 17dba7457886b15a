"""Metrics of a run as a CSV file and as TensorBoard events."""

from __future__ import annotations

import csv
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

NOTE = "note"
CURVES_FILE = "metrics.csv"


class RunLog:
    """Writes metrics of a run to metrics.csv (step, name, value) and to TensorBoard.

    What happened besides, e.g. that a setting changed, is a row with the name `note`. A resumed run
    deletes the rows after its checkpoint, so that no step is recorded twice.

    Args:
        folder: Folder of the run.
        step: Step of the checkpoint that the run resumes from; 0: none.
        enabled: False writes nothing, for every process but the first.
    """

    def __init__(self, folder: Path, step: int, *, enabled: bool = True) -> None:
        self.enabled = enabled
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / CURVES_FILE
        kept: list[list[str]] = [["step", "name", "value"]]
        if step > 0 and path.exists():
            with path.open(newline="") as file:
                rows = [row for row in list(csv.reader(file))[1:] if len(row) == 3]
                kept += [row for row in rows if int(row[0]) <= step]
        self._file = path.open("w", newline="")
        self._csv = csv.writer(self._file)
        self._csv.writerows(kept)
        self._board = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Appends one row per metric."""
        if not self.enabled:
            return
        for name, value in numbers.items():
            self._csv.writerow([step, name, f"{value:.6g}"])
            self._board.add_scalar(name, value, step)
        self._file.flush()

    def note(self, step: int, text: str) -> None:
        """Records what happened after a step, and prints it."""
        if not self.enabled:
            return
        tqdm.write(f"solo-train: step {step}: {text}")
        self._csv.writerow([step, NOTE, text])
        self._board.add_text(NOTE, text, step)
        self._file.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self._file.close()
            self._board.close()
