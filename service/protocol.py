"""What the HTTP layer asks of whoever segments: this process, or workers on a Ray cluster."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from pipeline.model_config import ModelConfig, Precision
from service.engines.state import EngineState
from service.errors import AmbiguousModel, ModelUnavailable, UnknownModel, UnknownVersion
from service.observe.metrics import Metrics
from service.work.admission import Admission
from service.work.request import ClientProfile, ImageFile, Outcome, RequestOptions, RequestProgress

M = TypeVar("M")


ShadowStatus = Literal["running", "promoted", "rejected", "failed"]


@dataclass(frozen=True)
class ShadowState:
    """A version that is, or was, compared with the served one.

    Attributes:
        version: Of the model.
        status: `failed`: it cannot be loaded, or its verdict not be carried out.
        reason: Of the status.
        share: Of the images that it segments.
        images, failures, dropped: That were compared; that it failed on; that it had no time for.
        agreement: Mean panoptic quality of an image, 0..1.
        mean_iou: Of the masks of matched instances.
        unmatched_share: Instances without a partner.
        score_difference: Mean absolute difference of matched instances.
        slowdown: Its engine time over the served version's.
    """

    version: int
    status: ShadowStatus
    reason: str
    share: float
    images: int
    failures: int
    dropped: int
    agreement: float | None
    mean_iou: float | None
    unmatched_share: float | None
    score_difference: float | None
    slowdown: float | None


@dataclass(frozen=True)
class ModelState:
    """A served version of a model.

    Attributes:
        config: From config.json.
        engine: What it is served by at the moment.
        max_batch: Canvases in one engine call.
        asked_precision: What config.json or else the server asks for; the engine's may differ.
        shadow: Of the model.
    """

    config: ModelConfig
    engine: EngineState
    max_batch: int
    asked_precision: Precision = "fp32"
    shadow: ShadowState | None = None

    @property
    def name(self) -> str:
        """The model's name."""
        return self.config.name

    @property
    def version(self) -> int:
        """The version's number."""
        return self.config.version


@dataclass(frozen=True)
class Segmented:
    """The outcome of a request.

    Attributes:
        model: The version that was used.
        outcomes: One for each image, in their order.
    """

    model: ModelState
    outcomes: Sequence[Outcome]


def choose_default(served: Collection[str], named: str | None) -> str | None:
    """Name of the model of requests that name none; None if such requests are refused.

    Args:
        served: Names of the models that are served.
        named: The default model that was set; None means the only one.
    """
    if named is None and len(served) == 1:
        return next(iter(served))
    return named


def find_model(
    served: Mapping[str, Mapping[int, M]],
    unavailable: Collection[str],
    default: str | None,
    name: str | None,
    version: int | None,
) -> M:
    """The model that a request means.

    Args:
        served: By name and version.
        unavailable: Names of models that are not served.
        default: Name of the default model; None means the only one.
        name: None means the default model.
        version: None means the highest that is served.

    Raises:
        AmbiguousModel: None is named, several are served, and none is the default.
        UnknownModel: There is none of that name.
        ModelUnavailable: It is in the repository, but not served; or none is.
        UnknownVersion: It is not served in this version.
    """
    if name is None:
        name = choose_default(served, default)
    if name is None:
        if not served:
            raise ModelUnavailable("no model is served; see GET /v2/models")
        raise AmbiguousModel(
            f"the request names no model, and none of {sorted(served)} is the default; name one: "
            f"model={min(served)}"
        )
    if name not in served:
        if name in unavailable:
            raise ModelUnavailable(f"model {name!r} is not served; see GET /v2/models")
        raise UnknownModel(f"there is no model {name!r}, only {sorted(served)}")
    versions = served[name]
    model = versions.get(max(versions) if version is None else version)
    if model is None:
        raise UnknownVersion(
            f"model {name!r} is served in version {', '.join(map(str, sorted(versions)))}, "
            f"not {version}"
        )
    return model


class Segmenter(Protocol):
    """Serves models."""

    @property
    def metrics(self) -> Metrics:
        """Where everything is counted."""
        ...

    @property
    def admission(self) -> Admission:
        """What is in flight."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether new work is accepted."""
        ...

    @property
    def failure(self) -> str | None:
        """Why the process must be replaced; None while it need not be."""
        ...

    @property
    def models(self) -> Sequence[ModelState]:
        """What is served, by name and version."""
        ...

    @property
    def unavailable(self) -> Mapping[str, str]:
        """Why other models, or newer versions of served ones, are not served; by name."""
        ...

    @property
    def default_model(self) -> str | None:
        """Name of the model of requests that name none; None if such requests are refused."""
        ...

    def start(self) -> None:
        """Begins to serve; needs a running event loop."""
        ...

    def find(self, name: str | None, version: int | None) -> ModelState:
        """The model that a request means, if its engine answers.

        Args:
            name: None means the default model.
            version: None means the highest that is served.

        Raises:
            AmbiguousModel: None is named, several are served, and none is the default.
            UnknownModel: There is none of that name.
            ModelUnavailable: It is in the repository, but not served; or none is.
            UnknownVersion: It is not served in this version.
            EngineRestarting: Its engine has failed and another is being built.
        """
        ...

    def use(
        self, name: str | None, version: int | None, client: ClientProfile
    ) -> AbstractContextManager[Any]:
        """As `find`, for `segment`; the model stays until the context ends.

        Raises:
            Draining, Overloaded: Nothing can be admitted, so the request's body need not be read.
        """
        ...

    async def segment(
        self,
        model: Any,
        images: Sequence[ImageFile],
        options: RequestOptions,
        client: ClientProfile,
        progress: RequestProgress,
    ) -> Segmented:
        """Segments a request's images; cancelling it stops the work.

        Args:
            model: What `use` gave.
            images: The request's.
            options: What it asks for.
            client: The API key or peer address that sent it.
            progress: Kept up to date.

        Raises:
            Overloaded, QuotaExceeded, TooManyImages, Draining: None of the images was admitted.
        """
        ...

    async def load(self, name: str) -> None:
        """Serves what the model's config.json says now; what was served before stays until then.

        Raises:
            UnknownModel: The repository has no such folder.
            ModelUnavailable: It cannot be served; what was served before still is.
        """
        ...

    async def unload(self, name: str) -> None:
        """Stops serving a model; requests that use it are finished.

        Raises:
            UnknownModel: It is not served.
        """
        ...

    async def rescan(self) -> None:
        """Follows the changes of the model repository."""
        ...

    async def finish_accepted(self) -> bool:
        """Refuses new work and waits, within the drain timeout, for what was accepted.

        Returns:
            Whether all of it was finished.
        """
        ...

    async def give_up(self) -> None:
        """Answers what was accepted and is not finished with 503."""
        ...

    async def drain(self) -> None:
        """Finishes accepted work, then frees what it holds."""
        ...
