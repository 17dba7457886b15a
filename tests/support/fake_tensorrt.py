"""A `tensorrt` that records how an engine is built, and engines that compute something simple.

An engine gives every canvas K candidates: scores fall from the canvas's first red value / 255,
labels count up, masks are the first green value / 255. It writes only into the addresses it was
given, through fake streams, so that what is captured, padded or mixed up is seen in the results.
Only what our sources call, which tests/service/engines/tensorrt/test_api.py holds against the real
one.
"""

from __future__ import annotations

import enum
import json
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.fake_cuda import FakeCuda, view_memory

K = 4
STRIDE = 4
DTYPES = {
    "images": "UINT8",
    "valid_hw": "INT64",
    "scores": "FLOAT",
    "labels": "INT64",
    "mask_probs": "FLOAT",
}
NUMPY = {"UINT8": np.uint8, "INT64": np.int64, "FLOAT": np.float32, "HALF": np.float16}


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity

    def log(self, severity: int, msg: str) -> None:
        raise NotImplementedError


class Dims(tuple[int, ...]):
    __slots__ = ()


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Dims, Dims, Dims]] = {}

    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
        assert all(isinstance(dims, Dims) for dims in (min, opt, max))
        assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
        self.shapes[input] = (min, opt, max)


class TimingCache:
    def __init__(self, entries: set[str]) -> None:
        self.entries = entries

    def combine(self, input_cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.entries |= input_cache.entries
        return True

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.entries)).encode()


