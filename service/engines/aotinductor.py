"""Packages of AOTInductor, on the CPU or on CUDA: the one place of the service that uses torch.

torch is imported when a package is to be loaded, never before. A package needs no compiler where
it runs. The way on CUDA was not run on hardware.

Symbols: B batch, K candidates, H W canvas, h w mask at the mask stride.
"""

from __future__ import annotations

import importlib.util
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.model_config import ModelConfig
from pipeline.postprocess import TileCandidates
from pipeline.types import Tile
from service.cores import count_cores
from service.engines.aoti_package import (
    CPU_TARGET,
    PackageInfo,
    find_misfit,
    name_target,
    read_info,
    read_verified,
)
from service.engines.aoti_slots import (
    SLOTS,
    GraphSlot,
    Inputs,
    Select,
    Slot,
    SlotPool,
    batch_sizes,
)
from service.engines.base import BackendError, BackendOptions, Precision, collate, split_batch
from service.engines.kernels.select import MaskType

if TYPE_CHECKING:
    from torch import Tensor

Runner = Callable[["Sequence[Tensor]"], "Sequence[Tensor]"]
"""images [B, H, W, 3] and valid_hw [B, 2] -> scores, labels, mask_probs, on the runner's device."""


def find_obstacle(options: BackendOptions) -> str | None:
    """Why no package can run here, one sentence; None if one can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    try:
        import torch
    except (ImportError, OSError) as error:  # a wheel whose libraries are missing
        return f"torch cannot be imported: {error}"
    if options.device == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    if options.precision == "int8":
        return "AOTInductor packages have no int8"
    return None


def find_target(options: BackendOptions) -> str:
    """Target of the package that would run here: of the GPU, unless the CPU is asked for.

    Only to be called where `find_obstacle` finds none.
    """
    import torch

    if options.device == "cpu" or not torch.cuda.is_available():
        return CPU_TARGET
    return name_target(torch.cuda.get_device_capability())


def load_runner(data: bytes, device: str) -> Runner:
    """Loads a package's code; whoever calls it has verified the bytes.

    On CUDA a runner may be captured into CUDA graphs, and one thread at a time may call it.

    Raises:
        BackendError: torch cannot load it.
    """
    import torch

    cuda = device == "cuda"
    try:
        # The loader takes names only. It reads a file of ours, not the one that could change.
        with tempfile.NamedTemporaryFile(suffix=".pt2") as file:
            file.write(data)
            file.flush()
            # One runner: batches run beside each other as graphs, or each has all cores.
            loader = torch._C._aoti.AOTIModelPackageLoader(
                file.name, "model", cuda, 1, torch.cuda.current_device() if cuda else -1
            )
    except Exception as error:  # the loader's exceptions have no common base
        raise BackendError(f"torch cannot load the package: {error}") from error
    return lambda inputs: loader.run(list(inputs))


class AotiBackend:
    """A package that is loaded.

    Args:
        info: What the package says of itself.
        slots: What runs the batches, at least one.
        device: "cpu" or "cuda".
        concurrency: Threads that may be in `infer` at once.
        reason: See `Backend`.
    """

    name = "aotinductor"

    def __init__(
        self,
        info: PackageInfo,
        slots: Sequence[Slot],
        *,
        device: str,
        concurrency: int,
        reason: str,
    ) -> None:
        self.device = device
        self.precision: Precision = info.precision
        self.reason = reason
        self.concurrency = concurrency
        self._info = info
        self._pool = SlotPool(slots)

    def infer(self, tiles: Sequence[Tile]) -> list[TileCandidates]:
        """See `Backend.infer`."""
        self._check(tiles)
        slot = self._pool.take()
        try:
            return slot.run(tiles)
        except BackendError:
            raise
        except Exception as error:  # torch's exceptions have no common base
            raise BackendError(f"torch cannot run {len(tiles)} canvases: {error}") from error
        finally:
            self._pool.give(slot)

    def close(self) -> None:
        """See `Backend.close`."""
        self._pool.close()

    def _check(self, tiles: Sequence[Tile]) -> None:
        """The package's code would read past the end of a canvas that it was not made for."""
        if not 1 <= len(tiles) <= self._info.max_batch:
            raise BackendError(
                f"{len(tiles)} canvases, the package takes 1 to {self._info.max_batch}"
            )
        height, width = tiles[0].image.shape[:2]
        largest = self._info.max_canvas_hw
        if self._info.fixed_canvas:
            fits = (height, width) == largest
        else:
            fits = height <= largest[0] and width <= largest[1] and not (height % 32 or width % 32)
        if not fits:
            kind = "is for" if self._info.fixed_canvas else "takes multiples of 32 up to"
            raise BackendError(f"a canvas of {(height, width)}, the package {kind} {largest}")


class HostSlot:
    """Runs batches on the CPU; NumPy and torch share their memory.

    Args:
        runner: The package's.
        threads: Of one call.
    """

    def __init__(self, runner: Runner, threads: int) -> None:
        self._runner = runner
        self._threads = threads
        self._prepared = threading.local()

    def run(self, tiles: Sequence[Tile]) -> list[TileCandidates]:
        """See `Slot.run`."""
        import torch

        if not hasattr(self._prepared, "threads"):  # OpenMP counts for each calling thread
            torch.set_num_threads(self._threads)
            self._prepared.threads = self._threads
        images, valid_hw = collate(tiles)
        outputs = self._runner([torch.from_numpy(images), torch.from_numpy(valid_hw)])
        scores, labels, masks = (_to_numpy(output) for output in outputs)
        if len(scores) != len(tiles):
            raise BackendError(f"{len(tiles)} canvases gave {len(scores)} results")
        return list(split_batch(scores, labels, masks))

    def close(self) -> None:
        """See `Slot.close`."""


