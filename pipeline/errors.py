"""Errors of the pipeline.

PipelineError
    ConfigError            config.json is not what it should be
    DecodeError            an image is refused; `code` says why
        EmptyImage         no bytes
        UnsupportedFormat  not JPEG, PNG, WebP or BMP
        ImageTooLarge      more bytes or pixels than allowed
        CorruptImage       damaged or truncated
"""

from __future__ import annotations


class PipelineError(ValueError):
    """Base of the pipeline's errors."""


class ConfigError(PipelineError):
    """A model's config.json cannot be used; the message names the field."""


class DecodeError(PipelineError):
    """An image is refused."""

    code = "corrupt_image"


class EmptyImage(DecodeError):
    """There are no bytes."""

    code = "empty_image"


class UnsupportedFormat(DecodeError):
    """The content is not an image of an allowed format."""

    code = "unsupported_format"


class ImageTooLarge(DecodeError):
    """The image has more pixels than allowed."""

    code = "image_too_large"


class CorruptImage(DecodeError):
    """The image cannot be decoded to its end."""

    code = "corrupt_image"
