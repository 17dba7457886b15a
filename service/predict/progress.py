"""Progress of large images on the progress bar of a run."""

from __future__ import annotations

import threading
from typing import Any

from tqdm import tqdm

import solo_client


class CanvasProgress:
    """Shows "12/441 canvases" for the images in progress that have several canvases.

    Attributes:
        bar: Progress bar whose postfix it sets; None shows nothing.
    """

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        self._lock = threading.Lock()
        self._by_thread: dict[int, solo_client.Progress] = {}

    def update(self, progress: solo_client.Progress) -> None:
        """Takes the progress of the image that the calling thread works on."""
        thread = threading.get_ident()
        with self._lock:
            if progress.done < progress.total > 1:
                self._by_thread[thread] = progress
            elif self._by_thread.pop(thread, None) is None:
                return  # a small image
            done = sum(image.done for image in self._by_thread.values())
            total = sum(image.total for image in self._by_thread.values())
            if self.bar is not None:
                self.bar.set_postfix_str(f"{done}/{total} canvases" if total else "")
