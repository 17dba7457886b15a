"""Reads weights from files that others wrote with `torch.save`, without running code of theirs.

A checkpoint is a pickle, and a pickle may name any function to be called. PyTorch's restricted
loader (`weights_only=True`) builds tensors and plain types alone. Checkpoints of mmdetection also
hold logs and settings as objects of mmengine, mmcv and numpy; the loader is given an inert
stand-in for those names, so that such files can be read although nothing of them is run.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.checkpoint import FORMAT, CheckpointError

WEIGHT_ENTRIES = ("state_dict", "model")
_NAMED = 5  # keys that a message names


class OwnCheckpointError(CheckpointError):
    """The file is a checkpoint of ours already."""


class _Inert:
    """Stands in for an object that is of no use here; takes anything, does nothing."""

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
    (_Inert, "builtins.getattr"),  # how the pickle of a HistoryBuffer names its methods
    (OrderedDict, "mmengine.config.config.ConfigDict"),  # the one kind of dict that is taken
    (OrderedDict, "mmcv.utils.config.ConfigDict"),
    (OrderedDict, "addict.addict.Dict"),
]
_STARTS = (b"PK", b"\x80")  # a zip archive (PyTorch 1.6 and later), a pickle (before)


@dataclass(frozen=True)
class WeightsFile:
    """Weights as somebody else's file has them.

    Attributes:
        tensors: By the file's names, float32 where they were half precision.
        class_names: What the file says of its classes, in the order of the outputs; or empty.
        notes: What of the file is not used, or was changed, and why; one line each.
    """

    tensors: dict[str, Tensor]
    class_names: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def read_weights(path: Path, *, allow_pickle: bool = False) -> WeightsFile:
    """The weights of a checkpoint or a bare state dict.

    Args:
        path: A file of `torch.save`, of any age.
        allow_pickle: Loads without restriction, which runs whatever code the file names.

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
            f"{path} is a checkpoint of solo-serve already: solo-eval and solo-export take it as "
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


def _load(path: Path, allow_pickle: bool) -> Any:
    try:
        with path.open("rb") as file:
            start = file.read(16)
        if not start.startswith(_STARTS):
            raise CheckpointError(f"{path} is no PyTorch checkpoint, it begins with {start!r}")
        with torch.serialization.safe_globals(_INERT):
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"no file at {path}") from error
    except pickle.UnpicklingError as error:
        if allow_pickle:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        named = re.search(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)", str(error))
        raise CheckpointError(
            f"{path} cannot be read as plain weights: its pickle "
            + (f"names {named[1]}, which loading would call" if named else "is damaged or unusual")
            + ". If you trust whoever wrote the file, --allow-pickle loads it without this "
            "protection: that runs any code which the file contains, with your rights"
        ) from error
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{path} needs the Python module {error.name!r}, which is not installed"
        ) from error
    except Exception as error:  # a damaged file fails in whatever way its bytes lead to
        raise CheckpointError(
            f"{path} cannot be read, it may be damaged: {str(error) or repr(error)}"
        ) from error


def _clean(state: dict[Any, Any], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under names without `module.`, in float32, and what was changed.

    Raises:
        CheckpointError: An entry is no tensor or holds a number that is not finite.
    """
    notes = []
    others = [f"{key} ({type(v).__name__})" for key, v in state.items() if not _is_weight(key, v)]
    if others or not state:
        raise CheckpointError(
            f"{path} holds no state dict of tensors"
            + (f"; it has {_first(others)}" if others else ": it is empty")
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
        raise CheckpointError(f"{path} has weights that are not finite: {_first(broken)}")
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
    return tuple(name for name in names)


def _first(listed: list[str]) -> str:
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return ", ".join(listed[:_NAMED]) + more
