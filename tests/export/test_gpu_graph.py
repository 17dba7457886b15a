from __future__ import annotations

import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper

from export.errors import GraphError
from export.gpu_graph import find_copies, find_faults, require_gpu_graph
from export.precision import LowPrecision, lower_precision
from tests.support import blob_model
from tests.support.server import ROOT
from tests.support.tiny_graph import exported
from training.configs.schema import HeadKind


def parse(body: str, opset: int = 18, dims: str = "n, 3") -> onnx.ModelProto:
    """A graph from x, float [n, 3], to y."""
    return onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}]> '
        f"test (float[{dims}] x, uint8[n, 3] pixels) => (float[a, b] y) {{ {body} }}"
    )


def faults_of(body: str, opset: int = 18) -> list[str]:
    return list(find_faults(parse(body, opset)))


@pytest.mark.parametrize(
    ("kind", "opset"), [("vanilla", 18), ("decoupled", 20)], ids=["vanilla", "decoupled"]
)
def test_exported_graphs_have_no_node_on_the_cpu_that_cuda_nodes_read(
    kind: HeadKind, opset: int
) -> None:
    recipe = "published" if kind == "vanilla" else "paper"
    _, data = exported(kind, recipe, opset)
    model = onnx.load_from_string(data)
    assert any(node.op_type == "Shape" for node in model.graph.node), "there is work on the host"
    assert list(find_copies(model)) == []
    require_gpu_graph(data)
    precisions: tuple[LowPrecision, ...] = ("fp16", "bf16")
    for precision in precisions:
        require_gpu_graph(lower_precision(data, precision))


def test_the_bundled_graphs_run_on_gpus() -> None:
    version = ROOT / "model_repo" / "nuclei" / "4"
    for name in ("model.onnx", "model.fp16.onnx"):
        require_gpu_graph((version / name).read_bytes())
    faults = list(find_faults(onnx.load(version / "model.exits.onnx")))
    assert any("If 'exits/level0' is control flow" in fault for fault in faults)


def test_the_model_of_the_tests_runs_on_gpus() -> None:
    require_gpu_graph(blob_model.build_graph())


def test_a_scalar_of_the_host_in_the_arithmetic_is_named() -> None:
    """Coordinates that divide by the side's length, as exported graphs once did."""
    faults = faults_of(
        "zero = Constant <value_int = 0> () one = Constant <value_int = 1> () "
        "shape = Shape (x) rows = Gather (shape, zero) less = Sub (rows, one) "
        "divisor = Cast <to = 1> (less) y = Div (x, divisor)"
    )
    assert faults == ["Div 'y' reads divisor, which is computed on the host"]


def test_sizes_may_be_computed_on_the_host() -> None:
    sized = (
        "minus = Constant <value_ints = [-1]> () shape = Shape (x) "
        "rows = Slice (shape, start, end) size = Concat <axis = 0> (rows, minus) "
        "y = Reshape (x, size)"
    )
    ends = "start = Constant <value_ints = [0]> () end = Constant <value_ints = [1]> () "
    assert faults_of(ends + sized) == []


def test_a_size_that_is_computed_on_the_device_is_named() -> None:
    (fault,) = faults_of(
        "axis = Constant <value_ints = [0, 1]> () total = ReduceSum <keepdims = 0> (x, axis) "
        "size = Cast <to = 7> (total) zero = Constant <value_int = 0> () "
        "one = Constant <value_int = 1> () steps = Range (zero, size, one) "
        "place = Constant <value_ints = [0]> () row = Unsqueeze (steps, place) "
        "y = Cast <to = 1> (row)"
    )
    assert fault == "Range 'steps' needs size on the host, it is computed on the device"


def test_float16_is_never_computed_on_the_host() -> None:
    """ONNX Runtime's CPU kernels have no float16: such a cast's result is on the device."""
    assert (
        faults_of(
            "zero = Constant <value_int = 0> () shape = Shape (x) rows = Gather (shape, zero) "
            "half = Cast <to = 10> (rows) twice = Add (half, half) wide = Cast <to = 1> (twice) "
            "y = Div (x, wide)"
        )
        == ["Add 'twice' reads half, which is computed on the host"] * 2
    )


def test_arithmetic_on_uint8_is_named() -> None:
    faults = faults_of(
        "turned = Transpose <perm = [1, 0]> (pixels) real = Cast <to = 1> (turned) "
        "y = Identity (real)"
    )
    assert faults == ["Transpose 'turned' computes with uint8 (pixels, turned)"]
    assert faults_of("real = Cast <to = 1> (pixels) y = Identity (real)") == []


def test_outputs_whose_size_depends_on_the_data_are_named() -> None:
    faults = faults_of("found = NonZero (x) y = Cast <to = 1> (found)")
    assert faults == ["NonZero 'found' has an output whose size depends on the data"]


@pytest.mark.parametrize("opset", [11, 17, 23])
def test_an_opset_out_of_range_is_named(opset: int) -> None:
    faults = faults_of("y = Identity (x)", opset)
    assert faults == [f"its opset is {opset}, expected 18 to 22"]


def test_group_normalisation_of_opset_21_is_named() -> None:
    body = "y = GroupNormalization <num_groups = 1> (x, x, x)"
    (fault,) = list(find_faults(parse(body, 21)))
    assert fault.startswith("GroupNormalization 'y' is not reliable")


def test_a_large_weight_is_on_the_device() -> None:
    """Only small constants may be read on the host."""

    def build(count: int) -> onnx.ModelProto:
        model = parse("size = Shape (x) y = Expand (x, size)")
        weight = helper.make_tensor("w", TensorProto.INT64, [count], [1] * count)
        model.graph.initializer.append(weight)
        model.graph.node.insert(1, helper.make_node("Concat", ["size", "w"], ["all"], axis=0))
        model.graph.node.insert(2, helper.make_node("Cast", ["all"], ["real"], to=1))
        return model

    assert list(find_copies(build(100))) == []
    assert list(find_copies(build(101))) == [
        "Concat 'all' reads size, which is computed on the host"
    ]


def test_only_the_first_faults_are_named() -> None:
    body = " ".join(f"t{i} = NonZero (x)" for i in range(7))
    data = parse(f"{body} y = Cast <to = 1> (t0)").SerializeToString()
    with pytest.raises(GraphError, match=r"NonZero 't4' [^;]*; and 2 more$"):
        require_gpu_graph(data)


@pytest.mark.parametrize("data", [b"", b"graph", b"\x08\x09"])
def test_what_is_no_graph_is_rejected(data: bytes) -> None:
    with pytest.raises(GraphError, match=r"not an ONNX graph|no operators of ONNX"):
        require_gpu_graph(data)
