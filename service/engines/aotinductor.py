"""Packages of AOTInductor, on the CPU or on CUDA: the only module of the service that uses torch.

torch is imported only when a package is loaded. A package needs no compiler where it runs. CUDA was
NOT RUN ON HARDWARE.

Symbols: B batch, K candidates, H W canvas, h w mask at the mask stride.
"""

from __future__ import annotations

import importlib.util
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from pipeline.model_config import ModelConfig
from pipeline.types import Int64, UInt8
from service.cores import count_cores
from service.engines.aoti_package import (
    CPU_TARGET,
    PackageInfo,
    PackagePrecision,
    find_misfit,
    name_target,
    read_info,
    read_verified,
)
from service.engines.base import BackendError, BackendOptions
from service.engines.calls import BatchShape, EngineOutputs, EngineRun, OutputLayout, SlotMemory
from service.engines.device import CudaDevice
from service.engines.device_slot import DeviceSlot, build_device_slots, list_shapes
from service.engines.kernels.postprocessor import load_select
from service.engines.kernels.select import MaskType
from service.engines.slots import HostSlot, Slot, SlotBackend, build_on_each, describe_gpus

if TYPE_CHECKING:
    from torch import Tensor

MASK_TYPES: dict[PackagePrecision, MaskType] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}

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
    """Target of the package that would run here: the GPU's, unless the CPU is asked for.

    Call it only if `find_obstacle` finds none.
    """
    import torch

    if options.device == "cpu" or not torch.cuda.is_available():
        return CPU_TARGET
    return name_target(torch.cuda.get_device_capability(options.gpus[0]))


def load_runner(data: bytes, device: str, gpu: int = 0) -> Runner:
    """Loads a package's code; the caller has verified the bytes.

    On CUDA a runner may be captured into CUDA graphs, and one thread at a time may call it.

    Args:
        data: The package.
        device: "cpu" or "cuda".
        gpu: Ordinal of the GPU that it runs on.

    Raises:
        BackendError: torch cannot load it.
    """
    import torch

    cuda = device == "cuda"
    try:
        # The loader takes a file name. It reads a copy, not the file that could change.
        with tempfile.NamedTemporaryFile(suffix=".pt2") as file:
            file.write(data)
            file.flush()
            # One runner: on CUDA each slot loads its own, on the CPU a call has all cores.
            loader = torch._C._aoti.AOTIModelPackageLoader(
                file.name, "model", cuda, 1, gpu if cuda else -1
            )
    except Exception as error:  # the loader's exceptions have no common base
        raise BackendError(f"torch cannot load the package: {error}") from error
    return lambda inputs: loader.run(list(inputs))


def check_canvases(info: PackageInfo, batch: int, canvas_hw: tuple[int, int]) -> None:
    """Refuses what the package was not made for: its code would read past the end.

    Raises:
        BackendError: Names the batch or the canvas.
    """
    if not 1 <= batch <= info.max_batch:
        raise BackendError(f"{batch} canvases, the package takes 1 to {info.max_batch}")
    height, width = canvas_hw
    largest = info.max_canvas_hw
    if info.fixed_canvas:
        fits = canvas_hw == largest
    else:
        fits = height <= largest[0] and width <= largest[1] and not (height % 32 or width % 32)
    if not fits:
        kind = "is for" if info.fixed_canvas else "takes multiples of 32 up to"
        raise BackendError(f"a canvas of {canvas_hw}, the package {kind} {largest}")


def build_host_slot(info: PackageInfo, runner: Runner, threads: int) -> HostSlot:
    """A slot on the CPU; NumPy and torch share the memory.

    Args:
        info: The package's metadata.
        runner: The package's.
        threads: Of one call.
    """
    prepared = threading.local()

    def run(images: UInt8, valid_hw: Int64) -> list[NDArray[Any]]:
        import torch

        check_canvases(info, len(images), (images.shape[1], images.shape[2]))
        if not hasattr(prepared, "threads"):  # OpenMP has a number for each calling thread
            torch.set_num_threads(threads)
            prepared.threads = threads
        outputs = runner([torch.from_numpy(images), torch.from_numpy(valid_hw)])
        # NumPy has no bfloat16.
        return [(o.float() if o.dtype.itemsize == 2 else o).numpy() for o in outputs]

    return HostSlot(run)


