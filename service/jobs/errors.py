"""Errors of one image and of a whole run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_PASSING = re.compile(
    r"\b(NETWORK_CONNECTION|INTERNAL_FAILURE|INTERNAL_ERROR|SERVICE_UNAVAILABLE|UNAVAILABLE"
    r"|SLOW_DOWN|THROTTLING|REQUEST_TIMEOUT|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED"
    r"|HTTP status (429|5\d\d))\b"
)
"""In the texts of the object stores' clients, whose errors have no other distinction."""


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


def may_pass(error: Exception) -> bool:
    """Whether a file in an object store may be readable later: the store cannot be reached."""
    text = re.sub(r"'[^']*'", "", str(error))  # without the file's name
    return isinstance(error, (ConnectionError, TimeoutError)) or bool(_PASSING.search(text))


@contextmanager
def blame_image() -> Iterator[None]:
    """Raises any exception as `ImageUnusable`, except those that end the run."""
    try:
        yield
    except (ImageUnusable, RunFailed):
        raise
    except Exception as error:
        raise ImageUnusable(describe(error)) from error
