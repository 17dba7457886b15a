"""OpenVINO on the CPU: the graph of float32, computed in the precision asked for.

A call has one canvas: a batch is its canvases one after the other, so its results are those of its
canvases alone, bit for bit. A model with one canvas is compiled for that shape.
"""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.canvases import list_canvases
from pipeline.model_config import ModelConfig
from pipeline.postprocess import TileCandidates
from pipeline.types import Tile
from service.cores import count_cores
from service.engines.base import (
    BackendError,
    BackendOptions,
    Precision,
    collate,
    divide_calls,
    split_batch,
)
from service.engines.local_cache import find_local_cache, lock_file
from service.engines.ort_session import INPUTS, OUTPUTS, check_signature
from service.engines.slots import SlotBackend

logger = logging.getLogger(__name__)

HINTS: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_CAPABILITIES: dict[Precision, str] = {"bf16": "BF16", "fp16": "FP16"}
_TYPES = {"u8": "uint8", "i64": "int64", "f32": "float", "f16": "float16", "bf16": "bfloat16"}
_ARM = ("aarch64", "arm64")


def is_installed() -> bool:
    """Whether the package is there; it is not imported."""
    return find_spec("openvino") is not None


def find_obstacle(options: BackendOptions) -> str | None:
    """Why OpenVINO cannot run with the options, or None."""
    if options.device == "cuda":
        return "it runs on the CPU"
    if not is_installed():
        return "it is not installed (extra openvino)"
    if options.precision not in HINTS:
        return f"{options.precision} graphs are made for ONNX Runtime"
    if options.precision != "fp32":
        try:
            found = _list_capabilities()
        except Exception as error:  # the library's exceptions have no common base
            return f"it cannot be loaded: {error}"
        if _CAPABILITIES[options.precision] not in found:
            return f"this CPU does not compute in {options.precision}, only in {sorted(found)}"
    return None


def find_native_precision() -> Precision:
    """The precision in which this CPU is fastest: bf16 or, on ARM, fp16, where it has them.

    Raises:
        Exception: OpenVINO cannot be loaded.
    """
    found = _list_capabilities()
    if platform.machine().lower() in _ARM and "FP16" in found:
        return "fp16"
    return "bf16" if "BF16" in found else "fp32"


def _import() -> Any:
    """The library without its telemetry, which sends usage data at the import."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _build_core() -> Any:
    return _import().Core()


@cache
def _list_capabilities() -> frozenset[str]:
    return frozenset(_build_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def build_openvino_backend(
    model: bytes | Path, options: BackendOptions, config: ModelConfig | None = None
) -> SlotBackend:
    """Compiles the graph.

    Args:
        model: The graph's bytes, or its path where it has data files beside it.
        options: Precision, threads, slots, and the cache of compiled graphs.
        config: Says what the canvases are.

    Raises:
        BackendError: The graph cannot be read or breaks the graph contract.
    """
    count, options = divide_calls(options, config)
    compiled, tensor = _compile(_read(model, config), options, count), _import().Tensor
    return SlotBackend(
        [OpenVinoSlot(compiled.create_infer_request(), tensor) for _ in range(count)],
        name="openvino",
        device="cpu",
        precision=options.precision,
        reason="OpenVINO on the CPU",
    )


def _read(model: bytes | Path, config: ModelConfig | None) -> Any:
    """The graph with a batch of 1 and, if the model has one canvas, with that canvas' shape."""
    try:
        graph = _build_core().read_model(model)
    except Exception as error:  # the library's exceptions have no common base
        raise BackendError(f"OpenVINO cannot load the graph: {_shorten(error)}") from error
    if check_signature(_describe(graph)) != "float32":
        raise BackendError("OpenVINO takes the graph whose masks are float32")
    canvases = list_canvases(config.input) if config is not None else []
    height, width = canvases[0] if len(canvases) == 1 else (-1, -1)
    try:
        graph.reshape({"images": [1, height, width, 3], "valid_hw": [1, 2]})
    except Exception as error:
        raise BackendError(f"the graph takes no canvas alone: {_shorten(error)}") from error
    return graph


def _compile(graph: Any, options: BackendOptions, count: int) -> Any:
    """`count` streams, one for each slot, of as many threads as a call has."""
    wanted = {
        "INFERENCE_PRECISION_HINT": HINTS[options.precision],
        "NUM_STREAMS": count,
        "INFERENCE_NUM_THREADS": count * (options.threads or count_cores()),
        # The threads that decode and encode share the cores.
        "ENABLE_CPU_PINNING": False,
    }
    folder = find_local_cache(options.cache)
    error: Exception | None = None
    if folder is not None:
        cache = folder / "openvino"
        try:
            with lock_file(cache):  # one that reads a file while another writes it dies of SIGBUS
                return _compile_with(graph, wanted | {"CACHE_DIR": str(cache)})
        except Exception as of_cache:  # perhaps a file of it is damaged, or the disk is full
            error = of_cache
    try:
        compiled = _compile_with(graph, wanted)
    except Exception as of_graph:
        raise BackendError(f"OpenVINO cannot compile the graph: {_shorten(of_graph)}") from of_graph
    if error is not None:
        logger.warning("OpenVINO compiled without its cache: %s", _shorten(error))
    return compiled


def _compile_with(graph: Any, properties: Mapping[str, Any]) -> Any:
    """In a core of its own: a cache folder would hold for all that is compiled in it."""
    return _build_core().compile_model(graph, "CPU", dict(properties))


def _describe(graph: Any) -> Any:
    """Inputs and outputs in the words of ONNX Runtime's sessions."""

    def list_ports(ports: Sequence[Any]) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(
                name=port.any_name,
                type=f"tensor({_TYPES.get(name := port.element_type.get_type_name(), name)})",
                shape=[d.get_length() if d.is_static else str(d) for d in port.partial_shape],
            )
            for port in ports
        ]

    inputs, outputs = list_ports(graph.inputs), list_ports(graph.outputs)
    return SimpleNamespace(get_inputs=lambda: inputs, get_outputs=lambda: outputs)


def _shorten(error: Exception) -> str:
    """The library's message without the lines that name its sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check "))]
    return " ".join(told)[:400] or repr(error)


class OpenVinoSlot:
    """Runs canvases one after the other in one request of a compiled graph.

    Args:
        request: An `openvino.InferRequest`, used by this slot alone.
        tensor: `openvino.Tensor`.
    """

    def __init__(self, request: Any, tensor: Callable[..., Any]) -> None:
        self._request = request
        self._tensor = tensor

    def infer(self, tiles: Sequence[Tile]) -> Sequence[TileCandidates]:
        """Runs canvases of one shape."""
        if self._request is None:
            raise BackendError("the engine is closed")
        found: list[TileCandidates] = []
        for tile in tiles:
            feeds = dict(zip(INPUTS, collate([tile]), strict=True))
            for name, array in feeds.items():  # `start_async(feeds)` takes twice as long
                self._request.set_tensor(name, self._tensor(array, shared_memory=True))
            self._request.start_async()
            self._request.wait()
            # The outputs are views of the request's memory, which the next call overwrites.
            outputs = (self._request.get_tensor(name).data for name in OUTPUTS)
            found += split_batch(*outputs, copy=True)
        return found

    def interrupt(self) -> None:
        """Ends a call between two operators; that works for asynchronous calls only."""
        if (request := self._request) is not None:
            request.cancel()

    def close(self) -> None:
        """Drops the request; the graph goes with the last one."""
        self._request = None