class AotiCall:
    """A package on CUDA, called and recorded on a slot's stream.

    Args:
        info: The package's metadata.
        runner: The package's code, used by this slot alone.
        mask_stride: Canvas px per mask px.
        stream: The slot's, by its handle.
        gpu: Ordinal of the slot's GPU.
    """

    def __init__(
        self, info: PackageInfo, runner: Runner, mask_stride: int, stream: int, gpu: int = 0
    ) -> None:
        import torch

        self._torch = torch
        self._info = info
        self._runner = runner
        self._mask_stride = mask_stride
        self._gpu = gpu
        self._stream = torch.cuda.ExternalStream(stream, gpu)  # type: ignore[no-untyped-call]
        # The graphs of a slot share their memory: their outputs are copied before the next run.
        self._pool = torch.cuda.graph_pool_handle()
        self._outputs: Sequence[Tensor] = ()

    def bind(self, shape: BatchShape, memory: SlotMemory) -> EngineRun:
        """Wraps the slot's inputs as tensors; the package allocates its outputs.

        Raises:
            BackendError: The package was not made for the shape.
        """
        check_canvases(self._info, shape.batch, shape.canvas_hw)
        torch = self._torch
        inputs = [
            view_tensor(memory.images, (shape.batch, *shape.canvas_hw, 3), "|u1", self._gpu),
            view_tensor(memory.valid_hw, (shape.batch, 2), "<i8", self._gpu),
        ]

        def enqueue() -> EngineOutputs:
            with torch.cuda.stream(self._stream):
                # Held until the next run, when copies of them are queued on the same stream.
                self._outputs = [output.contiguous() for output in self._runner(inputs)]
            return self._describe(self._outputs, shape)

        def record() -> EngineRun:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                outputs = enqueue()

            def replay() -> EngineOutputs:
                with torch.cuda.stream(self._stream):
                    graph.replay()
                return outputs

            return EngineRun(replay, close=graph.reset)

        return EngineRun(enqueue, record)

    def _describe(self, outputs: Sequence[Tensor], shape: BatchShape) -> EngineOutputs:
        """Addresses of outputs whose shapes and types are those of the graph contract.

        Raises:
            BackendError: They are not.
        """
        scores, labels, masks = outputs
        layout = OutputLayout(
            candidates=scores.shape[-1],
            mask_stride=self._mask_stride,
            mask_type=MASK_TYPES[self._info.precision],
        )
        types = {"scores": "float32", "labels": "int64", "mask_probs": layout.mask_type}
        for (name, wanted), output in zip(layout.shapes(shape).items(), outputs, strict=True):
            found = tuple(output.shape), str(output.dtype).removeprefix("torch.")
            if found != (wanted, types[name]):
                raise BackendError(f"{name} is {found}, expected {(wanted, types[name])}")
        return EngineOutputs(layout, scores.data_ptr(), labels.data_ptr(), masks.data_ptr())

    def close(self) -> None:
        """Drops the package's code and its last outputs."""
        self._outputs = ()
        del self._runner


def view_tensor(address: int, shape: tuple[int, ...], kind: str, gpu: int = 0) -> Tensor:
    """Memory of the device as a tensor that does not own it.

    Args:
        address: Of the first element.
        shape: Dense, row-major.
        kind: NumPy's name of the element type, e.g. "<i8".
        gpu: Ordinal of the GPU; with another one torch would copy.
    """
    import torch

    class Array:
        __cuda_array_interface__ = {  # noqa: RUF012
            "shape": shape,
            "typestr": kind,
            "data": (address, False),
            "version": 3,
        }

    return torch.as_tensor(Array(), device=f"cuda:{gpu}")


def build_aoti_backend(package: Path, options: BackendOptions, config: ModelConfig) -> SlotBackend:
    """Verifies a package against config.json and against this machine, then loads it.

    Args:
        package: Its file, in the version's folder.
        options: Device, threads and slots.
        config: Of the version; lists the package's hash.

    Raises:
        BackendError: There is no torch, the file is not the published one, or the package is for
            another machine, another torch or smaller batches than config.json allows; then none of
            its code has run. Or CUDA does not work.
    """
    obstacle = find_obstacle(options)
    if obstacle is not None:
        raise BackendError(obstacle)
    data = read_verified(package, config.files)
    info = read_info(data)
    _check_fit(package.name, info, find_target(options), config)
    device = "cpu" if info.target == CPU_TARGET else "cuda"
    made = f"package {package.name} made for torch {info.torch}"
    return serve_runners(lambda gpu: load_runner(data, device, gpu), info, options, config, made)


def serve_runners(
    load: Callable[[int], Runner],
    info: PackageInfo,
    options: BackendOptions,
    config: ModelConfig,
    reason: str,
) -> SlotBackend:
    """The backend of code that computes the graph; on CUDA each slot loads its own.

    Args:
        load: Gives the code for a GPU, by its ordinal.
        info: What it is for.
        options: Threads and slots.
        config: Of the version.
        reason: Why this engine, one sentence.

    Raises:
        BackendError: CUDA does not work, or the code fails on the model's canvas.
    """
    if info.target == CPU_TARGET:
        slot = build_host_slot(info, load(0), options.threads or count_cores())
        return serve_package([slot], info, "cpu", reason)
    import torch

    torch.backends.cudnn.benchmark = True  # a model has few canvases
    places: set[str] = set()

    def build(gpu: int) -> Sequence[Slot]:
        device = CudaDevice(gpu)
        select = load_select(device, config.postprocess, config.mask_stride)
        places.add(f"host: {select}" if isinstance(select, str) else "device")

        def build_slot() -> DeviceSlot:
            return DeviceSlot(
                device,
                lambda stream: AotiCall(info, load(gpu), config.mask_stride, stream, gpu),
                max_batch=info.max_batch,
                canvases=list_shapes(config),
                select=None if isinstance(select, str) else select,
            )

        return build_device_slots(options.slots, build_slot, config, threads=False)[0]

    slots = build_on_each(options.gpus, build)
    how = f"{describe_gpus(options)}; post-processed on the {'; '.join(sorted(places))}"
    return serve_package(slots, info, "cuda", f"{reason}{how}")


def _check_fit(name: str, info: PackageInfo, target: str, config: ModelConfig) -> None:
    import torch

    misfit = find_misfit(
        info,
        target=target,
        torch_version=torch.__version__,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
    )
    if misfit is not None:
        raise BackendError(f"{name}: {misfit}")
    if info.max_batch < config.limits.max_batch:
        raise BackendError(
            f"{name} takes {info.max_batch} canvases, config.json allows batches of "
            f"{config.limits.max_batch}"
        )


def serve_package(
    slots: Sequence[Slot], info: PackageInfo, device: str, reason: str
) -> SlotBackend:
    """The backend of a package's slots."""
    return SlotBackend(
        slots,
        name="aotinductor",
        device=device,
        precision=info.precision,
        reason=reason,
        max_batch=info.max_batch,
    )
