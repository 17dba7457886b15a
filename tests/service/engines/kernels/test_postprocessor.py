"""The whole way of a batch through the kernels, on the host and, where there is one, on a GPU."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.decode import decode_image
from pipeline.model_config import MaskNms, MatrixNms, PostprocessSpec
from pipeline.postprocess import postprocess, postprocess_tile
from pipeline.preprocess import prepare
from pipeline.repository_config import parse_model_config
from pipeline.types import Candidates, Detection, Tile, Window
from service.engines.base import BackendError, BackendOptions
from service.engines.kernels.launcher import Launcher
from service.engines.kernels.postprocessor import CudaPostprocessor, KernelCandidates
from service.engines.kernels.select import MaskType
from service.engines.onnxruntime import build_ort_backend
from tests.support.kernel_cases import TIE, Outputs, draw_outputs, unequal
from tests.support.kernel_host import HostLauncher, Uploads

ROOT = Path(__file__).resolve().parents[4]
SPEC = PostprocessSpec(nms=MatrixNms())
STRIDE = 4
HW = (24, 32)
TILE = Tile(np.zeros((96, 128, 3), np.uint8), (90, 128), Window(5, 0, 120, 171))
IMAGE_HW = (130, 171)


@pytest.fixture
def processor(launcher: Launcher) -> Iterator[CudaPostprocessor]:
    built = CudaPostprocessor(SPEC, STRIDE, launcher=launcher)
    yield built
    built.close()


def find(candidates: KernelCandidates, spec: PostprocessSpec = SPEC) -> list[Detection]:
    return postprocess_tile(TILE, candidates, IMAGE_HW, spec).instances


def expect(outputs: Outputs, image: int, spec: PostprocessSpec = SPEC) -> list[Detection]:
    return postprocess_tile(TILE, outputs.candidates(image), IMAGE_HW, spec).instances


def assert_same(found: Sequence[Detection], expected: Sequence[Detection]) -> None:
    assert unequal(found, expected) == []
    assert [i.label for i in found] == [i.label for i in expected]
    np.testing.assert_allclose(
        [i.score for i in found], [i.score for i in expected], rtol=0, atol=TIE
    )


@pytest.mark.parametrize("mask_type", ["float32", "float16", "bfloat16"])
def test_a_batch_equals_numpy(
    processor: CudaPostprocessor, uploads: Uploads, mask_type: MaskType
) -> None:
    outputs = draw_outputs(np.random.default_rng(0), 4, 30, HW, mask_type=mask_type)
    found = processor.select(outputs.upload(uploads), uploads.stream)
    assert len(found) == 4
    for image, candidates in enumerate(found):
        used = outputs.scores[image] > 0
        np.testing.assert_array_equal(candidates.scores, outputs.scores[image][used])
        np.testing.assert_array_equal(candidates.labels, outputs.labels[image][used])
        assert candidates.mask_hw == HW
        assert_same(find(candidates), expect(outputs, image))
    assert len(find(found[0])) > 3


@pytest.mark.parametrize(
    "bounds", [{"score_threshold": 0.5}, {"max_instances": 2}, {"score_threshold": 1.0}]
)
def test_bounds_of_a_request(
    processor: CudaPostprocessor, uploads: Uploads, bounds: dict[str, float]
) -> None:
    outputs = draw_outputs(np.random.default_rng(1), 1, 30, HW)
    (candidates,) = processor.select(outputs.upload(uploads), uploads.stream)
    spec = SPEC.model_copy(update=bounds)  # other defaults, the same NMS
    assert_same(find(candidates, spec), expect(outputs, 0, spec))


@pytest.mark.parametrize("bound", [1, 100])
def test_what_is_cut_off_is_counted(
    processor: CudaPostprocessor, uploads: Uploads, bound: int
) -> None:
    outputs = draw_outputs(np.random.default_rng(1), 1, 30, HW)
    (candidates,) = processor.select(outputs.upload(uploads), uploads.stream)
    spec = SPEC.model_copy(update={"max_instances": bound})
    found = postprocess_tile(TILE, candidates, IMAGE_HW, spec)
    wanted = postprocess_tile(TILE, outputs.candidates(0), IMAGE_HW, spec)
    assert found.found == wanted.found > 1
    assert len(found.instances) == min(bound, found.found)


def test_masks_in_the_padding_do_not_count(processor: CudaPostprocessor, uploads: Uploads) -> None:
    """The bound is of instances, so lesser masks take the places of those without pixels."""
    masks = np.zeros((1, 6, *HW), np.float32)
    masks[0, :4, -1] = 1  # below the 90 valid rows
    masks[0, 4, :4] = masks[0, 5, 10:14] = 1
    scores = np.linspace(0.9, 0.4, 6, dtype=np.float32)[None]
    outputs = Outputs(scores, np.arange(6)[None], masks, masks, "float32")
    (candidates,) = processor.select(outputs.upload(uploads), uploads.stream)
    spec = SPEC.model_copy(update={"max_instances": 2})
    found = find(candidates, spec)
    assert [instance.label for instance in found] == [4, 5]
    assert_same(found, expect(outputs, 0, spec))


@pytest.mark.parametrize(
    "spec",
    [
        SPEC.model_copy(update={"compare": "enclosed"}),
        SPEC.model_copy(update={"nms": MaskNms()}),
        SPEC.model_copy(update={"mask_threshold": 0.3}),
        SPEC.model_copy(update={"update_threshold": 0.4}),
    ],
)
def test_another_spec_than_the_engines_runs_on_the_host(
    processor: CudaPostprocessor, uploads: Uploads, spec: PostprocessSpec
) -> None:
    outputs = draw_outputs(np.random.default_rng(2), 2, 20, HW)
    for image, candidates in enumerate(processor.select(outputs.upload(uploads), uploads.stream)):
        assert find(candidates, spec) == expect(outputs, image, spec)


def test_contours_are_compared_on_the_host(launcher: Launcher, uploads: Uploads) -> None:
    spec = SPEC.model_copy(update={"compare": "enclosed"})
    processor = CudaPostprocessor(spec, STRIDE, launcher=launcher)
    outputs = draw_outputs(np.random.default_rng(3), 2, 20, HW, mask_type="float16")
    for image, candidates in enumerate(processor.select(outputs.upload(uploads), uploads.stream)):
        assert find(candidates, spec) == expect(outputs, image, spec)
    processor.close()


@pytest.mark.parametrize("mask_type", ["float32", "float16", "bfloat16"])
def test_candidates_on_the_host_are_those_of_the_graph(
    processor: CudaPostprocessor, uploads: Uploads, mask_type: MaskType
) -> None:
    outputs = draw_outputs(np.random.default_rng(4), 2, 9, HW, mask_type=mask_type)
    outputs.scores[0, 4] = 0
    outputs.scores[1] = 0
    first, second = processor.select(outputs.upload(uploads), uploads.stream)
    used = outputs.scores[0] > 0
    host: Candidates = first.to_host()
    np.testing.assert_array_equal(host.mask_probs, outputs.mask_probs[0, used])
    assert host.mask_probs.dtype == np.float32
    assert second.to_host().mask_probs.shape == (0, *HW)
    assert find(second) == []


def test_a_canvas_of_another_stride_is_refused(
    processor: CudaPostprocessor, uploads: Uploads
) -> None:
    outputs = draw_outputs(np.random.default_rng(4), 1, 9, HW)
    (candidates,) = processor.select(outputs.upload(uploads), uploads.stream)
    tile = replace(TILE, image=np.zeros((48, 64, 3), np.uint8), valid_hw=(48, 64))
    with pytest.raises(ValueError, match="stride is not 4"):
        postprocess_tile(tile, candidates, IMAGE_HW, SPEC)


class TestRelease:
    """The engine gets its buffers back once, when nobody can need them."""

    def test_when_the_last_candidates_are_gone(
        self, processor: CudaPostprocessor, uploads: Uploads
    ) -> None:
        released: list[str] = []
        outputs = draw_outputs(np.random.default_rng(5), 3, 5, HW)
        batch = outputs.upload(uploads, lambda: released.append("once"))
        found = processor.select(batch, uploads.stream)
        find(found[1])
        while found:
            assert released == []
            found.pop()
            gc.collect()
        assert released == ["once"]

    def test_when_a_request_is_cancelled_in_a_cycle(
        self, processor: CudaPostprocessor, uploads: Uploads
    ) -> None:
        released: list[str] = []
        outputs = draw_outputs(np.random.default_rng(5), 1, 5, HW)
        batch = outputs.upload(uploads, lambda: released.append("once"))
        holder: list[object] = list(processor.select(batch, uploads.stream))
        holder.append(holder)
        del holder
        gc.collect()
        assert released == ["once"]

    def test_by_many_threads_at_once(self, processor: CudaPostprocessor, uploads: Uploads) -> None:
        released: list[str] = []
        outputs = draw_outputs(np.random.default_rng(6), 16, 2, (8, 8))
        batch = outputs.upload(uploads, lambda: released.append("once"))
        found = processor.select(batch, uploads.stream)
        start = threading.Barrier(16)

        def drop() -> None:
            start.wait()
            found.pop()

        threads = [threading.Thread(target=drop) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert released == ["once"]

    def test_a_batch_that_fails_stays_the_callers(
        self, processor: CudaPostprocessor, uploads: Uploads
    ) -> None:
        released: list[str] = []
        outputs = draw_outputs(np.random.default_rng(7), 1, 5, HW)
        outputs.scores[0, 1] = np.inf
        with pytest.raises(BackendError, match="not finite"):
            processor.select(
                outputs.upload(uploads, lambda: released.append("once")), uploads.stream
            )
        assert released == []


class TestConcurrency:
    def test_requests_run_while_the_next_batches_are_selected(
        self, processor: CudaPostprocessor, launcher: Launcher
    ) -> None:
        def serve(seed: int) -> None:
            uploads = Uploads(launcher)
            outputs = draw_outputs(np.random.default_rng(seed), 2, 12, HW)
            for image, candidates in enumerate(
                processor.select(outputs.upload(uploads), uploads.stream)
            ):
                assert_same(find(candidates), expect(outputs, image))
            uploads.close()

        with ThreadPoolExecutor(6) as pool:
            for done in [pool.submit(serve, seed) for seed in range(24)]:
                done.result()

    def test_two_requests_of_one_batch(
        self, processor: CudaPostprocessor, uploads: Uploads
    ) -> None:
        outputs = draw_outputs(np.random.default_rng(11), 6, 12, HW)
        found = processor.select(outputs.upload(uploads), uploads.stream)
        with ThreadPoolExecutor(6) as pool:
            results = list(pool.map(find, found))
        for image, result in enumerate(results):
            assert_same(result, expect(outputs, image))


class TestMemory:
    """On the host, where every allocation is counted."""

    def test_buffers_are_reused_and_freed(self, host_launcher: HostLauncher) -> None:
        processor = CudaPostprocessor(SPEC, STRIDE, launcher=host_launcher)
        uploads = Uploads(host_launcher)
        batch = draw_outputs(np.random.default_rng(0), 2, 10, HW).upload(uploads)
        for candidates in processor.select(batch, uploads.stream):
            find(candidates)
        allocated = host_launcher.cuda.open_buffers
        for candidates in processor.select(batch, uploads.stream):
            find(candidates)
        assert host_launcher.cuda.open_buffers == allocated
        processor.close()
        uploads.close()
        assert not host_launcher.cuda.open_buffers
        assert len(host_launcher.cuda.open_streams) == 1  # the device's own, for allocations

    @pytest.mark.parametrize("kernel", ["pack_bits_float32", "rank_survivors"])
    def test_a_failed_launch_of_a_batch_leaks_nothing(
        self, host_launcher: HostLauncher, kernel: str
    ) -> None:
        processor = CudaPostprocessor(SPEC, STRIDE, launcher=host_launcher)
        uploads = Uploads(host_launcher)
        batch = draw_outputs(np.random.default_rng(0), 2, 10, HW).upload(uploads)
        before = host_launcher.cuda.open_buffers, host_launcher.cuda.open_streams
        host_launcher.fail_at, host_launcher.failure = kernel, BackendError("the device is lost")
        with pytest.raises(BackendError, match="the device is lost"):
            processor.select(batch, uploads.stream)
        assert (host_launcher.cuda.open_buffers, host_launcher.cuda.open_streams) == before
        host_launcher.fail_at = None
        assert len(processor.select(batch, uploads.stream)) == 2

    @pytest.mark.parametrize(
        "kernel", ["axis_taps", "count_edges_float32", "emit_edges_float32", "write_runs"]
    )
    @pytest.mark.parametrize("failure", [BackendError("lost"), KeyboardInterrupt()])
    def test_a_request_that_fails_leaks_nothing(
        self, host_launcher: HostLauncher, kernel: str, failure: BaseException
    ) -> None:
        processor = CudaPostprocessor(SPEC, STRIDE, launcher=host_launcher)
        uploads = Uploads(host_launcher)
        outputs = draw_outputs(np.random.default_rng(0), 1, 10, HW)
        (candidates,) = processor.select(outputs.upload(uploads), uploads.stream)
        host_launcher.fail_at, host_launcher.failure = kernel, failure
        with pytest.raises(type(failure)):
            find(candidates)
        host_launcher.fail_at = None
        assert_same(find(candidates), expect(outputs, 0))
        processor.close()
        uploads.close()
        assert not host_launcher.cuda.open_buffers
        assert len(host_launcher.cuda.open_streams) == 1  # the device's own, for allocations

    def test_what_is_in_use_when_all_is_closed_is_freed_later(
        self, host_launcher: HostLauncher
    ) -> None:
        processor = CudaPostprocessor(SPEC, STRIDE, launcher=host_launcher)
        with processor.workspaces.borrow() as workspace:
            workspace.device("a", 10)
            workspace.host("b", 10)
            processor.close()
            assert len(host_launcher.cuda.open_buffers) == 2
        assert not host_launcher.cuda.open_buffers
        assert len(host_launcher.cuda.open_streams) == 1  # the device's own, for allocations


def test_the_bundled_model_on_real_images(launcher: Launcher, uploads: Uploads) -> None:
    """Nuclei: real probabilities of many touching objects, tiles, and their merging."""
    folder = ROOT / "model_repo" / "nuclei"
    config = parse_model_config((folder / "config.json").read_bytes()).for_version(4)
    engine = build_ort_backend(folder / "4" / "model.onnx", BackendOptions(device="cpu", threads=1))
    processor = CudaPostprocessor(config.postprocess, config.mask_stride, launcher=launcher)
    paths = sorted((ROOT / "tests" / "data" / "nuclei" / "images").iterdir())[:1]
    for path in paths:
        prepared = prepare(decode_image(path.read_bytes()), config.input)
        candidates = [item for tile in prepared.tiles for item in engine.infer([tile])]
        found = [
            _on_device(processor, uploads, item)
            for item in candidates
            if isinstance(item, Candidates)
        ]
        assert len(found) == len(candidates)
        expected = postprocess(prepared, candidates, config.postprocess).instances
        assert len(expected) > 5
        assert_same(postprocess(prepared, found, config.postprocess).instances, expected)
    processor.close()


def _on_device(
    processor: CudaPostprocessor, uploads: Uploads, candidates: Candidates
) -> KernelCandidates:
    """With one empty slot more, whose mask is not a number."""
    masks = np.concatenate(
        [candidates.mask_probs, np.full((1, *candidates.mask_hw), np.nan, np.float32)]
    )[None]
    scores = np.append(candidates.scores, np.float32(0))[None]
    outputs = Outputs(scores, np.append(candidates.labels, 0)[None], masks, masks, "float32")
    (found,) = processor.select(outputs.upload(uploads), uploads.stream)
    return found


def test_nothing_is_logged_in_a_normal_run(
    processor: CudaPostprocessor, uploads: Uploads, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        outputs = draw_outputs(np.random.default_rng(0), 1, 5, HW)
        find(processor.select(outputs.upload(uploads), uploads.stream)[0])
    assert caplog.records == []
