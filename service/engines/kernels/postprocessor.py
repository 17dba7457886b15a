"""Post-processing on the device: candidates stay there, run lengths come back.

`postprocess` treats a `KernelCandidates` like `Candidates`; what the kernels do not do (comparing
enclosed regions, another NMS than the engine was built with) runs on the host. NOT RUN ON HARDWARE:
the tests run the same path on the host.

Symbols: B batch, K candidates, N survivors, h w mask.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.model_config import PostprocessSpec
from pipeline.postprocess import TileCandidates, mask_stride, postprocess_tile
from pipeline.types import Candidates, Detection, Float32, Int64, Tile
from service.engines.base import BackendError
from service.engines.device import CudaDevice
from service.engines.kernels.launcher import CudaLauncher, Launcher
from service.engines.kernels.nvrtc import default_cache, load_cubins
from service.engines.kernels.paste import MaskPlane, paste_masks
from service.engines.kernels.select import (
    DeviceBatch,
    Selection,
    queue_ranking,
    read_ranking,
    select_batch,
)
from service.engines.kernels.workspace import WorkspacePool

logger = logging.getLogger(__name__)

Select = Callable[[DeviceBatch, int], Sequence[TileCandidates]]
"""Makes candidates of a batch, queued on a stream (its handle)."""


class _Lease:
    """Calls `release` when the last of `holders` is gone.

    The garbage collector may call `drop` at any point of any thread, so it takes no lock: a list's
    `pop` is atomic.
    """

    def __init__(self, holders: int, release: Callable[[], None]) -> None:
        self._tokens = list(range(holders))
        self._release = release

    def drop(self) -> None:
        """One holder is gone; called once for each."""
        if self._tokens.pop() == 0:
            self._release()


class KernelCandidates:
    """One tile's candidates, whose masks are on the device. Implements `DeviceCandidates`.

    The masks stay on the device until this object is garbage-collected.
    """

    def __init__(
        self,
        owner: CudaPostprocessor,
        batch: DeviceBatch,
        image: int,
        ranking: tuple[Float32, Int64],
        selection: Selection | None,
    ) -> None:
        self._owner = owner
        self._batch = batch
        self._image = image
        self._slots = np.flatnonzero(ranking[0] > 0)
        self._labels = ranking[1]
        self._scores = ranking[0]
        self._selection = selection

    @property
    def scores(self) -> Float32:
        """[N] float32, best first, without empty slots."""
        return self._scores[self._slots]

    @property
    def labels(self) -> Int64:
        """[N] int64, in the order of `scores`."""
        return self._labels[self._slots]

    @property
    def mask_hw(self) -> tuple[int, int]:
        """h, w."""
        return self._batch.mask_hw

    @property
    def _pointer(self) -> int:
        """Address of the tile's masks [K, h, w]."""
        batch = self._batch
        return batch.mask_probs + self._image * batch.candidates * batch.mask_bytes

    def find_instances(
        self,
        tile: Tile,
        image_hw: tuple[int, int],
        spec: PostprocessSpec,
        *,
        score_threshold: float,
        max_instances: int,
    ) -> list[Detection]:
        """Pastes the survivors of NMS into the original image.

        Where the kernels do not cover `spec`, NMS and pasting run on the host.

        Args:
            tile: The canvas that these candidates are of.
            image_hw: Height and width of the original image.
            spec: The request's post-processing.
            score_threshold: Least score after NMS.
            max_instances: Most instances.

        Returns:
            Instances with pixels in the image, best first.

        Raises:
            BackendError: The device fails.
            ValueError: The masks are not at the model's stride of the canvas.
        """
        if self._selection is None or not self._owner.covers(spec):
            return postprocess_tile(
                tile,
                self.to_host(),
                image_hw,
                spec,
                score_threshold=score_threshold,
                max_instances=max_instances,
            ).instances
        if mask_stride(tile, self.mask_hw) != self._owner.stride:
            raise ValueError(
                f"masks of {self.mask_hw} on a canvas of {tile.image.shape[:2]}: the stride is not "
                f"{self._owner.stride}"
            )
        selection = self._selection
        wanted = int(np.count_nonzero(selection.scores >= score_threshold))
        plane = MaskPlane(
            self._pointer,
            self._batch.mask_type,
            self.mask_hw,
            self._owner.stride,
            spec.mask_threshold,
        )
        found: list[Detection] = []
        start = 0
        # A mask that lies in the padding gives no instance; the next one takes its place.
        while start < wanted and len(found) < max_instances:
            stop = min(wanted, start + max_instances - len(found))
            found += self._paste(plane, tile, image_hw, selection, slice(start, stop))
            start = stop
        return found

    def count_survivors(self, spec: PostprocessSpec, score_threshold: float) -> int:
        """Candidates that NMS keeps with at least this score; 0 where that is not known."""
        if self._selection is None or not self._owner.covers(spec):
            return 0
        return int(np.count_nonzero(self._selection.scores >= score_threshold))

    def _paste(
        self,
        plane: MaskPlane,
        tile: Tile,
        image_hw: tuple[int, int],
        selection: Selection,
        part: slice,
    ) -> list[Detection]:
        jobs = selection.jobs[part]
        with self._owner.workspaces.borrow() as workspace:
            pasted = paste_masks(self._owner.launcher, workspace, plane, tile, image_hw, jobs)
        labels, scores = self._labels[jobs[:, 0]].tolist(), selection.scores[part].tolist()
        return [
            Detection(label, score, mask.rle, mask.bbox_xywh, mask.area)
            for label, score, mask in zip(labels, scores, pasted, strict=True)
            if mask is not None
        ]

    def to_host(self) -> Candidates:
        """The same candidates with their masks copied to the host, as float32."""
        batch = self._batch
        height, width = batch.mask_hw
        used = int(self._slots.max(initial=-1)) + 1
        if used == 0:
            masks = np.zeros((0, height, width), np.float32)
            return Candidates(self.scores, self.labels, masks)
        size_bytes = used * batch.mask_bytes
        launcher = self._owner.launcher
        with self._owner.workspaces.borrow() as workspace:
            host = workspace.host("masks", size_bytes)
            launcher.device.copy(host.pointer, self._pointer, size_bytes, workspace.stream)
            launcher.device.synchronize(workspace.stream)
            raw = host.array[:size_bytes]
            if batch.mask_type == "bfloat16":  # the upper half of a float32
                masks = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                masks = raw.view(batch.mask_type).astype(np.float32)
        masks = masks.reshape(used, height, width)[self._slots]
        return Candidates(self.scores, self.labels, masks)


