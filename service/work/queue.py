"""The work queue of a model: requests of clients, and which canvas is next."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from service.work.fair import FairQueue, Flow
from service.work.image import ImageWork
from service.work.pixels import PixelBudget
from service.work.request import ClientProfile, Outcome, Rank, RequestProgress

BATCH_EVERY = 8
"""While a client has both, one of so many of its canvases is of priority `batch`: its batch work
gets at least an eighth of the client's service."""

BACKGROUND_EVERY = 32
"""While both wait, one of so many canvases is background work, so that it does not stand still."""

Pick = tuple["Job", ImageWork, int]
"""A request, one of its images, and the index of a canvas."""


@dataclass(eq=False, kw_only=True)
class Job(Flow):
    """The images of one request in the scheduler.

    Attributes:
        client: Whose request it is.
        images: In their order; each gets its outcome.
        priority: The request's.
        progress: Updated after every canvas.
        done: Set when every image has its outcome.
    """

    client: ClientProfile
    images: Sequence[ImageWork]
    in_turns: bool = False
    priority: Rank = "interactive"
    progress: RequestProgress = field(default_factory=RequestProgress)
    done: asyncio.Future[None]
    pending: deque[ImageWork] = field(default_factory=deque)
    unfinished: int = 0
    removed: bool = False

    @property
    def is_background(self) -> bool:
        """Whether it yields to all other work."""
        return self.priority == "background"

    @property
    def tenant(self) -> tuple[str, bool]:
        """The client; its background work is another client's to the queue."""
        return self.client.name, self.is_background

    def skips(self, image: ImageWork) -> bool:
        """Whether canvases of an image need not be processed any more."""
        return self.removed or image.outcome is not None


@dataclass(eq=False)
class _ClientQueue(Flow):
    """A client with work in flight.

    Attributes:
        interactive, batch: Its requests that have a canvas to process.
        jobs: Requests in flight.
        since_batch: Interactive canvases since the last one of priority `batch`.
    """

    interactive: FairQueue[Job] = field(default_factory=FairQueue)
    batch: FairQueue[Job] = field(default_factory=FairQueue)
    jobs: int = 0
    since_batch: int = 0

    def queue_of(self, job: Job) -> FairQueue[Job]:
        return self.batch if job.priority == "batch" else self.interactive

    def first(self) -> FairQueue[Job] | None:
        """The queue that is served next; `batch` at least every `BATCH_EVERY` canvases."""
        if self.batch and (not self.interactive or self.since_batch >= BATCH_EVERY - 1):
            return self.batch
        return self.interactive if self.interactive else None

    def served(self, queue: FairQueue[Job]) -> None:
        """Counts a canvas of a request in one of the queues."""
        self.since_batch = 0 if queue is self.batch else self.since_batch + bool(self.batch)


