"""The service's errors, and the table that maps their codes to HTTP status.

Responses have a `ServiceError`'s `code`; its message names the fault. Errors of single images
(`pipeline.errors.DecodeError`) have codes of their own in the same table.
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
    """The request cannot be parsed."""

    code = "invalid_request"


class EmptyBody(InvalidRequest):
    """The request has no body."""

    code = "empty_body"


class InvalidMultipart(InvalidRequest):
    """The multipart body is malformed or has no image."""

    code = "invalid_multipart"


class InvalidParameter(InvalidRequest):
    """A parameter or field has an invalid value."""

    code = "invalid_parameter"


class AmbiguousModel(InvalidRequest):
    """The request names no model, several are served, and none of them is the default."""

    code = "ambiguous_model"


class TooManyImages(InvalidRequest):
    """One request has more images than the server's limit of images in flight."""

    code = "too_many_images"


class TooManyCanvases(InvalidRequest):
    """An image needs more canvases than the server allows."""

    code = "too_many_canvases"


class IdempotencyKeyReused(InvalidRequest):
    """The request's idempotency key is that of a job with other files or parameters."""

    code = "idempotency_key_reused"


class BodyTooLarge(ServiceError):
    """The body exceeds the size limit."""

    code = "body_too_large"


class BodyTimeout(ServiceError):
    """The body arrives too slowly, or takes too long."""

    code = "body_timeout"


class UnsupportedEncoding(ServiceError):
    """The body is compressed."""

    code = "unsupported_encoding"


class HeadTooLarge(ServiceError):
    """The request line and headers have too many bytes, or there are too many headers."""

    code = "head_too_large"


class HeadTimeout(ServiceError):
    """The request line and headers took too long."""

    code = "head_timeout"


class Unauthorized(ServiceError):
    """The request has no API key, or an unknown one."""

    code = "unauthorized"


class Forbidden(ServiceError):
    """The request's API key lacks the permission."""

    code = "forbidden"


class QuotaExceeded(ServiceError):
    """A limit of the API key is reached.

    Attributes:
        reason: The limit: "key_canvases", "key_rate", "key_job_files" or "wrong_keys".
        retry_after_s: Value of the Retry-After header, seconds.
    """

    code = "quota_exceeded"

    def __init__(self, message: str, reason: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class TooManyWrongKeys(QuotaExceeded):
    """An address has sent too many wrong API keys."""

    code = "too_many_wrong_keys"


class NotFound(ServiceError):
    """What is asked for does not exist."""

    code = "not_found"


class NotOffered(ServiceError):
    """A part of a protocol that this server does not have."""

    code = "not_offered"


class UnknownModel(ServiceError):
    """No model has this name."""

    code = "unknown_model"


class UnknownVersion(ServiceError):
    """The model has no such version, or the version is not served."""

    code = "unknown_version"


class ModelUnavailable(ServiceError):
    """The model is in model_repo but not loaded."""

    code = "model_unavailable"


class RepositoryUnreadable(ModelUnavailable):
    """The model repository cannot be read."""


class Overloaded(ServiceError):
    """A limit of the server is reached.

    Attributes:
        reason: The limit: "queue_canvases", "client_share", "connections" or "body_bytes".
    """

    code = "overloaded"

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[Overloaded], tuple[str, str]]:
        """Makes the error picklable, with its `reason`, between processes of a cluster."""
        return type(self), (str(self), self.reason)


class JobsDisabled(ServiceError):
    """The server has no folder for jobs."""

    code = "jobs_disabled"


class JobsUnavailable(ServiceError):
    """The folder for jobs, or a store with files of a job, cannot be used."""

    code = "jobs_unavailable"


class StorageFull(ServiceError):
    """There is no room for another job."""

    code = "storage_full"


class UnknownJob(ServiceError):
    """The client has no job of this id."""

    code = "unknown_job"


class JobNotFinished(ServiceError):
    """The results of a job are asked for before it is done."""

    code = "job_not_finished"


class SourceForbidden(ServiceError):
    """The server's settings do not allow a file, folder or webhook."""

    code = "source_forbidden"


class SourceUnavailable(ServiceError):
    """A file of a job cannot be read."""

    code = "source_unavailable"


