"""Errors of the pipeline.

PipelineError
    ConfigError            config.json is invalid
    DecodeError            an image is rejected; `code` gives the reason
        EmptyImage         no bytes
        UnsupportedFormat  not of an allowed format, or of a kind of it that is not read
        ImageTooLarge      more pixels than allowed
        CorruptImage       damaged or truncated
        PixelSizeError     the file states a size of pixels that the model cannot be scaled to
        PlaneError         the request names no plane of a stack, or one that it has not
    WriteError             an output format cannot be written
"""

from __future__ import annotations


class PipelineError(ValueError):
    """Base of the pipeline's errors."""


class ConfigError(PipelineError):
    """A model's config.json is invalid; the message names the field."""


class DecodeError(PipelineError):
    """An image is rejected."""

    code = "corrupt_image"


class EmptyImage(DecodeError):
    """The image has no bytes."""

    code = "empty_image"


class UnsupportedFormat(DecodeError):
    """The bytes are not an image of a supported format, or of a kind of it that is not read."""

    code = "unsupported_format"


class ImageTooLarge(DecodeError):
    """The image has more pixels than allowed."""

    code = "image_too_large"


class CorruptImage(DecodeError):
    """The image is damaged or truncated."""

    code = "corrupt_image"


class PixelSizeError(DecodeError):
    """The file states a size of its pixels that is too far from the model's."""

    code = "pixel_size"


class PlaneError(DecodeError):
    """The file has several planes and none is chosen, or it has no such plane."""

    code = "invalid_plane"


class WriteError(PipelineError):
    """An output format is not known, or cannot hold what was found."""
