"""Admission: how many canvases may be in flight, in all and for each client.

All of a request's images are admitted or none. What is admitted is counted until it is answered.

A client may hold at most as many canvases as are free then: alone it can use half of the queue, and
there is always room for another client (dynamic thresholds, Choudhury and Hahne 1998). A request
that is refused costs its client nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from service.errors import Draining, Overloaded, QuotaExceeded, TooManyImages
from service.work.request import ClientProfile

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Account:
    """A client's canvases.

    Attributes:
        held: In flight.
        credit: That may still be sent at once, if the client's rate is bounded.
        credited_s: When `credit` was true.
    """

    held: int
    credit: float
    credited_s: float

    def refill(self, rate: float, now_s: float) -> None:
        self.credit = min(rate, self.credit + (now_s - self.credited_s) * rate / 60)
        self.credited_s = now_s


class Admission:
    """Counts work in flight; used from one event loop.

    Args:
        max_canvases: Canvases in flight.
        clock: Seconds, monotonic.

    Attributes:
        canvases: In flight.
        images: In flight.
        requests: In flight, also those whose body is still being read.
        closed: Set when no more work is admitted.
    """

    def __init__(self, max_canvases: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_canvases = max_canvases
        self.canvases = 0
        self.images = 0
        self.requests = 0
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self.closed = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether new work is admitted at all."""
        return not self.closed.is_set()

    def close(self) -> None:
        """Refuses all new work from now on."""
        self.closed.set()

    async def unless_closed(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for something that precedes accepted work; cancels it when new work is refused.

        Raises:
            Draining: The server is going down.
        """
        closed = asyncio.ensure_future(self.closed.wait())
        working = asyncio.ensure_future(work)
        try:
            await asyncio.wait({closed, working}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise Draining("the server is going down")
        finally:
            closed.cancel()
            working.cancel()

    @contextmanager
    def request(self, client: ClientProfile) -> Iterator[None]:
        """Counts a request, unless not even one canvas fits: then its body need not be read.

        Raises:
            Draining: The server is going down.
            Overloaded: There is no room.
        """
        self._check_room(client, 1)
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    async def finish(self, timeout_s: float) -> bool:
        """Refuses new work and waits for the requests in flight.

        Returns:
            Whether all of them were finished in time.
        """
        self.close()
        deadline_s = time.monotonic() + timeout_s
        while self.requests and time.monotonic() < deadline_s:
            await asyncio.sleep(0.01)
        if self.requests:
            logger.error("%d requests were not finished in time", self.requests)
        return not self.requests

    @contextmanager
    def admit(self, client: ClientProfile, costs: Sequence[int]) -> Iterator[None]:
        """Holds room for a request.

        Args:
            client: Its sender.
            costs: Canvases of each image.

        Raises:
            Draining: The server is going down.
            TooManyImages: More than half of the queue, or than the client's bound.
            Overloaded: It does not fit now.
            QuotaExceeded: The client's own bounds do not allow it now.
        """
        canvases = sum(costs)
        most = min(self.max_canvases // 2, client.max_canvases or self.max_canvases)
        if canvases > most:
            raise TooManyImages(
                f"the request has {len(costs)} images with {canvases} canvases together, at most "
                f"{most} are allowed; send fewer images at once"
            )
        self._check_quota(client, canvases)
        self._check_room(client, canvases)
        account = self._spend(client, canvases)
        self.canvases += canvases
        self.images += len(costs)
        account.held += canvases
        try:
            yield
        finally:
            self.canvases -= canvases
            self.images -= len(costs)
            account.held -= canvases
            self._forget(client, account)

    def held(self, client: ClientProfile) -> int:
        """Canvases of a client in flight."""
        account = self._accounts.get(client.name)
        return 0 if account is None else account.held

    def _check_room(self, client: ClientProfile, canvases: int) -> None:
        if self.closed.is_set():
            raise Draining("the server is going down")
        free, held = self.max_canvases - self.canvases, self.held(client)
        if held + canvases <= free - canvases:
            return
        if held:
            raise Overloaded(
                f"the client has {held} canvases in flight, {canvases} more would exceed its "
                f"share: as many as are free ({free} of {self.max_canvases})",
                "client_share",
            )
        raise Overloaded(
            f"{self.canvases} of {self.max_canvases} canvases are in flight, there is no room for "
            f"{canvases} more",
            "queue_canvases",
        )

    def _check_quota(self, client: ClientProfile, canvases: int) -> None:
        held = self.held(client)
        if client.max_canvases is not None and held + canvases > client.max_canvases:
            raise QuotaExceeded(
                f"{client.name} has {held} canvases in flight, {canvases} more would exceed "
                f"{client.max_canvases}",
                "key_canvases",
                1,
            )
        rate = client.canvases_per_minute
        if rate is None:
            return
        account = self._account(client)
        account.refill(rate, self._clock())
        needed = min(canvases, rate)  # a request of more than a minute's worth leaves a debt
        if needed > account.credit:
            wait_s = (needed - account.credit) * 60 / rate
            raise QuotaExceeded(
                f"{client.name} may send {rate:g} canvases a minute; {canvases} are too many now",
                "key_rate",
                max(1, math.ceil(wait_s)),
            )

    def _spend(self, client: ClientProfile, canvases: int) -> _Account:
        account = self._account(client)
        if client.canvases_per_minute is not None:
            account.credit -= canvases
        return account

    def _account(self, client: ClientProfile) -> _Account:
        account = self._accounts.get(client.name)
        if account is None:
            credit = client.canvases_per_minute or 0.0
            account = self._accounts[client.name] = _Account(0, credit, self._clock())
        return account

    def _forget(self, client: ClientProfile, account: _Account) -> None:
        """Addresses come and go; what a key has spent is remembered."""
        if not account.held and client.canvases_per_minute is None:
            self._accounts.pop(client.name, None)