class WorkQueue:
    """Chooses the next canvas; not thread-safe.

    Args:
        budget: An image is decoded only when its pixels fit.
    """

    def __init__(self, budget: PixelBudget) -> None:
        self.budget = budget
        self._tenants: dict[tuple[str, bool], _ClientQueue] = {}
        self._fair: FairQueue[_ClientQueue] = FairQueue()
        self._background: FairQueue[_ClientQueue] = FairQueue()
        self._since_background = 0
        self._opening: set[ImageWork] = set()
        """Images that are being decoded, with canvases that other threads will take then."""
        self._active: dict[ImageWork, Job] = {}
        self._blocked: list[Job] = []
        self._seen = budget.generation

    def __bool__(self) -> bool:
        return bool(self._fair or self._background)

    @property
    def has_background(self) -> bool:
        """Whether background work waits."""
        return bool(self._background)

    def add(self, job: Job) -> None:
        """Queues a request."""
        job.pending.extend(job.images)
        job.unfinished = len(job.images)
        tenant = self._tenants.get(job.tenant)
        if tenant is None:
            tenant = self._tenants[job.tenant] = _ClientQueue()
        tenant.weight = job.client.weight
        tenant.jobs += 1
        self._push(job)

    def remove(self, job: Job) -> list[int]:
        """Drops a request; canvases that threads are processing are finished and ignored.

        Returns:
            Decoded pixels of each image that are no longer held; the budget needs each by itself.
        """
        if job.removed:
            return []
        job.removed = True
        job.pending.clear()
        freed = [pixels for image in job.images if (pixels := self._drop(image))]
        tenant = self._tenants[job.tenant]
        tenant.jobs -= 1
        if tenant.jobs == 0:  # idle: its next request starts anew
            del self._tenants[job.tenant]
        return freed

    def pick(self, *, background: bool = True) -> Pick | None:
        """The next canvas to process, or None.

        Background work also waits for images that are being decoded.

        Args:
            background: Whether it may be one of background work.
        """
        if self._blocked and self._seen != self.budget.generation:
            blocked, self._blocked = self._blocked, []
            for waiting in blocked:
                self._push(waiting)
        is_due = self._background and self._since_background >= BACKGROUND_EVERY - 1
        order = [self._fair]
        if background and (is_due or not self._opening):
            order.insert(0 if is_due else 1, self._background)
        for fair in order:
            picked = self._pick_from(fair)
            if picked is not None:
                is_other = self._background and fair is self._fair
                self._since_background = self._since_background + 1 if is_other else 0
                return picked
        return None

    def _pick_from(self, fair: FairQueue[_ClientQueue]) -> Pick | None:
        while (tenant := fair.first()) is not None:
            queue = tenant.first()
            if queue is None:
                fair.served(tenant, goes_on=False)
                continue
            job = queue.first()
            assert job is not None
            image = self._next_image(job)
            if image is None:
                queue.served(job, goes_on=False)
                continue
            tenant.served(queue)
            picked = self._take(job, image)
            job.charge()
            tenant.charge()
            queue.served(job, goes_on=self._has_canvas(job))
            fair.served(tenant, goes_on=tenant.first() is not None)
            return picked
        return None

    def pick_active(self) -> Pick | None:
        """Another canvas of an image that is decoded already, or None."""
        # Background work last; there are a few images, as each is decoded.
        active = sorted(self._active.items(), key=lambda item: item[1].is_background)
        for image, job in active:
            if job.is_background and self._opening:
                break
            tenant = self._tenants[job.tenant]
            job.charge()
            tenant.charge()
            return self._take(job, image)
        return None

    def opened(self, job: Job, image: ImageWork) -> int:
        """An image has been decoded.

        Returns:
            Canvases that other threads may process now.
        """
        image.is_opening = False
        self._opening.discard(image)
        more = image.canvases - image.taken
        if job.removed or more <= 0:
            self._forget(job, image)
            return 0
        self._active[image] = job
        self._push(job)
        return more

    def searched(self, job: Job, image: ImageWork) -> bool:
        """A canvas has been post-processed; whether it was the image's last."""
        job.progress.done += 1
        image.searched += 1
        return image.searched == image.canvases

    def finish(self, job: Job, image: ImageWork, outcome: Outcome) -> tuple[bool, int]:
        """Sets an image's outcome, unless it has one.

        Returns:
            Whether the request is finished by it, and decoded pixels that are no longer held.
        """
        if job.skips(image):
            return False, 0
        image.outcome = outcome
        job.unfinished -= 1
        self._forget(job, image)
        return job.unfinished == 0, self._drop(image)

    def release(self, image: ImageWork) -> int:
        """The pixels of an image are no longer needed: how many they were."""
        held, image.held = image.held, 0
        return held

    def _drop(self, image: ImageWork) -> int:
        self._opening.discard(image)
        self._active.pop(image, None)
        image.drop()
        return self.release(image)

    def _push(self, job: Job) -> None:
        tenant = self._tenants.get(job.tenant)
        if tenant is not None and not job.removed and self._has_canvas(job):
            tenant.queue_of(job).push(job)
            (self._background if job.is_background else self._fair).push(tenant)

    @staticmethod
    def _has_canvas(job: Job) -> bool:
        """Whether some image of a request has a canvas that can be taken now."""
        for image in job.pending:  # noqa: SIM110 - three times as fast as any()
            if not image.is_opening:
                return True
        return False

    def _next_image(self, job: Job) -> ImageWork | None:
        """The first image with a canvas to take; its pixels are reserved."""
        if job.removed:
            return None
        for image in job.pending:
            if image.is_opening:
                continue
            if image.taken:
                return image
            generation = self.budget.generation
            if self.budget.take(image.pixels, job.client.name):
                image.held = image.pixels
                return image
            if not self._blocked:
                self._seen = generation
            self._blocked.append(job)
            break
        return None

    def _take(self, job: Job, image: ImageWork) -> Pick:
        index = image.taken
        image.taken += 1
        image.is_opening = index == 0
        if index == 0 and image.canvases > 1 and not job.is_background:
            self._opening.add(image)
        if image.taken == image.canvases:
            self._forget(job, image)
        return job, image, index

    def _forget(self, job: Job, image: ImageWork) -> None:
        """Takes an image without a canvas to take out of the queue."""
        self._active.pop(image, None)
        if image in job.pending:
            job.pending.remove(image)
