"""Chooses a model's engine: the fastest that works, and why the faster ones do not.

On a GPU TensorRT, then AOTInductor, then ONNX Runtime. On the CPU the graph that has early exits,
if the version has one, in ONNX Runtime; or, with `free_precision`, in the engine and precision that
`trial` finds the fastest here. An engine that was asked for and does not work is an error.
An engine's module is imported only when its turn comes; one that is missing counts as not
installed.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

from pipeline.model_config import ModelConfig
from service.engines.aoti_package import name_package
from service.engines.artefacts import EXITS_FILE, ONNX_FILE, Artefacts
from service.engines.base import Backend, BackendError, BackendOptions, EngineKind, Precision
from service.engines.driver import Gpu, find_gpu
from service.engines.slots import SlotBackend
from service.engines.trial import Candidate, measure_candidates, rank, use_one_thread
from service.errors import DeviceError, ModelRefused

logger = logging.getLogger(__name__)

Warm = Callable[[Backend], None]
"""Runs a backend once; raises if its output is not what the model's configuration says."""

Kind = Literal["trt", "aoti", "ort", "openvino"]
_TITLES: dict[Kind, str] = {
    "trt": "TensorRT",
    "aoti": "AOTInductor",
    "ort": "ONNX Runtime",
    "openvino": "OpenVINO",
}
_MODULES = {
    "trt": "service.engines.tensorrt.engine",
    "trt_cache": "service.engines.tensorrt.cache",
    "aoti": "service.engines.aotinductor",
    "ort": "service.engines.onnxruntime",
    "openvino": "service.engines.openvino",
}
MAX_AP_COST = 0.002
"""Of a precision that `free_precision` may take."""


@dataclass(frozen=True)
class _Route:
    """An engine on a device.

    Attributes:
        file: What it needs.
        exits: Whether its graph has early exits.
        canvas_s: Seconds of a canvas, of each engine that was timed.
    """

    kind: Kind
    device: Literal["cpu", "cuda"]
    precision: Precision
    file: str
    exits: bool = False
    canvas_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As a candidate's."""
        return f"{'onnxruntime' if self.kind == 'ort' else self.kind} {self.precision}"

    def __str__(self) -> str:
        return f"{_TITLES[self.kind]} on {'CUDA' if self.device == 'cuda' else 'the CPU'}"


class _RouteRefused(Exception):
    """A route cannot be taken; says why, without naming the route."""


def check_device(options: BackendOptions) -> None:
    """Refuses `cuda` where it cannot work, before any model is read.

    Raises:
        DeviceError: Says what is missing.
    """
    if options.device == "cuda":
        gpu = find_gpu(options.gpus)
        if not isinstance(gpu, Gpu):
            raise DeviceError(f"device cuda: {gpu}")


def build_backend(
    artefacts: Artefacts, options: BackendOptions, config: ModelConfig, warm: Warm
) -> SlotBackend:
    """Builds the engine of a model's version.

    Where TensorRT works but has no engine in the cache, the result is ONNX Runtime, and its
    `upgrade` builds and loads the TensorRT engine. With `precision_fallback`, fp32 is taken if no
    engine works in the precision asked for.

    Args:
        artefacts: The version's files; only what is loaded is read and verified.
        options: Engine, device and precision that are asked for, or `auto`.
        config: The version's configuration.
        warm: Runs the backend once.

    Raises:
        ModelRefused: A file is missing, damaged, or not in the precision asked for.
        BackendError: No engine works; says why of each.
        DeviceError: `cuda` was asked for and does not work.
    """
    check_device(options)
    refusals: list[str] = []
    errors: list[Exception] = []
    for route in _list_routes(options, artefacts, config, refusals):
        try:
            backend = _build(route, _options_of(route, options), artefacts, config)
            _try_out(backend, warm)
        except _RouteRefused as error:
            refusals.append(f"{route}: {error}")
        except (ModelRefused, ImportError):
            raise
        except Exception as error:  # an engine's exceptions have no common base
            is_known = isinstance(error, (BackendError, DeviceError))
            logger.warning("%s is not taken: %s", route, error, exc_info=not is_known)
            refusals.append(f"{route}: {error if is_known else repr(error)}")
            errors.append(error)
        else:
            backend.reason = _explain(backend.reason, options, route, refusals)
            backend.canvas_s = dict(route.canvas_s)
            return backend
    raise _give_up(options, artefacts, refusals, errors)


def _try_out(backend: Backend, warm: Warm) -> None:
    """Runs an engine once: some libraries are loaded, and fail, only then.

    Raises:
        BackendError: It fails; it is closed then.
    """
    try:
        warm(backend)
    except Exception as error:  # an engine's exceptions have no common base
        backend.close()
        raise BackendError(f"the first run failed: {error}") from error


def graph_file(precision: str) -> str:
    """Name of the ONNX file in a precision."""
    return ONNX_FILE if precision == "fp32" else f"model.{precision}.onnx"


