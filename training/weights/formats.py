"""Checkpoint files: our own, and those that other code wrote with `torch.save`.

A checkpoint is a pickle, and a pickle can call any function when it is loaded. PyTorch's restricted
loader (`weights_only=True`) builds tensors and plain types only. Checkpoints of mmdetection also
hold logs and settings as objects of mmengine, mmcv and numpy. The loader replaces these by inert
stand-ins, so such files can be read without running any of that code.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from service.files import replacing
from training.configs.io import config_from_dict, config_to_dict
from training.configs.schema import Config
from training.model.solo import Solo

FORMAT = "solo-serve checkpoint"
FORMAT_VERSION = 1
WEIGHTS_FILE = "weights.pt"
"""The checkpoint that a version in model_repo can have beside its graph."""
REQUIRED = ("format_version", "config", "model", "ema")
WEIGHT_ENTRIES = ("state_dict", "model")
_LISTED = 5  # names that a message lists
_STARTS = (b"PK", b"\x80")  # a zip archive (PyTorch 1.6 and later), a pickle (before)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message says which and why."""


class OwnCheckpointError(CheckpointError):
    """The file is already a checkpoint of solo-serve."""


class _Inert:
    """Stand-in for an object that is not needed: accepts any arguments and does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_NUMPY_TYPES = "Bool Float16 Float32 Float64 Int8 Int16 Int32 Int64 UInt8 UInt16 UInt32 UInt64 Str"
_INERT: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((_Inert, f"numpy.dtypes.{name}DType") for name in _NUMPY_TYPES.split()),
    (_Inert, "numpy.ndarray"),
    (_Inert, "numpy.dtype"),
    (_Inert, "numpy.core.multiarray.scalar"),
    (_Inert, "numpy._core.multiarray.scalar"),
    (_Inert, "numpy.core.multiarray._reconstruct"),
    (_Inert, "numpy._core.multiarray._reconstruct"),
    (_Inert, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_Inert, "builtins.getattr"),  # the pickle of a HistoryBuffer uses it to name its methods
    (OrderedDict, "mmengine.config.config.ConfigDict"),  # the loader accepts no other dict type
    (OrderedDict, "mmcv.utils.config.ConfigDict"),
    (OrderedDict, "addict.addict.Dict"),
]


def list_names(names: Iterable[str]) -> str:
    """The first names of a list and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more


def save_checkpoint(path: Path, config: Config, state: dict[str, Any]) -> None:
    """Writes a checkpoint atomically: after a crash the file is the old or the new one.

    The content is flushed before the file is renamed. Otherwise, after a power failure, the new
    name could exist without its content.

    Args:
        path: File to write.
        config: The configuration.
        state: `model`, `ema` and whatever else is to be stored; tensors and plain types.

    Raises:
        OSError: It cannot be written, e.g. the disk is full; an older file stays as it is.
    """
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": config_to_dict(config),
        **state,
    }
    data = io.BytesIO()
    torch.save(content, data)  # to memory: on a full disk its own writer hides the cause
    try:
        with replacing(path) as partial:
            partial.write_bytes(data.getbuffer())
    except OSError as error:
        stays = "; the one before stays" if path.exists() else ""
        raise OSError(
            f"the checkpoint {path} ({len(data.getbuffer()) / 1e6:.0f} MB) cannot be written: "
            f"{error.strerror or error}{stays}"
        ) from error


