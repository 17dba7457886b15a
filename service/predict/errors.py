"""Errors of one image and of a whole run."""

from __future__ import annotations


class ImageUnusable(Exception):
    """An image has no result; the text gives the reason. The run continues."""


class RunFailed(Exception):
    """The run cannot continue; the text gives the reason."""