def exits_file(precision: str) -> str:
    """Name of the ONNX file with early exits in a precision, which the CPU prefers."""
    return EXITS_FILE if precision == "fp32" else f"model.{precision}.exits.onnx"


def list_cpu_files(files: Collection[str]) -> set[str]:
    """Those files of a version that an engine on the CPU may read.

    Of half precisions none: ONNX Runtime computes them in float32, and OpenVINO lowers the
    precision of the float32 graph itself.
    """
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    unused = {file(p) for p in get_args(Precision) for file in (graph_file, exits_file)}
    unused -= {_graph_on_cpu(precision, files) for precision in precisions}
    packages = {name_package("cpu", p) for p in get_args(Precision)}
    unused |= {name for name in files if name.endswith(".pt2")} - packages
    return {*files} - unused


def _graph_on_cpu(precision: Precision, files: Collection[str]) -> str:
    """The graph with early exits if the version has it."""
    exits = exits_file(precision)
    return exits if exits in files else graph_file(precision)


def _list_routes(
    options: BackendOptions, artefacts: Artefacts, config: ModelConfig, refusals: list[str]
) -> Iterator[_Route]:
    """Best first; a missing GPU is one refusal for all that need it."""
    gpu = find_gpu(options.gpus) if options.device != "cpu" else "device cpu was asked for"
    if not isinstance(gpu, Gpu) and (options.device == "auto" or options.engine == "trt"):
        refusals.append(f"CUDA: {gpu}")
    fallbacks: list[Precision] = ["fp32"] if options.precision_fallback else []
    precisions = list(dict.fromkeys((options.precision, *fallbacks)))
    if isinstance(gpu, Gpu):
        for precision in precisions:
            yield from _list_gpu_routes(gpu, options.engine, precision)
    if options.device == "cuda":
        return
    if options.free_precision and options.engine != "aoti":
        yield from _list_timed_routes(options, artefacts, config, refusals)
        return
    computes_halves = options.engine in ("auto", "openvino") and _has_openvino()
    if options.device == "auto" and not computes_halves:  # ONNX Runtime turns halves into float32
        precisions.sort(key=lambda precision: precision in ("fp16", "bf16"))
    for precision in precisions:
        yield from _list_cpu_routes(options.engine, precision, artefacts)


def _list_gpu_routes(gpu: Gpu, engine: EngineKind, precision: Precision) -> Iterator[_Route]:
    graph = graph_file(precision)
    if engine in ("auto", "trt"):
        yield _Route("trt", "cuda", precision, graph)
    if engine in ("auto", "aoti"):
        yield _Route("aoti", "cuda", precision, name_package(gpu.target, precision))
    if engine in ("auto", "ort"):
        yield _Route("ort", "cuda", precision, graph)
    if engine == "openvino":  # which says that it cannot
        yield _Route("openvino", "cuda", precision, graph)


def _list_cpu_routes(
    engine: EngineKind, precision: Precision, artefacts: Artefacts
) -> Iterator[_Route]:
    if engine == "aoti":
        yield _Route("aoti", "cpu", precision, name_package("cpu", precision))
    if engine in ("auto", "ort"):
        yield _on_cpu("ort", precision, artefacts)
    # ONNX Runtime computes neither in bf16 nor in fp16 on a CPU.
    is_asked_for = engine == "auto" and precision in ("bf16", "fp16") and _has_openvino()
    if engine == "openvino" or is_asked_for:
        yield _on_cpu("openvino", precision, artefacts)


def _on_cpu(kind: Literal["ort", "openvino"], precision: Precision, artefacts: Artefacts) -> _Route:
    """With early exits if the version has them; OpenVINO lowers the precision itself."""
    of_graph: Precision = precision if kind == "ort" or precision == "int8" else "fp32"
    file = _graph_on_cpu(of_graph, artefacts.files)
    return _Route(kind, "cpu", precision, file, exits=file == exits_file(of_graph))


def _has_openvino() -> bool:
    engine = _load("openvino")
    return engine is not None and bool(engine.is_installed())


def _list_timed_routes(
    options: BackendOptions, artefacts: Artefacts, config: ModelConfig, refusals: list[str]
) -> Iterator[_Route]:
    """Engines and precisions that cost next to no AP, fastest first."""
    routes = []
    if options.engine in ("auto", "ort"):
        routes.append(_on_cpu("ort", "fp32", artefacts))
        is_good = config.ap_cost.get("int8", math.inf) <= MAX_AP_COST
        of_int8 = _on_cpu("ort", "int8", artefacts)
        if is_good and of_int8.file in artefacts:
            routes.append(of_int8)
    if options.engine == "openvino" or (options.engine == "auto" and _has_openvino()):
        precision = _find_openvino_precision(config, refusals)
        routes.append(_on_cpu("openvino", precision, artefacts))
    if len(routes) <= 1:
        yield from routes
        return
    candidates = [
        Candidate(
            route.name,
            route.file,
            partial(_build, route, use_one_thread(_options_of(route, options)), artefacts, config),
        )
        for route in routes
    ]
    canvas_s = measure_candidates(candidates, options, config)
    failed = [route.name for route in routes if route.name not in canvas_s]
    refusals += [f"{name}: it failed when it was timed" for name in failed]
    by_name = {route.name: replace(route, canvas_s=canvas_s) for route in routes}
    yield from (by_name[name] for name in rank(canvas_s) if name in by_name)


