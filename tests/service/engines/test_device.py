"""The wrapper of CUDA over a fake `cuda.core`; kernels/test_launcher.py has the real one."""

from __future__ import annotations

import inspect
import sys
from functools import partial

import numpy as np
import pytest

from service.engines.base import BackendError
from service.engines.device import CudaDevice, CudaError
from service.engines.kernels.launcher import Launcher
from service.errors import DeviceError
from tests.support.fake_cuda import FakeCuda, read_memory


@pytest.fixture
def device(fake_cuda: FakeCuda) -> CudaDevice:
    return CudaDevice()


def test_only_what_is_asked_for_is_copied(launcher: Launcher) -> None:
    """Also through the real cuda-core, as is the next: kernels/test_launcher.py."""
    device = launcher.device
    stream = device.open_stream()
    host, memory = device.allocate_pinned(256), device.allocate(256)
    for first, size_bytes in ((0, 256), (1, 100)):
        host.array[:] = (np.arange(256) + first) % 256
        device.copy(memory.pointer, host.pointer, size_bytes, stream)
        device.synchronize(stream)
    host.array[:] = 0
    device.copy(host.pointer, memory.pointer, 256, stream)
    device.synchronize(stream)
    assert host.array.tolist() == [*range(1, 101), *range(100, 256)]
    device.free(host)
    device.free(memory)
    device.close_stream(stream)


def test_an_event_is_waited_for_at_its_last_mark(launcher: Launcher) -> None:
    device = launcher.device
    stream = device.open_stream()
    host, memory, back = (device.allocate_pinned(1), device.allocate(1), device.allocate_pinned(1))
    event = None
    for value in (1, 2):
        host.array[:] = value
        device.copy(memory.pointer, host.pointer, 1, stream)
        device.copy(back.pointer, memory.pointer, 1, stream)
        event = device.record(stream, event)
        device.wait(event)
        assert back.array.tolist() == [value]
    device.close_stream(stream)


def test_a_recorded_graph_runs_when_it_is_launched(device: CudaDevice) -> None:
    stream = device.open_stream()
    host, memory = device.allocate_pinned(1), device.allocate(1)
    host.array[:] = 3
    graph = device.capture(stream, lambda: device.copy(memory.pointer, host.pointer, 1, stream))
    device.synchronize(stream)
    assert read_memory(memory.pointer, np.uint8, (1,)).tolist() == [0xFF]
    for value in (4, 5):
        host.array[:] = value
        device.launch_graph(graph, stream)
        device.synchronize(stream)
        assert read_memory(memory.pointer, np.uint8, (1,)).tolist() == [value]


def test_a_recording_that_fails_leaves_the_stream_usable(device: CudaDevice) -> None:
    stream = device.open_stream()

    def fail() -> None:
        raise ValueError("not this")

    with pytest.raises(ValueError, match="not this"):
        device.capture(stream, fail)
    device.synchronize(stream)


def test_closed_streams_and_freed_memory_are_gone(device: CudaDevice, fake_cuda: FakeCuda) -> None:
    before = fake_cuda.open_streams
    stream = device.open_stream()
    memory = [device.allocate(8), device.allocate_pinned(8)]
    assert fake_cuda.open_streams == before | {stream}
    assert fake_cuda.open_buffers == {part.pointer for part in memory}
    for part in memory:
        device.free(part)
    device.close_stream(stream)
    assert fake_cuda.open_streams == before
    assert not fake_cuda.open_buffers


def test_errors_say_what_could_not_be_done(device: CudaDevice, fake_cuda: FakeCuda) -> None:
    stream = device.open_stream()
    fake_cuda.memory_bytes = 10
    with pytest.raises(CudaError, match=r"CUDA cannot allocate 11 bytes on the device: .*MEMORY"):
        device.allocate(11)
    with pytest.raises(CudaError, match=r"CUDA cannot allocate 12 pinned bytes: .*MEMORY"):
        device.allocate_pinned(12)
    for error in (RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS"), BackendError("ours"), DeviceError()):
        fake_cuda.streams[stream].put(partial(_raise, error))
        expected = CudaError if type(error) is RuntimeError else type(error)
        with pytest.raises(expected) as caught:
            device.synchronize(stream)
        assert type(caught.value) is expected


def _raise(error: Exception) -> None:
    raise error


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(CudaError, match="extra gpu-kernels"):
        CudaDevice()


def test_the_real_cuda_core_has_what_is_called() -> None:
    cuda = pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    assert {"stream"} <= set(inspect.signature(cuda.Device.allocate).parameters)
    assert {"ptr", "size"} <= set(inspect.signature(cuda.Buffer.from_handle).parameters)
    assert {"src", "stream"} <= set(inspect.signature(cuda.Buffer.copy_from).parameters)
    assert "event" in inspect.signature(cuda.Stream.record).parameters
    assert callable(cuda.Event.sync)
    assert "size" in inspect.signature(cuda.LegacyPinnedMemoryResource.allocate).parameters
