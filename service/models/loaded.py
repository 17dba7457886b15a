"""A version of a model with its engine, and its answers without a scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.auto_scale import ScaleChoice, choose_scale, probe_image
from pipeline.canvases import find_padding
from pipeline.domain import check_domain, describe_exposures
from pipeline.model_config import ModelConfig, Precision
from pipeline.postprocess import Detections, TileCandidates, postprocess
from pipeline.preprocess import prepare
from pipeline.scale import zoom_input
from pipeline.types import AnswerWarning, Detection, Prepared, Tile, UInt8
from service.engines.base import Backend, BackendError
from service.work.request import RequestOptions

WARM_IMAGE_HW = (64, 64)


AS_CONFIGURED = RequestOptions()


@dataclass(frozen=True)
class LocalAnswer:
    """What was found in one image.

    Attributes:
        instances: Best first.
        warnings: Why they may be worthless.
        scale: At which the model saw the image, relative to its usual one.
        confidence: See `Detections`.
    """

    instances: list[Detection]
    warnings: Sequence[AnswerWarning]
    scale: float
    confidence: float


@dataclass(frozen=True)
class LoadedModel:
    """One version of a model with its engine, warm.

    Attributes:
        asked_precision: What config.json or else the server asks for; the engine's may differ.
    """

    config: ModelConfig
    version: int
    backend: Backend
    asked_precision: Precision = "fp32"

    def probe(self, backend: Backend) -> None:
        """Runs an engine of this model on a known-good image; raises if that fails."""
        warm_up(backend, self.config)

    def answer(
        self,
        image: UInt8,
        asked: RequestOptions = AS_CONFIGURED,
        *,
        stated_um_per_px: float | None = None,
        levels: UInt8 | None = None,
    ) -> LocalAnswer:
        """Segments one image in the calling thread, with the server's results.

        Args:
            image: [H, W, 3] uint8 RGB.
            asked: `masks`, `overlay` and `priority` mean nothing here.
            stated_um_per_px: Size of a pixel as the image's file states it.
            levels: Of `decode_stretched` if the contrast rule has been applied already.

        Raises:
            InvalidParameter: The model cannot do what is asked for.
            PixelSizeError: The stated size of a pixel is too far from the model's.
        """
        config = asked.adapt_to(asked.adapt(self.config), stated_um_per_px)
        if levels is not None:
            spec = config.input.model_copy(update={"contrast": None})
            config = config.model_copy(update={"input": spec})
        warnings: list[AnswerWarning] = []
        if asked.scale == "auto":
            choice = self._choose_scale(image, config)
            warnings += choice.warnings
            if choice.zoom != 1:
                scaled = zoom_input(config.input, choice.zoom)
                config = config.model_copy(update={"input": scaled})
        found = self._run(image, config, asked)
        described = describe_exposures(image, config, levels)
        warnings += check_domain(described, found.confidence, config)
        return LocalAnswer(found.instances, warnings, config.input.zoom, found.confidence)

    def segment(self, image: UInt8, **asked: Any) -> list[Detection]:
        """Segments one image in the calling thread, with the server's results.

        Args:
            image: [H, W, 3] uint8 RGB.
            **asked: Fields of `RequestOptions`.

        Raises:
            InvalidParameter: The model cannot do what is asked for.
        """
        return self.answer(image, RequestOptions(**asked)).instances

    def _choose_scale(self, image: UInt8, config: ModelConfig) -> ScaleChoice:
        canvases = find_padding(config, self.backend.device)
        probe = probe_image(image, config.input, canvases)
        found = enumerate(self._infer(probe.prepared))
        sightings = [s for index, seen in found for s in probe.find(index, seen, config)]
        return choose_scale(config, sightings)

    def _run(self, image: UInt8, config: ModelConfig, asked: RequestOptions) -> Detections:
        canvases = find_padding(config, self.backend.device)
        prepared = prepare(image, config.input, canvases=canvases)
        return postprocess(
            prepared,
            self._infer(prepared),
            config.postprocess,
            score_threshold=asked.score_threshold,
            max_instances=asked.max_instances,
            overlaps=asked.overlaps,
            calibration=config.calibration,
        )

    def _infer(self, prepared: Prepared) -> Iterator[TileCandidates]:
        size = self.config.limits.max_batch
        for start in range(0, len(prepared.tiles), size):
            yield from self.backend.infer(prepared.tiles[start : start + size])


def warm_up(backend: Backend, config: ModelConfig) -> None:
    """Runs an engine once on a grey image, so that mismatches and slow first calls happen here."""
    image = np.full((*WARM_IMAGE_HW, 3), 128, np.uint8)
    prepared = prepare(image, config.input, canvases=find_padding(config, backend.device))
    tiles = list(prepared.tiles)
    candidates = backend.infer(tiles)
    _check_output(tiles, candidates, config)
    postprocess(prepared, candidates, config.postprocess)


def _check_output(
    tiles: Sequence[Tile], candidates: Sequence[TileCandidates], config: ModelConfig
) -> None:
    for tile, found in zip(tiles, candidates, strict=True):
        height, width = tile.image.shape[:2]
        wanted = (height // config.mask_stride, width // config.mask_stride)
        if found.mask_hw != wanted:
            raise BackendError(
                f"masks are {found.mask_hw} on a canvas of {(height, width)}; "
                f"config.json's mask_stride {config.mask_stride} asks for {wanted}"
            )
        if len(found.scores) > config.candidates:
            raise BackendError(
                f"{len(found.scores)} candidates, config.json says {config.candidates}"
            )
        wrong = (found.labels < 0) | (found.labels >= len(config.classes))
        if wrong.any():
            raise BackendError(f"label {found.labels[wrong][0]} for {len(config.classes)} classes")