def _find_openvino_precision(config: ModelConfig, refusals: list[str]) -> Precision:
    """That of this CPU, unless it is known to cost AP; rounding to bf16 or fp16 rarely does."""
    engine: Any = _load("openvino")
    try:
        native: Precision = engine.find_native_precision()
    except Exception as error:  # it is not installed, or cannot be loaded
        refusals.append(f"a lower precision of OpenVINO: {error}")
        return "fp32"
    cost = config.ap_cost.get(native, 0.0)
    if cost > MAX_AP_COST:
        refusals.append(f"{native}: it costs {cost:g} AP")
        return "fp32"
    return native


def _options_of(route: _Route, options: BackendOptions) -> BackendOptions:
    return replace(options, device=route.device, precision=route.precision)


def _build(
    route: _Route, options: BackendOptions, artefacts: Artefacts, config: ModelConfig
) -> SlotBackend:
    """Takes a route, or refuses it as early as can be known.

    Raises:
        _RouteRefused: The engine is not installed, does not work here, or has no file.
    """
    engine = _load(route.kind)
    if engine is None:
        raise _RouteRefused("it is not part of this installation")
    obstacle = engine.find_obstacle(options)
    if obstacle is None and route.file not in artefacts:
        obstacle = f"the version has no {route.file}"
    if obstacle is not None:
        raise _RouteRefused(obstacle)
    backend: SlotBackend
    if route.kind == "aoti":
        # It verifies the file itself: it loads the very bytes that were hashed.
        backend = engine.build_aoti_backend(artefacts.folder / route.file, options, config)
    elif route.kind == "ort":
        backend = engine.build_ort_backend(artefacts.read_graph(route.file), options, config)
    elif route.kind == "openvino":
        backend = engine.build_openvino_backend(artefacts.read_graph(route.file), options, config)
    else:
        backend = _build_tensorrt(engine, route, options, artefacts, config)
    return backend


def _build_tensorrt(
    engine: Any, route: _Route, options: BackendOptions, artefacts: Artefacts, config: ModelConfig
) -> SlotBackend:
    """An engine from the cache, or ONNX Runtime, which serves while the engine is built."""
    graph = artefacts.read_graph(route.file)
    if not isinstance(graph, bytes):
        raise _RouteRefused("it takes no graph that has data files beside it")
    trt_cache = _load("trt_cache")
    if trt_cache is None:
        raise _RouteRefused("it is not part of this installation")
    cache = trt_cache.choose_cache(artefacts.folder, options.cache).folder
    backend: SlotBackend
    if engine.has_engine(graph, options, config, cache):
        backend = engine.build_trt_backend(graph, options, config, cache)
    else:
        runtime: Any = _load("ort")
        backend = runtime.build_ort_backend(graph, replace(options, device="auto"), config)
        backend.upgrade = engine.plan_upgrade(graph, options, config, cache)
    return backend


def _load(name: str) -> Any:
    """An engine's module, None if it is missing; a missing import of its own is an error."""
    try:
        return importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        if error.name != _MODULES[name]:
            raise
        return None


def _explain(reason: str, options: BackendOptions, route: _Route, refusals: list[str]) -> str:
    if route.exits:
        reason += ", early exits"
    parts = [reason]
    if route.canvas_s:
        parts.append(f"the fastest of {', '.join(sorted(route.canvas_s))} on this machine")
    parts += [
        f"{name} {value} was asked for"
        for name, value in (("engine", options.engine), ("device", options.device))
        if value != "auto"
    ]
    if route.precision != options.precision and not options.free_precision:
        parts.append(f"precision {options.precision} was asked for")
    return "; ".join([*parts, *(f"not {refusal}" for refusal in refusals)])


def _give_up(
    options: BackendOptions, artefacts: Artefacts, refusals: list[str], errors: list[Exception]
) -> Exception:
    """The error that says most precisely why no engine works."""
    graph = graph_file(options.precision)
    needs_file = options.engine not in ("aoti", "openvino")
    if graph not in artefacts and needs_file and not options.precision_fallback:
        return ModelRefused(
            artefacts.folder / graph,
            f"precision {options.precision} was asked for and config.json lists no such file, only "
            f"{sorted(artefacts.files)}; make it with: solo-export CHECKPOINT --out "
            f"{artefacts.folder.parent.parent} --precision {options.precision}",
        )
    text = "; ".join(refusals)
    asked = f"engine {options.engine}, device {options.device}, precision {options.precision}"
    if options.device == "cuda" and not any(isinstance(e, BackendError) for e in errors):
        return DeviceError(f"{asked}: {text}")
    return BackendError(f"{asked}: {text}")