class SourceBusy(SourceUnavailable):
    """The store with a file of a job does not answer, or cannot at the moment."""


class ProcessLost(ServiceError):
    """The server's process has ended again and again while it processed a file."""

    code = "process_lost"


class Draining(ServiceError):
    """The server is shutting down and accepts no new work."""

    code = "draining"


class EngineRestarting(ServiceError):
    """The model's engine has failed and is being rebuilt."""

    code = "engine_restarting"


class DeadlineExceeded(ServiceError):
    """The request was not finished before its deadline."""

    code = "deadline_exceeded"


class EngineError(ServiceError):
    """The engine failed on this image, also in a batch of its own."""

    code = "engine_error"


class StartupError(ServiceError):
    """The server cannot start; never sent."""


class DeviceError(StartupError):
    """The requested device is not available."""


class ModelRefused(StartupError):
    """A model cannot be loaded.

    Attributes:
        file: The file or folder at fault.
        reason: What is wrong with it; printable.
    """

    def __init__(self, file: Path, reason: str) -> None:
        self.file = file
        self.reason = make_printable(reason)
        super().__init__(f"{make_printable(str(file))}: {self.reason}")

    def __reduce__(self) -> tuple[type[ModelRefused], tuple[Path, str]]:
        """Makes the error picklable, with its fields."""
        return type(self), (self.file, self.reason)


def make_printable(text: str) -> str:
    """Escapes what cannot be printed or encoded, as in names of files that are not UTF-8."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


STATUS_BY_CODE: Mapping[str, int] = {
    "invalid_request": 400,
    "empty_body": 400,
    "invalid_multipart": 400,
    "ambiguous_model": 400,
    "empty_image": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "source_forbidden": 403,
    "not_found": 404,
    "unknown_model": 404,
    "unknown_version": 404,
    "unknown_job": 404,
    "method_not_allowed": 405,
    "body_timeout": 408,
    "head_timeout": 408,
    "job_not_finished": 409,
    "body_too_large": 413,
    "image_too_large": 413,
    "too_many_images": 413,
    "too_many_canvases": 413,
    "unsupported_format": 415,
    "unsupported_encoding": 415,
    "corrupt_image": 422,
    "invalid_plane": 422,
    "pixel_size": 422,
    "invalid_parameter": 422,
    "idempotency_key_reused": 422,
    "source_unavailable": 422,
    "quota_exceeded": 429,
    "too_many_wrong_keys": 429,
    "head_too_large": 431,
    "internal_error": 500,
    "engine_error": 500,
    "process_lost": 500,
    "jobs_disabled": 501,
    "not_offered": 501,
    "overloaded": 503,
    "draining": 503,
    "model_unavailable": 503,
    "engine_restarting": 503,
    "jobs_unavailable": 503,
    "deadline_exceeded": 504,
    "storage_full": 507,
}
"""Every error code that a response can contain."""


def describe_error(error: Exception) -> tuple[int, dict[str, str]]:
    """HTTP status and `{code, message}` of an error.

    Unexpected exceptions become `internal_error`, without details.
    """
    if isinstance(error, (ServiceError, DecodeError)) and not isinstance(error, StartupError):
        return STATUS_BY_CODE[error.code], {"code": error.code, "message": str(error)}
    return 500, {"code": "internal_error", "message": "the server failed; see its log"}


def drop_frames(error: BaseException) -> None:
    """Drops the tracebacks of an error that is kept, and of its causes.

    Their frames hold the image or the request, and often what keeps the error: as a cycle these
    would stay in memory until a full garbage collection.
    """
    rest: list[BaseException | None] = [error]
    seen: set[int] = set()
    while rest:
        current = rest.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            current.__traceback__ = None
            rest += [current.__cause__, current.__context__]


def build_error_body(detail: Mapping[str, str], path: str) -> bytes:
    """An error as JSON.

    Args:
        detail: Its `code` and `message`.
        path: Path of the request. Under /v2, `error` is the message and `code` a field beside it,
            as the Open Inference Protocol requires a string.
    """
    if path == "/v2" or path.startswith("/v2/"):
        return orjson.dumps({"error": detail["message"], "code": detail["code"]})
    return orjson.dumps({"error": detail})
