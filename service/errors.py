"""The service's errors and their one table to HTTP status.

    ServiceError                  `code` names it in responses, the text says what was wrong
    ├── InvalidRequest            the request cannot be understood
    │   ├── EmptyBody
    │   ├── InvalidMultipart      broken, or without a file part named `images`
    │   ├── InvalidParameter      a query parameter
    │   ├── TooManyImages         more than the server can ever hold
    │   └── TooManyCanvases       an image that needs more canvases than allowed
    ├── BodyTooLarge              more bytes than allowed, counted before parsing
    ├── BodyTimeout               the body has stopped coming
    ├── Unauthorized              no API key, or one that is not known
    ├── Forbidden                 the key may not do this
    ├── QuotaExceeded             the key's share is used up; has `reason` and `retry_after_s`
    ├── UnknownModel
    ├── UnknownVersion
    ├── ModelUnavailable          it is in model_repo, but was refused
    ├── Overloaded                admission is full; has `reason` and `retry_after_s`
    ├── Draining                  the server is going down
    ├── EngineRestarting          the engine has died and another is being built
    ├── DeadlineExceeded          the time that the client gave is over
    ├── EngineError               the engine failed on this very image
    └── StartupError              the server cannot start; never sent
        ├── DeviceError           the device asked for is not there
        └── ModelRefused          has `file`: which file of model_repo, and why

Errors of an image (`pipeline.errors.DecodeError`) carry a code of their own and are in the
same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import orjson

from pipeline.errors import DecodeError


class ServiceError(Exception):
    """Base of the service's errors."""

    code = "internal_error"


class InvalidRequest(ServiceError):
    """The request cannot be understood."""

    code = "invalid_request"


class EmptyBody(InvalidRequest):
    """The body has no bytes."""

    code = "empty_body"


class InvalidMultipart(InvalidRequest):
    """The multipart body is broken or has no image."""

    code = "invalid_multipart"


class InvalidParameter(InvalidRequest):
    """A query parameter has a value it cannot have."""

    code = "invalid_parameter"


class TooManyImages(InvalidRequest):
    """One request holds more than the server may ever have in work."""

    code = "too_many_images"


class TooManyCanvases(InvalidRequest):
    """An image needs more canvases than the server allows."""

    code = "too_many_canvases"


class BodyTooLarge(ServiceError):
    """The body has more bytes than allowed."""

    code = "body_too_large"


class BodyTimeout(ServiceError):
    """No more of the body has come for too long."""

    code = "body_timeout"


class Unauthorized(ServiceError):
    """The request has no API key, or one that is not known."""

    code = "unauthorized"


class Forbidden(ServiceError):
    """The request's API key may not do this."""

    code = "forbidden"


class QuotaExceeded(ServiceError):
    """The share of an API key is used up.

    Attributes:
        reason: Which bound: "key_canvases" or "key_rate".
        retry_after_s: When it may be worth another try.
    """

    code = "quota_exceeded"

    def __init__(self, message: str, reason: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class UnknownModel(ServiceError):
    """There is no such model."""

    code = "unknown_model"


class UnknownVersion(ServiceError):
    """The model has no such version, or it is not served."""

    code = "unknown_version"


class ModelUnavailable(ServiceError):
    """The model is in model_repo but was refused."""

    code = "model_unavailable"


class Overloaded(ServiceError):
    """Admission is full.

    Attributes:
        reason: Which bound: "queue_canvases", "client_share" or "connections".
    """

    code = "overloaded"

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[Overloaded], tuple[str, str]]:
        """How it travels from a worker of a cluster to its front."""
        return type(self), (str(self), self.reason)


class Draining(ServiceError):
    """The server is going down and takes nothing new."""

    code = "draining"


class EngineRestarting(ServiceError):
    """The model's engine has died and another is being built."""

    code = "engine_restarting"


class DeadlineExceeded(ServiceError):
    """The request was not done within the time that its client gave it."""

    code = "deadline_exceeded"


class EngineError(ServiceError):
    """The engine failed on this image, also when it was alone."""

    code = "engine_error"


class StartupError(ServiceError):
    """The server cannot start."""


class DeviceError(StartupError):
    """The device that was asked for is not there."""


class ModelRefused(StartupError):
    """A model cannot be served.

    Attributes:
        file: The file or folder at fault.
    """

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file = file
        self.reason = reason


STATUS_BY_CODE: Mapping[str, int] = {
    "invalid_request": 400,
    "empty_body": 400,
    "invalid_multipart": 400,
    "empty_image": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "unknown_model": 404,
    "unknown_version": 404,
    "method_not_allowed": 405,
    "body_timeout": 408,
    "body_too_large": 413,
    "image_too_large": 413,
    "too_many_images": 413,
    "too_many_canvases": 413,
    "unsupported_format": 415,
    "corrupt_image": 422,
    "invalid_parameter": 422,
    "quota_exceeded": 429,
    "internal_error": 500,
    "engine_error": 500,
    "overloaded": 503,
    "draining": 503,
    "model_unavailable": 503,
    "engine_restarting": 503,
    "deadline_exceeded": 504,
}
"""Every code that a response can carry."""


def describe_error(error: Exception) -> tuple[int, dict[str, str]]:
    """HTTP status and the `{code, message}` object of an error.

    An error that is not ours becomes `internal_error` and tells nothing of itself.
    """
    if isinstance(error, (ServiceError, DecodeError)) and not isinstance(error, StartupError):
        return STATUS_BY_CODE[error.code], {"code": error.code, "message": str(error)}
    return 500, {"code": "internal_error", "message": "the server failed; see its log"}


def build_error_body(detail: Mapping[str, str], path: str) -> bytes:
    """An error as JSON.

    Args:
        detail: Its `code` and `message`.
        path: Whose answer it is. Under /v2 the Open Inference Protocol wants `error` to be a text;
            `code` stands beside it.
    """
    if path == "/v2" or path.startswith("/v2/"):
        return orjson.dumps({"error": detail["message"], "code": detail["code"]})
    return orjson.dumps({"error": detail})