class Config:
    def __init__(self, tensorrt: FakeTensorrt) -> None:
        self.tensorrt = tensorrt
        self.builder_optimization_level = -1
        self.hardware_compatibility_level: Any = None
        self.progress_monitor: Any = None
        self.limits: dict[Any, int] = {}
        self.cleared: list[Any] = []
        self.profiles: list[Profile] = []
        self.timings: TimingCache | None = None

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self.limits[pool] = pool_size

    def clear_flag(self, flag: Any) -> None:
        self.cleared.append(flag)

    def add_optimization_profile(self, profile: Profile) -> int:
        if self.tensorrt.refuses_profiles:
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized: bytes) -> TimingCache | None:
        if not serialized:
            return TimingCache(set())
        try:
            return TimingCache(set(json.loads(serialized)))
        except ValueError:
            return None

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if "other GPU" in cache.entries:
            return False
        self.timings = cache
        return True


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile = 0
        self.memory = 0

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.memory = memory

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profiles[self.profile][name]
        self.shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def infer_shapes(self) -> list[str]:
        return [name for name in ("images", "valid_hw") if name not in self.shapes]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def get_tensor_shape(self, name: str) -> Dims:
        batch, height, width, _ = self.shapes["images"]
        if name in self.shapes:
            return Dims(self.shapes[name])
        if name == "mask_probs":
            return Dims((batch, K, height // STRIDE, width // STRIDE))
        return Dims((batch, K))

    def array(self, name: str) -> NDArray[Any]:
        dtype = np.dtype(NUMPY.get(self.engine.dtypes[name], np.uint16))
        shape = tuple(self.get_tensor_shape(name))
        return view_memory(self.addresses[name], dtype, shape)

    def execute_async_v3(self, stream_handle: int) -> bool:
        tensorrt = self.engine.tensorrt
        assert self.memory and not self.infer_shapes()
        if tensorrt.refuses_runs:
            return False
        tensorrt.batches.append(self.shapes["images"][0])
        tensorrt.cuda.streams[stream_handle].put(self.compute)
        return True

    def compute(self) -> None:
        images = self.array("images").astype(np.float32) / 255
        first, masks = images[:, 0, 0, 0], images[:, 0, 0, 1]
        self.array("scores")[:] = first[:, None] / (1 + np.arange(K))
        self.array("labels")[:] = np.arange(K)
        probs = self.array("mask_probs")
        values = np.broadcast_to(masks[:, None, None, None], probs.shape)
        if self.engine.dtypes["mask_probs"] == "BF16":
            values = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        probs[:] = values
        self.engine.tensorrt.runs += 1


class Engine:
    device_memory_size_v2 = 512

    def __init__(self, tensorrt: FakeTensorrt, plan: dict[str, Any]) -> None:
        self.tensorrt = tensorrt
        self.profiles: list[dict[str, Any]] = plan["profiles"]
        self.dtypes: dict[str, str] = plan["dtypes"]
        self.num_optimization_profiles = len(self.profiles) + tensorrt.more_profiles
        self.num_io_tensors = len(self.dtypes)

    def get_tensor_name(self, index: int) -> str:
        return list(self.dtypes)[index]

    def get_tensor_shape(self, name: str) -> Dims:
        return {"scores": Dims((-1, K)), "labels": Dims((-1, K))}.get(name, Dims((-1, K, -1, -1)))

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.dtypes[name])

    def create_execution_context(self, strategy: str) -> Context:
        assert strategy == "USER_MANAGED"
        self.tensorrt.contexts += 1
        return Context(self)


class FakeTensorrt:
    """The module `tensorrt`, what it is to do and what it was asked."""

    def __init__(self, cuda: FakeCuda, version: str = "10.16.1.11") -> None:
        self.cuda = cuda
        self.errors: list[Any] = []
        self.dtypes = dict(DTYPES)
        self.inputs, self.outputs = list(DTYPES)[:2], list(DTYPES)[2:]
        self.refuses_profiles = False
        self.refuses_plans = 0
        self.refuses_runs = False
        self.more_profiles = 0
        self.fails_with: str | None = None
        self.flags: list[int] = []
        self.configs: list[Config] = []
        self.runs = 0
        self.batches: list[int] = []
        self.contexts = 0
        self.module = self._build_module(version)

    @property
    def builds(self) -> int:
        return len(self.configs)

    def _build_module(self, version: str) -> ModuleType:
        fake = self

        class Builder:
            def __init__(self, logger: ILogger) -> None:
                self.logger = logger

            def create_network(self, flags: int) -> Any:
                fake.flags.append(flags)
                return SimpleNamespace(
                    num_inputs=len(fake.inputs),
                    num_outputs=len(fake.outputs),
                    get_input=lambda index: SimpleNamespace(name=fake.inputs[index]),
                    get_output=lambda index: SimpleNamespace(name=fake.outputs[index]),
                )

            def create_builder_config(self) -> Config:
                fake.configs.append(Config(fake))
                return fake.configs[-1]

            def create_optimization_profile(self) -> Profile:
                return Profile()

            def build_serialized_network(self, network: Any, config: Config) -> bytes | None:
                if fake.fails_with is not None:
                    self.logger.log(Severity.ERROR, fake.fails_with)
                    return None
                monitor = config.progress_monitor
                monitor.phase_start("Building", None, 2)
                for step in range(2):
                    assert monitor.step_complete("Building", step)
                monitor.phase_finish("Building")
                assert config.timings is not None
                config.timings.entries.add(f"kernel {fake.builds}")
                shapes = [profile.shapes for profile in config.profiles]
                return json.dumps({"profiles": shapes, "dtypes": fake.dtypes}).encode()

        class OnnxParser:
            def __init__(self, network: Any, logger: ILogger) -> None:
                self.num_errors = len(fake.errors)

            def parse(self, model: bytes) -> bool:
                return not fake.errors

            def get_error(self, index: int) -> Any:
                return fake.errors[index]

        class Runtime:
            def __init__(self, logger: ILogger) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
                if fake.refuses_plans > 0:
                    fake.refuses_plans -= 1
                    self.logger.log(Severity.ERROR, "magicTag does not match")
                    return None
                return Engine(fake, json.loads(serialized_engine))

        module = ModuleType("tensorrt")
        module.__dict__.update(
            __version__=version,
            ILogger=ILogger,
            IProgressMonitor=type("IProgressMonitor", (), {}),
            Builder=Builder,
            OnnxParser=OnnxParser,
            Runtime=Runtime,
            Dims=Dims,
            NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=0),
            MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
            BuilderFlag=SimpleNamespace(TF32="tf32"),
            HardwareCompatibilityLevel=SimpleNamespace(
                AMPERE_PLUS="ampere", SAME_COMPUTE_CAPABILITY="same"
            ),
            ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="USER_MANAGED"),
        )
        return module


def build_error(node: str, operator: str, text: str, number: int = 0) -> Any:
    """What the parser says of a node."""
    return SimpleNamespace(
        node_name=lambda: node,
        node_operator=lambda: operator,
        desc=lambda: text,
        node=lambda: number,
    )
