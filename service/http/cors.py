"""CORS: which answers a page of another origin may read."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response


def build_cors_options(origins: str) -> dict[str, Any] | None:
    """Arguments of starlette's middleware; None if no origin is allowed.

    Args:
        origins: Comma-separated, or `*`.
    """
    allowed = [origin.strip() for origin in origins.split(",") if origin.strip()]
    if not allowed:
        return None
    return {
        "allow_origins": allowed,
        "allow_methods": ["GET", "HEAD", "POST", "DELETE"],
        "allow_headers": ["*"],
        "expose_headers": [
            "x-request-id",
            "retry-after",
            "location",
            "content-disposition",
            "x-solo-warnings",
        ],
    }


def build_cors_headers(origins: str, origin: str | None) -> list[tuple[str, str]]:
    """The headers of an answer that is written without the application.

    Args:
        origins: As in the settings.
        origin: The request's Origin header.
    """
    options = build_cors_options(origins)
    if options is None:
        return []
    policy = CORSMiddleware(Response(), **options)
    headers = MutableHeaders()
    if origin is not None:
        headers.update(policy.simple_headers)
    if origin is not None and not policy.allow_all_origins and policy.is_allowed_origin(origin):
        policy.allow_explicit_origin(headers, origin)
    else:
        headers["Vary"] = "Origin"
    return headers.items()
