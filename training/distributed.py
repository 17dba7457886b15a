"""Training and evaluation in several processes that torchrun starts.

Without torchrun every function here does nothing or returns its argument, so callers need no
special case. Gradients are exchanged between GPUs by NCCL; everything else is small and is
exchanged on the CPU by gloo.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")
TIMEOUT = timedelta(hours=1)
"""Timeout of a collective operation; long because the first process scores validations alone."""
_store: Store | None = None
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out")


def rank() -> int:
    """Rank of this process, 0 for the first or only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


@contextlib.contextmanager
def joined(device: str) -> Iterator[str]:
    """Joins the process group if torchrun started this process (WORLD_SIZE is set).

    Args:
        device: `cpu` or `cuda`; each process uses the GPU of its LOCAL_RANK.

    Yields:
        The device of this process.

    Raises:
        ValueError: The device is one GPU for all processes, or this process has no GPU.
    """
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    if device == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"process {index} of this machine has no GPU: there are {torch.cuda.device_count()}"
            )
        device = f"cuda:{index}"
        torch.cuda.set_device(index)
    elif device != "cpu":
        raise ValueError(f"device is {device!r}, expected cpu or cuda under torchrun")
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    global _store
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    _store = dist.PrefixStore("training", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    yield device
    # Not after an error: the other processes might never get here; the exit of this one tells them.
    dist.destroy_process_group()


def shared_store() -> Store | None:
    """A store of keys and values that all processes share; None: there is only this process."""
    return _store if world_size() > 1 else None


def is_lost_peer(error: BaseException) -> bool:
    """Whether the cause of an error is the end of another process."""
    if not dist.is_initialized() or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(text in str(error) for text in LOST_PEER)


def sum_over_processes(values: Sequence[float]) -> list[float]:
    """Sum of each value over the processes, in float64."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return [float(v) for v in total]


def any_process(*flags: bool) -> list[bool]:
    """Whether each flag is set in at least one process."""
    return [total > 0 for total in sum_over_processes([float(flag) for flag in flags])]


def gather_to_main(items: list[T]) -> list[T]:
    """Items of all processes in the order of the ranks; empty in every process but the first."""
    if world_size() == 1:
        return items
    gathered: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(items, gathered)
    return [item for part in gathered or [] for item in part]


def from_main(value: T) -> T:
    """Broadcasts the value of the first process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrites the tensors of every process with those of the first."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def synchronised(module: nn.Module) -> nn.Module:
    """Averages gradients over the processes during `backward`; returns a single process's module.

    Every trained parameter must get a gradient, possibly zero, in every backward pass. Buffers are
    those of the first process.
    """
    if world_size() == 1:
        return module
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


def without_synchronisation(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Context that accumulates gradients locally, for all but the last backward pass of a step."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


def warn(program: str, lines: Iterable[str]) -> None:
    """Prints lines to standard error, in the first process only."""
    if is_main():
        for line in lines:
            print(f"{program}: {line}", file=sys.stderr)
