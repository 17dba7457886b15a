"""Reads the keys file and looks for changed models, as SIGHUP asks for."""

from __future__ import annotations

import asyncio
import logging

from starlette.datastructures import State

logger = logging.getLogger(__name__)


class Reloader:
    """Reloads what an application serves, once at a time.

    Args:
        state: The application's.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._task: asyncio.Task[None] | None = None
        self._is_due = False

    def start(self) -> None:
        """Reloads in a task of the running event loop; again afterwards if one is in progress."""
        self._is_due = True
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._reload(), name="reload")

    async def _reload(self) -> None:
        while self._is_due:
            self._is_due = False
            if self._state.keys is not None:
                self._state.keys.reload()
            await self._state.segmenter.rescan()
            logger.info("the model repository has been checked for changes")
