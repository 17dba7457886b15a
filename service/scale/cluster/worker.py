"""A worker: models, engines and pipeline of the single server without its HTTP part."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.errors import DecodeError
from service.engines.choose import check_device
from service.errors import ServiceError
from service.models.engine_state import describe_engine
from service.models.repository import load_repository
from service.observe.gpus import find_gpus
from service.observe.logs import configure_logging
from service.observe.metrics import Metrics
from service.scale.cluster.messages import Answer, Call, Description, ModelState
from service.scale.cluster.metrics import report_worker
from service.scale.merged_metrics import Report
from service.settings import Settings
from service.work.segmenter import Segmenter
from service.work.stages import Outcome


async def start_segmenter(settings: Mapping[str, Any]) -> Segmenter:
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
    repository = await asyncio.to_thread(load_repository, checked.model_repo, options)
    metrics = Metrics()
    if checked.device != "cpu":
        metrics.watch_gpus(find_gpus())
    segmenter = Segmenter(checked, repository, metrics)
    segmenter.start()
    return segmenter


class Worker:
    """Serves calls.

    Args:
        segmenter: Started; whoever started it ends it.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter

    async def segment(self, call: Call) -> Answer:
        """Does what a request asks for; what it refuses as a whole is the answer's error."""
        segmenter = self._segmenter
        try:
            with segmenter.use_model(call.model, call.version) as model:
                outcomes = await segmenter.segment(model, call.images, call.options)
        except ServiceError as error:
            return Answer(error=error)
        version = model.loaded.version
        return Answer(
            outcomes=[_make_portable(outcome) for outcome in outcomes],
            version=version,
            config=None if version == call.expected else model.loaded.config,
        )

    async def describe(self) -> Description:
        """What it serves at the moment."""
        store = self._segmenter.store
        models = [
            ModelState(m.loaded.config, m.loaded.version, describe_engine(m.engine))
            for m in store.all_models
        ]
        return Description(models, dict(store.unavailable))

    async def report(self) -> Report:
        """Its metrics."""
        return await report_worker(self._segmenter.metrics)

    async def check_health(self) -> None:
        """Raises while an engine is dead: if that lasts, Serve starts another worker."""
        if not self._segmenter.is_ready:
            raise RuntimeError("an engine has died and is not back yet")


def _make_portable(outcome: Outcome) -> Outcome:
    """An error of a library need not survive the way; what the client is told of it does."""
    if outcome.error is None or isinstance(outcome.error, (ServiceError, DecodeError)):
        return outcome
    return replace(outcome, error=ServiceError("the server failed; see its log"))