class CudaDevice:
    """What `GraphSlot` needs of CUDA: its own stream, pinned memory, graphs."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream.cuda_stream)

    def build_inputs(self, batch: int, canvas_hw: tuple[int, int]) -> Inputs:
        """See `GraphDevice.build_inputs`."""
        torch = self._torch
        shapes = ((batch, *canvas_hw, 3), torch.uint8), ((batch, 2), torch.int64)
        host = [torch.empty(shape, dtype=dtype, pin_memory=True) for shape, dtype in shapes]
        with torch.cuda.stream(self._stream):
            device = [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in shapes]
        return Inputs(host[0].numpy(), host[1].numpy(), host, device)

    def upload(self, inputs: Inputs) -> None:
        """See `GraphDevice.upload`."""
        with self._torch.cuda.stream(self._stream):
            for source, target in zip(inputs.host, inputs.device, strict=True):
                target.copy_(source, non_blocking=True)
            self._copied.record()

    def wait_for_upload(self) -> None:
        """See `GraphDevice.wait_for_upload`."""
        self._copied.synchronize()

    def capture(
        self, run: Callable[[], Sequence[Tensor]]
    ) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """See `GraphDevice.capture`.

        The graphs of a slot share their memory: only the last one's outputs are ever in use.
        """
        torch = self._torch
        with torch.cuda.stream(self._stream):
            run()  # what a library does only once must not be recorded
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            outputs = run()

        def replay() -> None:
            with torch.cuda.stream(self._stream):
                graph.replay()

        return replay, outputs

    def clone(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `GraphDevice.clone`."""
        with self._torch.cuda.stream(self._stream):
            return [tensor.clone() for tensor in tensors]

    def to_host(self, tensors: Sequence[Tensor]) -> list[Any]:
        """See `GraphDevice.to_host`."""
        with self._torch.cuda.stream(self._stream):
            return [_to_numpy(tensor.cpu()) for tensor in tensors]

    def close(self) -> None:
        """See `GraphDevice.close`; memory goes with its last user."""
        self._stream.synchronize()


def _to_numpy(tensor: Tensor) -> Any:
    """Shares the memory, unless NumPy has no such type (bfloat16) or the service none (float16)."""
    return (tensor.float() if tensor.dtype.itemsize == 2 else tensor).numpy()


def _load_select(config: ModelConfig) -> tuple[Select | None, str]:
    """Post-processing on the device where its kernels can be loaded, and which way it is."""
    import torch

    try:
        from service.engines.kernels import postprocessor as kernels

        postprocessor = kernels.CudaPostprocessor(
            config.postprocess, config.mask_stride, device_id=torch.cuda.current_device()
        )
    except (ImportError, OSError, BackendError) as error:
        return None, f"post-processed on the host: {error}"

    def select(outputs: list[Tensor], stream: int) -> Sequence[TileCandidates]:
        scores, labels, masks = outputs
        batch = kernels.DeviceBatch(
            scores=scores.data_ptr(),
            labels=labels.data_ptr(),
            mask_probs=masks.data_ptr(),
            mask_type=cast(MaskType, str(masks.dtype).removeprefix("torch.")),
            batch=scores.shape[0],
            candidates=scores.shape[1],
            mask_hw=(masks.shape[2], masks.shape[3]),
            release=outputs.clear,
        )
        return postprocessor.select(batch, stream)

    return select, "post-processed on the device"


def build_aoti_backend(package: Path, options: BackendOptions, config: ModelConfig) -> AotiBackend:
    """Verifies a package against config.json and against this machine, then loads it.

    Args:
        package: Its file, in the version's folder.
        options: Device and threads.
        config: Of the version; lists the package's hash.

    Raises:
        BackendError: There is no torch, the file is not the published one, or the package is for
            another machine, torch or larger limits than config.json has. None of its code has run.
    """
    obstacle = find_obstacle(options)
    if obstacle is not None:
        raise BackendError(obstacle)
    import torch

    data = read_verified(package, config.files)
    info = read_info(data)
    target = find_target(options)
    misfit = find_misfit(
        info,
        target=target,
        torch_version=torch.__version__,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
    )
    if misfit is not None:
        raise BackendError(f"{package.name}: {misfit}")
    if info.max_batch < config.limits.max_batch:
        raise BackendError(
            f"{package.name} takes {info.max_batch} canvases, config.json allows batches of "
            f"{config.limits.max_batch}"
        )
    made = f"package {package.name} made for torch {info.torch}"
    if target == CPU_TARGET:
        slots: list[Slot] = [HostSlot(load_runner(data, "cpu"), options.threads or count_cores())]
        return AotiBackend(info, slots, device="cpu", concurrency=1, reason=made)
    select, how = _load_select(config)
    capturing = threading.Lock()
    sizes = batch_sizes(info.max_batch)
    slots = [
        GraphSlot(CudaDevice(), load_runner(data, "cuda"), sizes, select, capturing)
        for _ in range(options.slots or SLOTS)
    ]
    return AotiBackend(info, slots, device="cuda", concurrency=len(slots), reason=f"{made}; {how}")
