from __future__ import annotations

import fcntl
import logging
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from pipeline.types import Candidates
from service.engines import openvino
from service.engines.base import BackendError, BackendOptions, Precision
from service.engines.onnxruntime import build_ort_backend
from service.engines.openvino import (
    OpenVinoSlot,
    build_openvino_backend,
    find_native_precision,
    find_obstacle,
)
from tests.service.engines.test_onnxruntime import build_batch
from tests.service.engines.test_ort_session import read_config
from tests.support.blob_model import KEEP_RATIO_INPUT, build_graph, build_typed_graph

ROOT = Path(__file__).resolve().parents[3]
CPU = BackendOptions(device="cpu", threads=1)
installed = pytest.mark.skipif(not openvino.is_installed(), reason="openvino is not installed")


@pytest.fixture
def options(tmp_path: Path) -> BackendOptions:
    return replace(CPU, cache=tmp_path / "cache")


def bits_of(found: Any) -> list[bytes]:
    assert isinstance(found, Candidates)
    return [array.tobytes() for array in (found.scores, found.labels, found.mask_probs)]


def build_wide_graph() -> bytes:
    """The blob graph behind convolutions, whose sums bfloat16 rounds."""
    model = onnx.load_from_string(build_graph())
    random = np.random.default_rng(0)
    weights = (np.eye(64, 3) + random.normal(0, 0.01, (64, 3)), np.eye(3, 64))
    source = "planes"
    nodes = []
    for index, weight in enumerate(weights):
        name = f"conv{index}"
        array = weight.astype(np.float32)[..., None, None]
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, f"{name}/weight"))
        nodes.append(onnx.helper.make_node("Conv", [source, f"{name}/weight"], [name]))
        source = name
    (pool,) = [node for node in model.graph.node if node.op_type == "AveragePool"]
    pool.input[0] = source
    at = list(model.graph.node).index(pool)
    kept = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*kept[:at], *nodes, *kept[at:]])
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


class FakeRequest:
    """Answers with the first pixel of the canvas, always in the same memory, after `wait`."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []
        self._inputs: dict[str, Any] = {}
        self.is_cancelled = False
        self._pixel = 0.0
        self._scores = np.zeros((1, 2), np.float32)
        masks = np.broadcast_to(self._scores[..., None, None], (1, 2, 4, 4))
        labels = np.zeros((1, 2), np.int64)
        self._outputs = {"scores": self._scores, "labels": labels, "mask_probs": masks}

    def set_tensor(self, name: str, tensor: Any) -> None:
        self._inputs[name] = tensor

    def start_async(self) -> None:
        images, valid_hw = self._inputs["images"], self._inputs["valid_hw"]
        self.batches.append(images.shape)
        assert valid_hw.tolist() == [list(images.shape[1:3])]
        self._pixel = float(images[0, 0, 0, 0]) / 255

    def wait(self) -> None:
        self._scores[:] = [[self._pixel, 0]]

    def get_tensor(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(data=self._outputs[name])

    def cancel(self) -> None:
        self.is_cancelled = True


def share(array: Any, *, shared_memory: bool) -> Any:
    """Stands for `openvino.Tensor`."""
    assert shared_memory
    assert array.flags.c_contiguous
    return array


def test_a_slot_runs_canvases_one_by_one_and_keeps_no_view_of_the_engines_memory() -> None:
    request = FakeRequest()
    tiles = build_batch(3, 16, 16)
    found = OpenVinoSlot(request, share).infer(tiles)
    assert request.batches == [(1, 16, 16, 3)] * 3
    expected = [float(np.float32(int(tile.image[0, 0, 0])) / 255) for tile in tiles]
    assert [float(one.scores[0]) for one in found] == pytest.approx(expected)
    assert len(set(expected)) == 3
    assert [len(one.scores) for one in found] == [1, 1, 1]


def test_a_slot_without_canvases_and_a_closed_one() -> None:
    request = FakeRequest()
    slot = OpenVinoSlot(request, share)
    assert slot.infer([]) == []
    slot.interrupt()
    assert request.is_cancelled
    slot.close()
    slot.interrupt()
    with pytest.raises(BackendError, match="closed"):
        slot.infer(build_batch(1, 16, 16))


def test_what_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "is_installed", lambda: False)
    assert find_obstacle(CPU) == "it is not installed (extra openvino)"
    monkeypatch.setattr(openvino, "is_installed", lambda: True)
    monkeypatch.setattr(openvino, "_list_capabilities", lambda: frozenset({"FP32", "INT8"}))
    assert find_obstacle(CPU) is None
    wanted = "this CPU does not compute in bf16, only in ['FP32', 'INT8']"
    assert find_obstacle(replace(CPU, precision="bf16")) == wanted
    assert find_obstacle(replace(CPU, precision="int8")) == "int8 graphs are made for ONNX Runtime"

    def fail() -> frozenset[str]:
        raise OSError("a library is missing")

    monkeypatch.setattr(openvino, "_list_capabilities", fail)
    found = find_obstacle(replace(CPU, precision="fp16"))
    assert found == "it cannot be loaded: a library is missing"


@pytest.mark.parametrize(
    ("machine", "capabilities", "expected"),
    [
        ("x86_64", {"FP32", "BF16", "FP16"}, "bf16"),
        ("AMD64", {"FP32"}, "fp32"),
        ("x86_64", {"FP32", "FP16"}, "fp32"),
        ("aarch64", {"FP32", "FP16", "BF16"}, "fp16"),
        ("arm64", {"FP32"}, "fp32"),
    ],
)
def test_the_native_precision(
    monkeypatch: pytest.MonkeyPatch, machine: str, capabilities: set[str], expected: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(openvino, "_list_capabilities", lambda: frozenset(capabilities))
    assert find_native_precision() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Exception from src/core.cpp:1:\n\nCheck 'a' failed at b\n No such \nfile",
            "No such file",
        ),
        ("Exception from src/core.cpp:1:", "RuntimeError('Exception from src/core.cpp:1:')"),
        ("x" * 500, "x" * 400),
    ],
)
def test_errors_of_the_library_are_shortened(text: str, expected: str) -> None:
    assert openvino._shorten(RuntimeError(text)) == expected


@installed
class TestInstalled:
    def test_the_library_sends_no_usage_data(self, options: BackendOptions) -> None:
        text = """
