"""The error of data sets."""

from __future__ import annotations


class DatasetError(ValueError):
    """The folder or a file of a data set is not valid."""
