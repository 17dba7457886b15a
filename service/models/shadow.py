"""A shadow: a version that segments a share of the images too, and is never answered with.

Its answers are compared with those of the served version. It runs one canvas at a time in one
thread, each only while no request is in flight; images for which there is no time are dropped.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import orjson

from pipeline.answer_match import AnswerMatch, compare_instances
from pipeline.canvases import find_padding
from pipeline.repository_config import ShadowedVersion
from service.background import run_in_thread
from service.models.repository import LoadedModel
from service.models.shadow_rule import ShadowTally, Verdict, describe_shadow, judge
from service.observe.shadow_metrics import ShadowMetrics
from service.protocol import ShadowState
from service.work.image import ImageWork, count_cost, peek_size, read_image_header
from service.work.request import ImageFile, Outcome, RequestOptions

logger = logging.getLogger(__name__)

MAX_WAITING = 16
"""Images that wait for the shadow."""
MAX_WAITING_BYTES = 64 * 2**20
MAX_INSTANCES = 1000
"""Of one answer; images with more are not compared."""
PATIENCE_S = 30.0
"""How long an image may wait in all until no request is in flight."""
_PAUSE_S = 0.01


class NoTime(Exception):
    """Requests were in flight all the time."""


class ShadowHung(Exception):
    """An engine call has not returned in time."""


@dataclass(frozen=True)
class ShadowTask:
    """An image that the served version has segmented.

    Attributes:
        file: The image.
        options: Of its request.
        outcome: Of the served version.
    """

    file: ImageFile
    options: RequestOptions
    outcome: Outcome


class ShadowRun:
    """One shadow, from its start to its verdict; used from one event loop.

    Args:
        name: The model's.
        policy: What is compared, and what follows.
        loaded: The shadow; `close` frees its engine.
        metrics: Where images are counted.
        is_idle: Whether no request is in flight; called by any thread.
        max_pixels: Largest image.
        call_timeout_s: Longest engine call.
        on_verdict: Called once, with the verdict and its reason.
    """

    def __init__(
        self,
        name: str,
        policy: ShadowedVersion,
        loaded: LoadedModel,
        metrics: ShadowMetrics,
        *,
        is_idle: Callable[[], bool],
        max_pixels: int,
        call_timeout_s: float,
        on_verdict: Callable[[Verdict, str], None],
    ) -> None:
        self.policy = policy
        self.tally = ShadowTally()
        self._name = name
        self._loaded = loaded
        self._metrics = metrics
        self._is_idle = is_idle
        self._max_pixels = max_pixels
        self._call_timeout_s = call_timeout_s
        self._on_verdict = on_verdict
        self._waiting: asyncio.Queue[ShadowTask] = asyncio.Queue(MAX_WAITING)
        self._waiting_bytes = 0
        self._credit = 0.0
        self._call_began_s: float | None = None
        self._is_closed = self._is_comparing = self._is_freed = False
        self._lock = threading.Lock()
        metrics.begin(name, policy.shadow)
        self._task = asyncio.ensure_future(self._work())

    @property
    def state(self) -> ShadowState:
        """What is shown of it."""
        return describe_shadow(self.policy, self.tally, "running", "")

    def offer(
        self, images: Sequence[ImageFile], options: RequestOptions, outcomes: Sequence[Outcome]
    ) -> None:
        """Takes the share of a request's images, if their masks can be compared; never waits."""
        is_plain = options.masks == "rle" and options.scale == "own" and options.format is None
        if options.overlay or not is_plain:
            return
        for file, outcome in zip(images, outcomes, strict=True):
            if outcome.error is not None or outcome.instances > MAX_INSTANCES:
                continue
            self._credit += self.policy.share
            if self._credit < 1:
                continue
            self._credit -= 1
            size = _count_bytes(file)
            if self._waiting.full() or self._waiting_bytes + size > MAX_WAITING_BYTES:
                self._drop()
            else:
                self._waiting_bytes += size
                self._waiting.put_nowait(ShadowTask(file, options, outcome))

    async def close(self) -> None:
        """Ends it; the engine is freed when its call in flight has ended."""
        if self._is_closed:
            return
        self._is_closed = True
        self._metrics.end(self._name, self.policy.shadow)
        if asyncio.current_task() is not self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._free()

    def _free(self) -> None:
        """Frees the engine if the shadow has ended and no thread uses it."""
        with self._lock:
            is_last = self._is_closed and not self._is_comparing and not self._is_freed
            self._is_freed |= is_last
        if is_last:
            self._loaded.backend.close()

    def _drop(self) -> None:
        self.tally.dropped += 1
        self._metrics.images.labels(self._name, self.policy.shadow, "dropped").inc()

    async def _work(self) -> None:
        while not self._is_closed:
            task = await self._waiting.get()
            self._waiting_bytes -= _count_bytes(task.file)
            try:
                agreement, seconds = await self._run(partial(self._compare, task))
            except NoTime:
                self._drop()
                continue
            except Exception as error:  # whatever it is, it is the shadow's
                self._fail(error)
            else:
                self.tally.add(agreement, task.outcome.engine_s, seconds)
                self._metrics.add(self._name, self.policy.shadow, agreement)
            verdict = judge(self.policy, self.tally)
            if verdict is not None:
                self._on_verdict(*verdict)
                return

    def _fail(self, error: Exception) -> None:
        self.tally.failures += 1
        self.tally.last_failure = f"{type(error).__name__}: {error}"[:500]
        self._metrics.images.labels(self._name, self.policy.shadow, "failed").inc()
        logger.warning(
            "version %d of model %s failed as a shadow: %s",
            *(self.policy.shadow, self._name, self.tally.last_failure),
        )
        if isinstance(error, ShadowHung):  # no further call would return
            self.tally.failures = max(self.tally.failures, self.policy.max_failures + 1)

    async def _run(
        self, compare: Callable[[], tuple[AnswerMatch, float]]
    ) -> tuple[AnswerMatch, float]:
        """Runs a comparison in a thread, which is given up if an engine call does not return."""
        thread = asyncio.ensure_future(run_in_thread(compare))
        try:
            while not thread.done():
                await asyncio.wait({thread}, timeout=min(0.5, self._call_timeout_s / 4))
                began_s = self._call_began_s
                if began_s is not None and time.monotonic() - began_s > self._call_timeout_s:
                    raise ShadowHung(f"a call has not returned after {self._call_timeout_s:g} s")
            return thread.result()
        finally:
            thread.cancel()

    # --- in a thread --------------------------------------------------------------------------

    def _compare(self, task: ShadowTask) -> tuple[AnswerMatch, float]:
        with self._lock:
            if self._is_closed:
                raise NoTime
            self._is_comparing = True
        try:
            return self._segment(task)
        finally:
            with self._lock:
                self._is_comparing = False
            self._free()

    def _segment(self, task: ShadowTask) -> tuple[AnswerMatch, float]:
        """Segments an image; the agreement, and the engine's time, seconds."""
        config = task.options.adapt(self._loaded.config)
        deadline_s = time.monotonic() + PATIENCE_S
        self._wait(deadline_s)
        size = peek_size(task.file.data)
        if size is None:
            header = read_image_header(task.file.data, self._max_pixels)
            size, config = header.hw, task.options.adapt_to(config, header.um_per_px)
        canvases = count_cost(size, config.input, 1 << 30)
        work = ImageWork(task.file, size, canvases, config, task.options)
        work.open(find_padding(config, self._loaded.backend.device))
        began_s = time.monotonic()
        for index in range(work.canvases):
            self._wait(deadline_s)
            tile, _ = work.make_canvas(index)
            self._call_began_s = began_s = time.monotonic()
            try:
                (found,) = self._loaded.backend.infer([tile])
            finally:
                self._call_began_s = None
            work.search(index, tile, found, (began_s, time.monotonic()), 1.0)
        outcome = work.finish(began_s)
        if outcome.instances > MAX_INSTANCES:
            raise ValueError(f"{outcome.instances} instances are too many to be compared")
        answers = [orjson.loads(payload) for payload in (task.outcome.payload, outcome.payload)]
        live, shadow = (answer["instances"] for answer in answers)
        return compare_instances(live, shadow), outcome.engine_s

    def _wait(self, deadline_s: float) -> None:
        """Waits until no request is in flight.

        Raises:
            NoTime: There was none until the deadline, or the shadow was closed.
        """
        while not self._is_idle():
            if self._is_closed or time.monotonic() > deadline_s:
                raise NoTime
            time.sleep(_PAUSE_S)
        if self._is_closed:
            raise NoTime


def _count_bytes(file: ImageFile) -> int:
    return len(file.data) if isinstance(file.data, bytes) else file.data.nbytes
