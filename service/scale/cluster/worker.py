"""A worker: models, engines and pipeline of the single server without its HTTP part."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.errors import DecodeError
from service.engines.choose import check_device
from service.errors import ServiceError
from service.models.repository import load_repository
from service.observe.gpus import find_gpus
from service.observe.logs import configure_logging
from service.observe.metrics import Metrics
from service.scale.cluster.messages import Answer, Call, Description
from service.scale.cluster.metrics import report_worker
from service.scale.merged_metrics import Report
from service.segmenter import LocalSegmenter
from service.settings import Settings
from service.work.request import Outcome, RequestProgress


async def start_segmenter(settings: Mapping[str, Any]) -> LocalSegmenter:
    """What a worker serves with, started.

    Args:
        settings: Of the server, by name.

    Raises:
        StartupError: The device is not there, or no model can be served.
    """
    checked = Settings(**settings)
    configure_logging(checked.log_level, checked.log_format)
    options = checked.backend_options()
    check_device(options)
    repository = await asyncio.to_thread(
        load_repository, checked.model_repo, options, may_be_empty=checked.models_may_change
    )
    metrics = Metrics()
    if checked.device != "cpu":
        metrics.watch_gpus(find_gpus())
    segmenter = LocalSegmenter(checked, repository, metrics)
    segmenter.start()
    return segmenter


class Worker:
    """Serves calls.

    Args:
        segmenter: Started; whoever started it ends it.
    """

    def __init__(self, segmenter: LocalSegmenter) -> None:
        self._segmenter = segmenter

    async def segment(self, call: Call) -> Answer:
        """Does what a request asks for; what it refuses as a whole is the answer's error."""
        segmenter = self._segmenter
        try:
            with segmenter.use(call.model, call.version, call.client) as model:
                segmented = await segmenter.segment(
                    model, call.images, call.options, call.client, RequestProgress()
                )
        except ServiceError as error:
            return Answer(error=error)
        is_expected = segmented.model.version == call.expected
        return Answer(
            outcomes=[_make_portable(outcome) for outcome in segmented.outcomes],
            model=None if is_expected else segmented.model,
        )

    async def describe(self) -> Description:
        """What it serves at the moment."""
        segmenter = self._segmenter
        return Description(segmenter.models, dict(segmenter.unavailable), segmenter.default_model)

    async def report(self) -> Report:
        """Its metrics."""
        return await report_worker(self._segmenter.metrics)

    async def check_health(self) -> None:
        """Raises while an engine has failed: if that lasts, Serve starts another worker."""
        if self._segmenter.models and not self._segmenter.is_ready:
            reason = self._segmenter.failure or "an engine has died and is not back yet"
            raise RuntimeError(reason)


def _make_portable(outcome: Outcome) -> Outcome:
    """An outcome that can be pickled: errors of libraries may not."""
    if outcome.error is None or isinstance(outcome.error, (ServiceError, DecodeError)):
        return outcome
    return replace(outcome, error=ServiceError("the server failed; see its log"))
