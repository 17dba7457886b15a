"""What stops an image, and what stops a run."""

from __future__ import annotations


class ImageFailed(Exception):
    """An image has no result; the text says why. The others are not concerned."""


class RunFailed(Exception):
    """No other image would fare better; the text says why."""