import sys
from service.engines import openvino
openvino.find_native_precision()
from openvino.tools.ovc import telemetry_utils
print(telemetry_utils.tm.__name__, sorted(m for m in sys.modules if m.startswith("openvino_tele")))
"""
        command = [sys.executable, "-c", text]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        assert done.stdout.split(maxsplit=1) == [
            "openvino.tools.ovc.telemetry_stub",
            "['openvino_telemetry']\n",
        ]

    @pytest.mark.parametrize("content", [{}, {"input": KEEP_RATIO_INPUT}], ids=["tiles", "whole"])
    def test_results_are_onnx_runtimes(
        self, options: BackendOptions, content: dict[str, Any]
    ) -> None:
        sides = (128, 128) if not content else (64, 96)
        tiles = build_batch(3, *sides) + build_batch(1, *sides, seed=2)
        backend = build_openvino_backend(build_graph(), options, read_config(**content))
        expected = build_ort_backend(build_graph(), CPU).infer(tiles)
        for found, wanted in zip(backend.infer(tiles), expected, strict=True):
            assert isinstance(found, Candidates) and isinstance(wanted, Candidates)
            # A cell of half brightness may be on either side of the graph's threshold.
            np.testing.assert_allclose(found.scores, wanted.scores, atol=2e-3)
            np.testing.assert_array_equal(found.labels, wanted.labels)
            np.testing.assert_allclose(found.mask_probs, wanted.mask_probs, atol=1e-6)
        assert (backend.name, backend.device, backend.precision) == ("openvino", "cpu", "fp32")

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_a_batch_is_its_canvases_alone_bit_for_bit_in_any_slot(
        self, options: BackendOptions, precision: Precision
    ) -> None:
        wanted = replace(options, precision=precision, slots=3)
        if find_obstacle(wanted) is not None:
            pytest.skip(f"this CPU has no {precision}")
        backend = build_openvino_backend(build_wide_graph(), wanted, read_config())
        tiles = build_batch(6, 128, 128)
        alone = [bits_of(backend.infer([tile])[0]) for tile in tiles]
        assert len({bits[2] for bits in alone}) == len(tiles)
        assert [bits_of(one) for one in backend.infer(tiles)] == alone
        with ThreadPoolExecutor(3) as pool:
            for found in pool.map(backend.infer, [tiles[::-1]] * 6):
                assert [bits_of(one) for one in found] == alone[::-1]

    def test_bf16_is_computed_in_bf16(self, options: BackendOptions) -> None:
        lower = replace(options, precision="bf16")
        if find_obstacle(lower) is not None:
            pytest.skip("this CPU has no bf16")
        tiles = build_batch(1, 128, 128)
        graph, config = build_wide_graph(), read_config()
        (exact,) = build_openvino_backend(graph, options, config).infer(tiles)
        (rounded,) = build_openvino_backend(graph, lower, config).infer(tiles)
        assert isinstance(exact, Candidates) and isinstance(rounded, Candidates)
        assert rounded.mask_probs.dtype == np.float32
        difference = np.abs(exact.mask_probs - rounded.mask_probs).max()
        assert 1e-4 < difference < 2e-2

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"divide": "tiles"}, (3, 3)),
            ({"divide": "none"}, (1, 3)),
            ({"divide": "none", "slots": 2}, (2, 6)),
        ],
        ids=["a thread for a call", "all for one call", "two calls of three"],
    )
    def test_streams_and_threads(
        self, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: tuple[int, int]
    ) -> None:
        built: list[Any] = []
        compile_with = openvino._compile_with

        def watch(graph: Any, properties: Any) -> Any:
            built.append(properties)
            return compile_with(graph, properties)

        monkeypatch.setattr(openvino, "_compile_with", watch)
        monkeypatch.setattr(openvino, "find_local_cache", lambda wanted: None)
        wanted = replace(BackendOptions(device="cpu", threads=3), **changes)
        backend = build_openvino_backend(build_graph(), wanted, read_config())
        assert backend.concurrency == expected[0]
        assert built[0]["NUM_STREAMS"] == expected[0]
        assert built[0]["INFERENCE_NUM_THREADS"] == expected[1]
        assert built[0]["ENABLE_CPU_PINNING"] is False
        assert "CACHE_DIR" not in built[0]

    @pytest.mark.parametrize(
        ("content", "expected"),
        [({}, [1, 128, 128, 3]), ({"input": KEEP_RATIO_INPUT}, [1, None, None, 3])],
        ids=["one canvas", "many"],
    )
    def test_one_canvas_is_compiled_for_its_shape(
        self, content: dict[str, Any], expected: list[int | None]
    ) -> None:
        graph = openvino._read(build_graph(), read_config(**content))
        shape = graph.input("images").partial_shape
        assert [side.get_length() if side.is_static else None for side in shape] == expected
        assert graph.input("valid_hw").partial_shape.to_shape() == [1, 2]

    def test_a_call_is_ended_between_two_operators(self, options: BackendOptions) -> None:
        side, count = 1024, 100
        nodes = [f"y{i + 1} = MatMul (y{i}, weight)" for i in range(count)]
        text = build_chain(nodes, count)
        model = onnx.parser.parse_model(text)
        weight = np.full((side, side), 1 / side, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
        backend = build_openvino_backend(model.SerializeToString(), options)
        started = threading.Event()

        def call() -> None:
            started.set()
            backend.infer(build_batch(1, side, side))

        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(call)
            started.wait()
            while not ended.done():
                backend.interrupt()
                time.sleep(0.01)
            with pytest.raises(BackendError, match="openvino failed on images"):
                ended.result()

    @pytest.mark.parametrize("data", [b"", b"no graph", build_graph()[:500]])
    def test_what_is_no_graph_is_refused(self, options: BackendOptions, data: bytes) -> None:
        with pytest.raises(BackendError, match=r"OpenVINO cannot load the graph: [A-Z]"):
            build_openvino_backend(data, options)

    def test_a_graph_that_breaks_the_contract_is_refused(self, options: BackendOptions) -> None:
        with pytest.raises(BackendError, match="masks are float32"):
            build_openvino_backend(build_typed_graph(onnx.TensorProto.FLOAT16), options)
        model = onnx.load_from_string(build_graph())
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
        with pytest.raises(BackendError, match="'images' has the fixed shape"):
            build_openvino_backend(model.SerializeToString(), options)

    def test_a_graph_is_read_from_a_path_too(self, options: BackendOptions, tmp_path: Path) -> None:
        file = tmp_path / "model.onnx"
        file.write_bytes(build_graph())
        assert build_openvino_backend(file, options).concurrency == 1

    def test_compiled_graphs_are_cached_and_damaged_ones_replaced(
        self, options: BackendOptions, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert options.cache is not None
        tiles = build_batch(1, 128, 128)
        caplog.set_level(logging.WARNING)

        def run() -> list[bytes]:
            backend = build_openvino_backend(build_wide_graph(), options, read_config())
            return bits_of(backend.infer(tiles)[0])

        first = run()
        files = list(options.cache.rglob("*.blob"))
        assert files
        assert run() == first
        for file in files:
            file.chmod(0o600)
            file.write_bytes(b"damaged")
        assert run() == first


def test_one_process_at_a_time_uses_the_cache(
    options: BackendOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once: one maps a file into memory that the other truncates, and dies of SIGBUS."""
    assert options.cache is not None
    lock = options.cache / "openvino.lock"

    def compile_with(graph: object, properties: dict[str, str]) -> str:
        assert properties["CACHE_DIR"] == str(options.cache / "openvino")  # type: ignore[operator]
        with lock.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return "compiled"

    monkeypatch.setattr(openvino, "_compile_with", compile_with)
    assert openvino._compile(None, options, 1) == "compiled"
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def build_chain(nodes: list[str], count: int) -> str:
    body = "\n".join(nodes)
    return f"""
    <ir_version: 9, opset_import: ["" : 18]>
    chain (uint8[B, H, W, 3] images, int64[B, 2] valid_hw)
       => (float[B, K] scores, int64[B, K] labels, float[B, K, h, w] mask_probs)
    {{
       real = Cast <to = 1> (images)
       last = Constant <value_ints = [3]> ()
       y0 = ReduceMean <keepdims = 0> (real, last)
       {body}
       first = Constant <value_ints = [1]> ()
       mask_probs = Unsqueeze (y{count}, first)
       spatial = Constant <value_ints = [2, 3]> ()
       means = ReduceMean <keepdims = 0> (mask_probs, spatial)
       size = Cast <to = 1> (valid_hw)
       least = ReduceMin <keepdims = 1> (size, first)
       tiny = Constant <value_float = 1e-9> ()
       nought = Mul (least, tiny)
       scores = Add (means, nought)
       labels = Cast <to = 7> (scores)
    }}
    """
