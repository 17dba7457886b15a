"""The first pass of an image whose scale is to be found: some canvases at several scales."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pipeline.auto_scale import ImageProbe, Sighting, choose_scale, probe_image
from pipeline.model_config import Canvas, ModelConfig
from pipeline.postprocess import TileCandidates
from pipeline.scale import zoom_input
from pipeline.types import Prepared, Tile, UInt8
from service.observe.timing import Interval
from service.work.image import HW, ImageWork
from service.work.request import ImageFile, Outcome, RequestOptions


class ProbeWork(ImageWork):
    """Scheduled as an image; afterwards `scaled` is the model's configuration for it.

    The file stays with whoever gave it: it is decoded again at the scale that was chosen.

    Args:
        file: The image.
        image_hw: Height and width that were admitted, before orientation.
        canvases: Canvases that were admitted.
        config: The model's.
        options: The request's, of which the planes count.
    """

    def __init__(
        self,
        file: ImageFile,
        image_hw: HW,
        canvases: int,
        config: ModelConfig,
        options: RequestOptions,
    ) -> None:
        planes = RequestOptions(channel=options.channel, z=options.z, t=options.t)
        super().__init__(file, image_hw, canvases, config, planes)
        self.scaled = config
        self._probe: ImageProbe | None = None
        self._sightings: list[Sighting] = []

    def _cut(self, pixels: UInt8, image_hw: HW | None, canvases: Sequence[Canvas]) -> Prepared:
        self._probe = probe_image(pixels, self._config.input, canvases)
        return self._probe.prepared

    def search(
        self, index: int, tile: Tile, candidates: TileCandidates, call: Interval, share: float
    ) -> None:
        """Notes the sizes of the objects on one canvas."""
        assert self._probe is not None
        started_s = time.monotonic()
        found = self._probe.find(index, candidates, self._config)
        with self._lock:
            self._sightings += found
            self._calls.append(call)
            self._engine_s += (call[1] - call[0]) * share
            self._searches.append((started_s, time.monotonic()))

    def finish(self, began_s: float) -> Outcome:
        """Chooses the scale."""
        choice = choose_scale(self._config, sorted(self._sightings, key=_order))
        self.warnings = [*choice.warnings]
        if choice.zoom != 1:
            scaled = zoom_input(self.scaled.input, choice.zoom)
            self.scaled = self.scaled.model_copy(update={"input": scaled})
        self._probe = None
        return Outcome(b"", canvases=self.canvases)


def _order(sighting: Sighting) -> tuple[float, float, float]:
    """Threads finish in any order; the choice must not depend on it."""
    return sighting.zoom, sighting.diameter_px, sighting.score
