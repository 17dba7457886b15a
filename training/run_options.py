"""How a run is executed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.model.solo import Solo
from training.objective import Precision


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is executed; what it computes is in `Config`.

    Attributes:
        out: Folder for checkpoints, metrics.csv and TensorBoard events.
        seed: Seed of the initial weights, the order of the images and augmentation.
        device: `cpu`, `cuda`, ...; the device of this process.
        precision: Of the network's convolutions; the rest is float32.
        accumulate: Forward passes per step of each process; None: one for tiles, else one for
            every group of images that share a canvas.
        channels_last: Memory layout of images and weights.
        compile: Compile the network with `torch.compile`.
        checkpoint_every: Steps between checkpoints.
        validate_every: Epochs between validations; 0: only the last.
        max_seconds: Stop with a checkpoint after this time; None: no limit.
        resume: Resume from `out/last.pt` if it exists.
        init: Fills the model of a new run with trained weights; not called when a run is resumed.
        label: Name of the run in the progress bar.
        provenance: Stored in every checkpoint.
    """

    out: Path
    seed: int = 0
    workers: int = 1
    device: str = "cpu"
    checkpoint_every: int = 200
    validate_every: int = 5
    log_every: int = 10
    max_seconds: float | None = None
    resume: bool = True
    precision: Precision = "fp32"
    accumulate: int | None = None
    channels_last: bool = False
    compile: bool = False
    init: Callable[[Solo], None] | None = None
    label: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
