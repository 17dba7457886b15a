"""Errors of one image and of a whole run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ImageUnusable(Exception):
    """An image has no result; the text gives the reason. The run continues."""


class RunFailed(Exception):
    """The run cannot continue; the text gives the reason."""


def describe(error: Exception) -> str:
    """The reason that an exception gives, without the path that an OSError repeats."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def blame_image() -> Iterator[None]:
    """Raises any exception as `ImageUnusable`, except those that end the run."""
    try:
        yield
    except (ImageUnusable, RunFailed):
        raise
    except Exception as error:
        raise ImageUnusable(describe(error)) from error
