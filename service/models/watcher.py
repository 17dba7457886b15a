"""Follows changes of the repository on disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping

from service.errors import (
    ModelRefused,
    ModelUnavailable,
    RepositoryUnreadable,
    UnknownModel,
    make_printable,
)
from service.models.folders import Stamp, list_models, read_stamps
from service.models.store import ModelStore
from service.observe.metrics import Metrics

logger = logging.getLogger(__name__)

GONE_S = 0.25
"""How long a model must be missing: a folder may be replaced by renaming."""


class RepositoryWatcher:
    """Loads what changes in the repository and unloads what vanishes.

    A repository that cannot be read, or that has lost all its models, changes nothing: it may be
    unmounted for a moment.

    Args:
        store: What is served.
        seen: Stamps of the models when they were loaded.
        metrics: Shows whether the repository can be read.
    """

    def __init__(self, store: ModelStore, seen: Mapping[str, Stamp], metrics: Metrics) -> None:
        self._store = store
        self._seen = seen
        self._metrics = metrics
        self._checking = asyncio.Lock()
        self._problem = ""

    async def poll(self, interval_s: float) -> None:
        """Checks the repository at intervals; never returns."""
        while True:
            await asyncio.sleep(interval_s)
            await self.check()

    async def check(self) -> None:
        """Follows the changes since the last check; what fails is logged, never raised."""
        async with self._checking:
            try:
                await self._follow()
                await self._store.read_default()
            except OSError as error:
                self._report(f"it cannot be read: {error.strerror or error}")
            except ModelRefused as error:
                self._report(str(error))
            except Exception as error:  # whatever it is, the next check has to come
                self._report(repr(error))
                logger.debug("the check of the model repository failed", exc_info=True)
            else:
                self._report("")

    async def _follow(self) -> None:
        names, now = await asyncio.to_thread(self._scan)
        changed = [name for name in sorted(now) if self._has_changed(name, now[name])]
        retried = [name for name in changed if not await self._load(name)]
        gone = self._find_gone(names, now)
        self._seen = {
            name: stamp for name, stamp in {**self._seen, **now}.items() if name not in retried
        }
        if gone:
            await asyncio.sleep(GONE_S)
            gone &= self._find_gone(*await asyncio.to_thread(self._scan))
        for name in sorted(gone):
            await self._store.remove(name)
        self._seen = {name: stamp for name, stamp in self._seen.items() if name not in gone}

    def _scan(self) -> tuple[set[str], Mapping[str, Stamp]]:
        """Names of all folders, and stamps of those that have a config.json.

        Raises:
            OSError: The repository cannot be read, or has lost all models.
        """
        folders = list_models(self._store.root)
        stamps = read_stamps(folders)
        if not stamps and self._store.served:
            raise OSError("it has no model any more; what is loaded is kept")
        return {make_printable(folder.name) for folder in folders}, stamps

    def _find_gone(self, names: Collection[str], now: Mapping[str, Stamp]) -> set[str]:
        return {name for name in (*self._seen, *self._store.served) if name not in now} | {
            name for name in self._store.unavailable if name not in names
        }

    def _has_changed(self, name: str, stamp: Stamp) -> bool:
        """Files count only for a model that is refused: they may have been incomplete."""
        seen = self._seen.get(name)
        if seen is None or seen.config != stamp.config:
            return True
        return name in self._store.unavailable and seen.files != stamp.files

    async def _load(self, name: str) -> bool:
        """Loads a model; False if the next check has to try again, without a change."""
        try:
            await self._store.load(name)
        except RepositoryUnreadable:
            return False
        except (ModelUnavailable, UnknownModel):
            return True  # it is refused, and the reason is logged; or it has just vanished
        except Exception:
            logger.exception("model %s has changed, but cannot be loaded yet", name)
            return False
        return True

    def _report(self, problem: str) -> None:
        """Logs a problem when it begins and when it ends."""
        self._metrics.repository_readable.set(not problem)
        if problem == self._problem:
            return
        self._problem = problem
        if problem:
            logger.error("model repository %s: %s", self._store.root, problem)
        else:
            logger.info("model repository %s can be read again", self._store.root)
