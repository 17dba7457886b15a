"""What we call of TensorRT, held against the real Python bindings of 10 and 11.

mypy checks the sources against stubs made of each binding: every attribute, method, keyword, enum
member, number and type of arguments. So that this is no check that cannot fail, every name is then
misspelt, and mypy must find each one.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.support.tensorrt_stubs import ROOT, Binding, install_binding

pytestmark = [pytest.mark.network, pytest.mark.slow]

VERSIONS = ("10.16.1.11", "11.4.0.106")
FILES = ("tensorrt/engine", "tensorrt/build", "tensorrt/call", "tensorrt/log", "device")
SOURCES = [ROOT / f"service/engines/{name}.py" for name in FILES]

# Names of TensorRT and cuda-core that our sources use. They are misspelt in three rounds, for what
# comes of a misspelt name has no type, and its members cannot be checked in the same round.
MODULE = {
    *("Builder", "OnnxParser", "Runtime", "Dims", "ILogger", "IProgressMonitor"),
    *("MemoryPoolType", "HardwareCompatibilityLevel", "BuilderFlag"),
    *("NetworkDefinitionCreationFlag", "ExecutionContextAllocationStrategy"),
    *("get_user_mode_driver_version",),
}
MAKERS = {
    *("create_network", "create_builder_config", "create_optimization_profile", "get_error"),
    *("build_serialized_network", "get_input", "get_output", "create_timing_cache"),
    *("deserialize_cuda_engine", "create_execution_context", "create_graph_builder"),
    *("create_stream", "compute_capability", "from_handle", "Severity"),
}
MEMBERS = {
    *("parse", "num_errors", "node_name", "node", "node_operator", "desc"),
    *("num_inputs", "num_outputs", "builder_optimization_level", "set_memory_pool_limit"),
    *("hardware_compatibility_level", "clear_flag", "add_optimization_profile"),
    *("set_timing_cache", "progress_monitor", "combine", "serialize", "set_shape"),
    *("WORKSPACE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY", "TF32", "STRONGLY_TYPED"),
    *("INTERNAL_ERROR", "USER_MANAGED", "set_device_memory"),
    *("set_optimization_profile_async", "set_input_shape", "set_tensor_address", "infer_shapes"),
    *("get_tensor_shape", "execute_async_v3", "num_io_tensors", "get_tensor_name"),
    *("get_tensor_dtype", "num_optimization_profiles", "device_memory_size_v2"),
    *("set_current", "begin_building", "end_building", "complete", "launch", "copy_from"),
    *("sync", "record", "major", "minor", "handle"),
}


@pytest.fixture(scope="module", params=VERSIONS)
def binding(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Binding:
    version: str = request.param
    return install_binding(version, tmp_path_factory.mktemp(f"tensorrt-{version}"))


def copy_sources(target: Path) -> list[Path]:
    """The service's sources elsewhere, to be changed."""
    shutil.copytree(ROOT / "service", target / "service", ignore=shutil.ignore_patterns("web"))
    return [target / source.relative_to(ROOT) for source in SOURCES]


def is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def misspell(source: Path, names: set[str]) -> Counter[str]:
    """Appends `zz` to every attribute of these names in a file; how often each.

    Not to attributes of `self`: those are our own methods, some of which have the same names.
    """
    uses = [
        (node.end_lineno or 0, node.end_col_offset or 0, node.attr)
        for node in ast.walk(ast.parse(source.read_bytes()))
        if isinstance(node, ast.Attribute) and node.attr in names and not is_own(node)
    ]
    lines = source.read_bytes().splitlines()
    for line, column, _ in sorted(uses, reverse=True):
        lines[line - 1] = lines[line - 1][:column] + b"zz" + lines[line - 1][column:]
    source.write_bytes(b"\n".join(lines) + b"\n")
    return Counter(name for _, _, name in uses)


def test_everything_we_call_is_there(binding: Binding) -> None:
    assert binding.check(SOURCES) == []


@pytest.mark.parametrize("names", [MODULE, MAKERS, MEMBERS], ids=["module", "makers", "members"])
def test_every_misspelt_name_is_found(binding: Binding, names: set[str], tmp_path: Path) -> None:
    sources = copy_sources(tmp_path)
    uses: Counter[str] = Counter()
    for source in sources:
        uses += misspell(source, names)
    assert set(uses) == names, "the list and the sources differ"
    found = binding.check(sources, tmp_path)
    for name in names:  # alone, or within a dotted name
        reported = sum(bool(re.search(rf'["\.]{name}zz["\.]', line)) for line in found)
        assert reported >= uses[name], (name, uses[name], reported)


WRONG = """
import tensorrt as trt

def build(builder: trt.Builder, config: trt.IBuilderConfig, profile: trt.IOptimizationProfile,
          context: trt.IExecutionContext) -> None:
    {}
"""


@pytest.mark.parametrize(
    "call",
    [
        "config.set_timing_cache(config.create_timing_cache(b''))",
        "config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)",
        "config.set_memory_pool_limit(4, 4)",
        "config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size=4)",
        "config.builder_optimization_level = 'high'",
        "profile.set_shape('images', trt.Dims((1,)), trt.Dims((1,)))",
        "profile.set_shape('images', smallest=trt.Dims((1,)))",
        "context.execute_async_v2(0)",
        "context.set_tensor_address('images')",
        "builder.build_serialized_network(config)",
    ],
)
def test_a_wrong_call_is_found(binding: Binding, call: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(WRONG.format(call))
    assert len(binding.check([file], tmp_path)) == 1


@pytest.mark.parametrize(
    "call",
    [
        "config.set_flag(trt.BuilderFlag.FP16)",
        "config.set_flag(trt.BuilderFlag.INT8)",
        "config.int8_calibrator",
        "builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))",
    ],
)
def test_what_is_gone_in_11_is_found_there(binding: Binding, call: str, tmp_path: Path) -> None:
    file = tmp_path / "gone.py"
    file.write_text(WRONG.format(call))
    assert len(binding.check([file], tmp_path)) == (0 if binding.major == "10" else 1)


BUILD = """
from pathlib import Path
from service.engines.base import BackendError
from service.engines.tensorrt.build import build_plan, choose_options, find_obstacle
from service.engines.tensorrt.cache import BuildOptions
from service.engines.tensorrt.log import Messages, PhaseProgress, build_logger, build_monitor
from pipeline.canvases import Bucket

import tensorrt

messages = Messages()
log = build_logger(messages)
log.log(tensorrt.ILogger.Severity.ERROR, "out of luck")
print(messages.explain())
monitor = build_monitor(PhaseProgress(lambda status, progress: print(status, progress)))
monitor.phase_start("tactics", None, 2)
print(monitor.step_complete("tactics", 0))
options = BuildOptions(buckets=[Bucket((64, 64), (64, 64), (64, 64))])
try:
    build_plan(b"no graph", options, Path("none.timing"))
except BackendError as error:
    print(error)
"""


def test_the_real_binding_runs_until_it_needs_its_libraries(binding: Binding) -> None:
    """Our logger and monitor are real TensorRT objects; the stub gives no builder."""
    assert binding.run(BUILD).splitlines() == [
        "out of luck",
        "building the engine: tactics 0.5",
        "True",
        "TensorRT gives no builder: it gives no reason",
    ]
