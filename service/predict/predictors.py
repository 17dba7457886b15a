"""Who finds the instances: a model in this process, or a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import solo_client
from pipeline.decode import decode_image
from pipeline.encode import instance_to_coco
from pipeline.errors import DecodeError
from pipeline.model_config import Task
from service.models.repository import LoadedModel
from service.predict.errors import ImageFailed, RunFailed

RETRY = solo_client.Retry(attempts=9, max_wait_s=60)
TIMEOUT_S = 120.0
_OF_THE_IMAGE = (408, 413)


@dataclass(frozen=True)
class Answer:
    """What was found in an image.

    Attributes:
        results: COCO results without their image_id, with RLE.
        task: What their masks are.
        served: Model and version that found them, "name:version".
    """

    results: list[dict[str, Any]]
    task: Task
    served: str


class Predictor(Protocol):
    """What finds the instances of an encoded image."""

    def predict(self, data: bytes) -> Answer:
        """Raises `ImageFailed` or `RunFailed`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Least score and most instances; None takes the model's."""

    score_threshold: float | None = None
    max_instances: int | None = None


@dataclass(frozen=True)
class LocalPredictor:
    """A model in this process: the server's own code without the server."""

    model: LoadedModel
    bounds: Bounds

    def predict(self, data: bytes) -> Answer:
        """See `Predictor`."""
        try:
            image = decode_image(data)
        except DecodeError as error:
            raise ImageFailed(f"{error.code}: {error}") from error
        try:
            instances = self.model.segment(
                image,
                score_threshold=self.bounds.score_threshold,
                max_instances=self.bounds.max_instances,
            )
        except Exception as error:  # an engine's exceptions have no common base
            raise ImageFailed(f"engine_error: {error}") from error
        config = self.model.config
        results = [instance_to_coco(i, config) for i in instances]
        return Answer(results, config.task, f"{config.name}:{self.model.version}")


@dataclass(frozen=True)
class RemotePredictor:
    """A running server.

    Attributes:
        client: Talks to it; asks again as long as the server is too busy.
        bounds: Of the answers.
        model: None takes the server's default.
        version: None takes the one that is served.
    """

    client: solo_client.Client
    bounds: Bounds
    model: str | None = None
    version: int | None = None

    def predict(self, data: bytes) -> Answer:
        """See `Predictor`."""
        try:
            result = self.client.segment(
                data,
                model=self.model,
                version=self.version,
                score_threshold=self.bounds.score_threshold,
                max_instances=self.bounds.max_instances,
            )
        except (solo_client.ConnectionFailed, solo_client.Busy) as error:
            raise RunFailed(str(error)) from error
        except solo_client.RequestRefused as error:
            kind = ImageFailed if error.status in _OF_THE_IMAGE else RunFailed
            raise kind(str(error)) from error
        except solo_client.ImageFailed as error:
            raise ImageFailed(f"{error.code}: {error.message}") from error
        except solo_client.SoloError as error:
            raise ImageFailed(str(error)) from error
        results = [
            {key: value for key, value in found.items() if key != "image_id"}
            for found in result.to_coco(0)
        ]
        return Answer(results, cast(Task, result.task), f"{result.model}:{result.version}")
