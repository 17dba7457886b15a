"""Errors of solo-export; messages name the file or value."""

from __future__ import annotations


class ExportError(Exception):
    """The checkpoint cannot be exported or published."""


class GraphError(ExportError):
    """The graph violates the graph contract."""


class ParityError(ExportError):
    """A graph's results differ too much from the reference, or could not be compared."""


class PublishError(ExportError):
    """The version cannot be written to model_repo."""