def load_checkpoint(path: Path) -> tuple[Config, dict[str, Any]]:
    """Reads one of our checkpoints; no code of the file is run.

    Raises:
        CheckpointError: Missing, damaged, or not one of ours.
    """
    content = _load(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a solo-serve checkpoint")
    missing = [key for key in REQUIRED if key not in content]
    if missing:
        raise CheckpointError(f"{path} is incomplete: it has no {', '.join(missing)}")
    if content["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {content['format_version']}, expected {FORMAT_VERSION}"
        )
    try:
        return config_from_dict(content.pop("config")), content
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_model(path: Path) -> tuple[Config, Solo]:
    """The model of a checkpoint in evaluation mode, with the averaged weights if it has any."""
    config, content = load_checkpoint(path)
    model = Solo(config.model, config.num_classes)
    load_weights(model, content["ema"] or content["model"], str(path))
    return config, model.eval()


def load_provenance(path: Path) -> dict[str, Any]:
    """Where a checkpoint comes from, as solo-import or solo-train stored it.

    Returns:
        For one of solo-train `training`: its command, commit and data, seed, steps and hours; what
        an older version did not store is "unknown".
    """
    content = load_checkpoint(path)[1]
    provenance: dict[str, Any] = content.get("provenance", {})
    if "step" not in content:
        return provenance
    unknown = dict.fromkeys(("command", "commit", "data", "seed"), "unknown")
    progress = {"steps": content["step"], "hours": round(content.get("seconds", 0.0) / 3600, 2)}
    known = {"seed": content["seed"]} if "seed" in content else {}
    training = {**unknown, **provenance.get("training", {}), **known, **progress}
    return {**provenance, "training": training}


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copies a state dict into a model.

    Raises:
        CheckpointError: The weights do not fit; `check_fit` tells how.
    """
    check_fit(state, model.state_dict(), source)
    model.load_state_dict(state)


def check_fit(
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    source: str,
    file_names: Mapping[str, str] | None = None,
) -> None:
    """Compares names and shapes of a state dict with those of a model.

    Args:
        state: The weights.
        expected: State dict of the model; only names and shapes are read, so it may be on the
            meta device.
        source: What a message calls the weights.
        file_names: The names that the file has for the weights, where they are not those of
            `state`.

    Raises:
        CheckpointError: Names the first keys that are unexpected, missing or of another shape.
    """
    names = file_names or {}
    unexpected = [names.get(key, key) for key in state if key not in expected]
    missing = [key for key in expected if key not in state]
    shapes = [
        f"{names.get(key, key)} {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    for problem, keys, offsets in (
        ("unexpected keys", unexpected, "this configuration does not have"),
        ("missing keys", missing, "the file does not have"),
        ("other shapes", shapes, ""),
    ):
        deformable = offsets and any(".conv_offset." in key for key in keys)
        hint = f" (of deformable convolutions, which {offsets})" if deformable else ""
        refuse_keys(f"{problem}{hint}", keys, source)


def refuse_keys(problem: str, keys: Iterable[str], source: str) -> None:
    """Raises a `CheckpointError` that names the first of the keys, if there are any."""
    listed = list(keys)
    if listed:
        raise CheckpointError(f"weights of {source} do not fit, {problem}: {list_names(listed)}")


@dataclass(frozen=True)
class WeightsFile:
    """Weights of a file that other code wrote.

    Attributes:
        tensors: By the names of the file; half precision is converted to float32.
        class_names: Class names that the file has, in the order of the outputs; may be empty.
        notes: What in the file is not used or was changed, and why; one line each.
    """

    tensors: dict[str, Tensor]
    class_names: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def read_weights(path: Path, *, allow_pickle: bool = False) -> WeightsFile:
    """The weights of a checkpoint or a bare state dict that other code wrote.

    Args:
        path: A file of `torch.save`, of any version.
        allow_pickle: Loads without restriction, which runs any code in the file.

    Raises:
        OwnCheckpointError: It is one of ours.
        CheckpointError: It cannot be read, needs more than tensors and plain types, or holds no
            weights; says which and what to do.
    """
    content = _load(path, allow_pickle)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a checkpoint")
    if content.get("format") == FORMAT:
        raise OwnCheckpointError(
            f"{path} is already a checkpoint of solo-serve: solo-eval and solo-export read it as "
            "it is"
        )
    notes = []
    state: dict[Any, Any] = content
    meta: dict[Any, Any] = {}
    entry = next((e for e in WEIGHT_ENTRIES if isinstance(content.get(e), dict)), None)
    if entry is not None:
        state = content[entry]
        meta = content["meta"] if isinstance(content.get("meta"), dict) else {}
        unused = sorted(str(key) for key in content if key not in (entry, "meta"))
        if unused:
            notes.append(f"entries that hold no weights of the model: {', '.join(unused)}")
    tensors, changes = _clean(state, path)
    return WeightsFile(tensors, _class_names(meta), notes + changes)


def _load(path: Path, allow_pickle: bool = False) -> Any:
    """The content of a file of `torch.save`.

    Raises:
        CheckpointError: It cannot be read, or would run code and `allow_pickle` is not set.
    """
    cause: Exception | None = None
    try:
        with path.open("rb") as file:
            start = file.read(16)
        if start.startswith(_STARTS):
            with torch.serialization.safe_globals(_INERT):
                return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
        reason = f"it begins with {start!r}"
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint at {path}") from error
    except Exception as error:  # loading a damaged file can fail with any exception
        reason, cause = _describe(error, restricted=not allow_pickle), error
    raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}") from cause


def _describe(error: Exception, *, restricted: bool) -> str:
    """Why loading failed."""
    if isinstance(error, ModuleNotFoundError):
        return f"it needs the Python module {error.name!r}, which is not installed"
    if not (restricted and isinstance(error, pickle.UnpicklingError)):
        return f"it may be damaged: {str(error) or repr(error)}"
    call = re.search(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)", str(error))
    return (
        f"its pickle {f'would call {call[1]}' if call else 'is damaged or unusual'}. If you trust "
        "the author of the file, solo-import --allow-pickle loads it without this protection, "
        "which runs any code in the file with your rights"
    )


def _clean(state: dict[Any, Any], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under names without `module.`, in float32, and what was changed.

    Raises:
        CheckpointError: An entry is not a tensor, or has a number that is not finite.
    """
    notes = []
    others = [f"{key} ({type(v).__name__})" for key, v in state.items() if not _is_weight(key, v)]
    if others or not state:
        raise CheckpointError(
            f"{path} holds no state dict of tensors"
            + (f"; it has {list_names(others)}" if others else ": it is empty")
        )
    tensors: dict[str, Tensor] = dict(state)
    while all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
        notes.append("the prefix 'module.' of (distributed) data parallel training is removed")
    halves = [key for key, v in tensors.items() if v.is_floating_point() and v.element_size() != 4]
    if halves:
        tensors |= {key: tensors[key].float() for key in halves}
        notes.append(f"{len(halves)} tensors are converted to float32")
    broken = [key for key, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise CheckpointError(f"{path} has weights that are not finite: {list_names(broken)}")
    return tensors, notes


def _is_weight(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _class_names(meta: dict[Any, Any]) -> tuple[str, ...]:
    """Class names of mmdetection's meta, 2.x or 3.x; empty if there are none."""
    data = meta.get("dataset_meta")
    found = data.get("classes", data.get("CLASSES")) if isinstance(data, dict) else None
    names = found or meta.get("CLASSES") or ()
    if isinstance(names, str):
        names = (names,)
    if not isinstance(names, tuple | list) or not all(isinstance(n, str) for n in names):
        return ()
    return tuple(names)
