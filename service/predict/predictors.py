"""Segments encoded images with a model in this process, or through a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import solo_client
from pipeline.decode import decode_for, open_image
from pipeline.encode import instance_to_coco
from pipeline.errors import DecodeError
from pipeline.formats.planes import PlaneChoice
from pipeline.model_config import Task
from service.jobs.errors import ImageUnusable, RunFailed
from service.models.repository import LoadedModel
from service.work.request import RequestOptions

RETRY = solo_client.Retry(attempts=9, max_wait_s=60)
"""Lasts while a server restarts: the random waits add up to 2 min at most."""
_RUN_CODES = frozenset(
    (
        *("unauthorized", "forbidden", "not_found", "unknown_model", "unknown_version"),
        *("method_not_allowed", "invalid_parameter"),
    )
)
"""Errors of the server that every image would get."""
_RUN_STATUSES = frozenset((301, 302, 303, 307, 308, 401, 404, 405, 407, 502, 504))
"""Of a proxy, or of another server, if there is no code: wrong address, no server behind it."""


@dataclass(frozen=True)
class Prediction:
    """What was found in an image.

    Attributes:
        results: COCO results without their image_id, with RLE.
        task: What the masks are.
        served: Model and version that were used, "name:version".
        truncated: Whether max_instances cut the results.
        warnings: `code` and `message` of each.
        planes: The planes of the file that were asked for.
    """

    results: list[dict[str, Any]]
    task: Task
    served: str
    truncated: bool = False
    warnings: Sequence[Mapping[str, str]] = ()
    planes: PlaneChoice = field(default_factory=PlaneChoice)


class Predictor(Protocol):
    """Finds the instances of an encoded image."""

    def predict(self, data: bytes) -> Prediction:
        """Segments an image file's bytes.

        Raises:
            ImageUnusable: The image cannot be segmented.
            RunFailed: No image can be segmented.
        """
        ...


@dataclass(frozen=True)
class LocalPredictor:
    """Segments with a model in this process."""

    model: LoadedModel
    asked: RequestOptions

    def predict(self, data: bytes) -> Prediction:
        """Decodes the image and runs the model; any error is the image's."""
        try:
            image = open_image(data, choice=self.asked.planes)
            pixels, _, levels = decode_for(image, self.model.config.input)
        except DecodeError as error:
            raise ImageUnusable(f"{error.code}: {error}") from error
        try:
            answer = self.model.answer(
                pixels,
                self.asked,
                stated_um_per_px=image.um_per_px,
                levels=levels,
            )
        except DecodeError as error:
            raise ImageUnusable(f"{error.code}: {error}") from error
        except Exception as error:  # an engine's exceptions have no common base
            raise ImageUnusable(f"engine_error: {error}") from error
        config = self.model.config
        results = [instance_to_coco(i, config) for i in answer.instances]
        limit = self.asked.max_instances or config.postprocess.max_instances
        return Prediction(
            results,
            config.task,
            f"{config.name}:{self.model.version}",
            truncated=len(results) == limit,
            warnings=[vars(warning) for warning in answer.warnings],
            planes=self.asked.planes,
        )


@dataclass(frozen=True)
class RemotePredictor:
    """Segments through a running server.

    Attributes:
        client: Client of the server; it retries while the server is busy.
        asked: Limits of the results, overlaps and scale.
        model: None: the server's default.
        version: None: the version that is served.
        on_progress: Called with the progress of an image, in the thread that called `predict`.
    """

    client: solo_client.Client
    asked: RequestOptions
    model: str | None = None
    version: int | None = None
    on_progress: Callable[[solo_client.Progress], None] | None = None

    def predict(self, data: bytes) -> Prediction:
        """Sends the image; an error that every image would get ends the run."""
        try:
            result = self.client.segment(
                data,
                on_progress=self.on_progress,
                model=self.model,
                version=self.version,
                score_threshold=self.asked.score_threshold,
                max_instances=self.asked.max_instances,
                overlaps=None if self.asked.overlaps == "keep" else self.asked.overlaps,
                object_size_px=self.asked.object_size_px,
                um_per_px=self.asked.um_per_px,
                scale=None if self.asked.scale == "own" else self.asked.scale,
                query=self.asked.planes.named(),
            )
        except (solo_client.ConnectionFailed, solo_client.Busy) as error:
            raise RunFailed(str(error)) from error
        except solo_client.ServerError as error:
            ends = error.code in _RUN_CODES or (not error.code and error.status in _RUN_STATUSES)
            raise (RunFailed if ends else ImageUnusable)(str(error)) from error
        except solo_client.ImageFailed as error:
            raise ImageUnusable(f"{error.code}: {error.message}") from error
        except solo_client.SoloError as error:
            raise ImageUnusable(str(error)) from error
        results = [
            {key: value for key, value in found.items() if key != "image_id"}
            for found in result.to_coco(0)
        ]
        served = f"{result.model}:{result.version}"
        return Prediction(
            results,
            cast(Task, result.task),
            served,
            truncated=result.truncated,
            warnings=[vars(warning) for warning in result.warnings],
            planes=self.asked.planes,
        )
