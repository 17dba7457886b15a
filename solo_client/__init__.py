"""A Python client of solo-serve: `Client("http://localhost:8000").segment("image.jpg")`."""

from solo_client.answer import Progress
from solo_client.async_client import AsyncClient
from solo_client.client import Client
from solo_client.errors import (
    Busy,
    ConnectionFailed,
    ImageFailed,
    RequestRefused,
    ServerError,
    ServerFailed,
    SoloError,
    TimedOut,
    UnexpectedAnswer,
)
from solo_client.images import ImageInput
from solo_client.jobs import JobStatus
from solo_client.request import Options
from solo_client.result import Instance, Result, ResultFile, ResultWarning
from solo_client.retry import Retry

__all__ = [
    "AsyncClient",
    "Busy",
    "Client",
    "ConnectionFailed",
    "ImageFailed",
    "ImageInput",
    "Instance",
    "JobStatus",
    "Options",
    "Progress",
    "RequestRefused",
    "Result",
    "ResultFile",
    "ResultWarning",
    "Retry",
    "ServerError",
    "ServerFailed",
    "SoloError",
    "TimedOut",
    "UnexpectedAnswer",
]