class CudaPostprocessor:
    """Post-processes outputs on a device; thread-safe.

    Args:
        spec: The model's post-processing.
        stride: Canvas px per mask px.
        launcher: Of the kernels.
    """

    def __init__(self, spec: PostprocessSpec, stride: int, launcher: Launcher) -> None:
        self._spec = spec
        self.stride = stride
        self.launcher = launcher
        self.workspaces = WorkspacePool(launcher.device)

    def covers(self, spec: PostprocessSpec) -> bool:
        """Whether results of `select` hold for `spec`; a response's thresholds do not matter."""
        defaults = {"score_threshold", "max_instances"}
        return spec is self._spec or spec.model_dump(exclude=defaults) == self._spec.model_dump(
            exclude=defaults
        )

    def select(self, batch: DeviceBatch, stream: int) -> list[KernelCandidates]:
        """NMS of a batch, all images at once; waits for the stream.

        Contours (`compare="enclosed"`) are compared on the host, later, in `find_instances`.

        Args:
            batch: Outputs that were queued on `stream`. They are released when the last of the
                results is gone. If this raises, the caller still owns them, and the stream is idle.
            stream: The engine's.

        Returns:
            B entries.

        Raises:
            BackendError: The device fails, or scores are not finite.
        """
        with self.workspaces.borrow(stream) as workspace:
            selections: list[Selection] | list[None] = [None] * batch.batch
            queue_ranking(self.launcher, workspace, batch, stream)
            if self._spec.compare == "masks":  # waits for the stream, so for both
                selections = select_batch(self.launcher, workspace, batch, self._spec, stream)
            else:
                self.launcher.device.synchronize(stream)
            scores, labels = read_ranking(workspace, batch)
        lease = _Lease(batch.batch, batch.release)
        results = []
        for image in range(batch.batch):
            ranking = scores[image], labels[image]
            candidates = KernelCandidates(self, batch, image, ranking, selections[image])
            weakref.finalize(candidates, lease.drop).atexit = False
            results.append(candidates)
        return results

    def close(self) -> None:
        """Frees the scratch memory; workspaces in use are freed when they are returned."""
        self.workspaces.close()


def load_launcher(device: CudaDevice) -> CudaLauncher:
    """The kernels for a GPU, compiled first where no cubin is at hand.

    Raises:
        BackendError: They cannot be compiled or loaded; says why.
    """
    from cuda.core import Device

    try:
        major, minor = Device(device.device_id).compute_capability
    except Exception as error:  # cuda-core's exceptions have no common base
        raise BackendError(f"device {device.device_id} cannot be used: {error}") from error
    cubins = load_cubins((int(major), int(minor)), cache=default_cache())
    return CudaLauncher(device, cubins)


def load_select(device: CudaDevice, spec: PostprocessSpec, stride: int) -> Select | str:
    """What post-processes on a GPU, or why nothing can.

    Args:
        device: The GPU; active in the calling thread.
        spec: The model's post-processing.
        stride: Canvas px per mask px.
    """
    try:
        return CudaPostprocessor(spec, stride, load_launcher(device)).select
    except Exception as error:  # compilers, drivers and loaders fail in many ways
        logger.warning("candidates are copied to the host: %s", error)
        return f"the CUDA kernels cannot be loaded ({error})"
