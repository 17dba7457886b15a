"""What can go wrong in an export; the messages say which file or value and why."""

from __future__ import annotations


class ExportError(Exception):
    """The checkpoint cannot be exported or published."""


class GraphError(ExportError):
    """The exported graph is not what the graph contract says."""


class ParityError(ExportError):
    """The exported graph and PyTorch do not agree."""


class PublishError(ExportError):
    """model_repo cannot take the version."""
