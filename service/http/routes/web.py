"""GET /, /web/{name}, /docs and /openapi.json: the web pages and the files that they load.

Files are served from an allow-list: a path of a request is never used as a path on the disk.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import orjson
from fastapi import APIRouter, FastAPI, Request, Response
from starlette.exceptions import HTTPException

router = APIRouter(include_in_schema=False)

_MEDIA_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "jpg": "image/jpeg",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_SCRIPTS = (
    *("api", "app", "busy", "docs", "draw", "edit", "estimate", "files"),
    *("list", "orient", "rle", "save", "text", "viewer"),
)
_SAMPLES = ("cat", "crowded", "sparse", "street", "tissue")
WEB_FILES = frozenset(
    (
        *("icon.svg", "style.css"),
        *(f"{name}.js" for name in _SCRIPTS),
        *(f"samples/{name}.jpg" for name in _SAMPLES),
    )
)
"""Files of GET /web/{name}, in service/http/web."""
DOCS_FILES = frozenset(("swagger-ui.css", "swagger-ui-bundle.js"))
"""Files of GET /docs/{name}, from the package fastapi_offline."""

_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
_DEMO_POLICY = _POLICY | {"require-trusted-types-for": "'script'"}
_DOCS_POLICY = _POLICY | {"style-src": "'self' 'unsafe-inline'", "img-src": "'self' data: blob:"}
"""Swagger UI sets inline styles and shows pictures of responses."""

_HEADERS = {
    "cache-control": "no-cache",  # cached, but revalidated: a new version shows at once
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
"""In addition to those that the middleware adds to every response."""


@dataclass(frozen=True)
class Asset:
    """A file with its HTTP headers."""

    data: bytes
    media_type: str
    etag: str


@cache
def load_asset(package: str, folder: str, name: str) -> Asset:
    """Reads a file of an installed package; cached.

    Args:
        package: The package.
        folder: Folder in the package.
        name: Path in the folder; from the allow-list.
    """
    data = resources.files(package).joinpath(folder, name).read_bytes()
    return _build_asset(data, _MEDIA_TYPES[name.rpartition(".")[2]])


def _build_asset(data: bytes, media_type: str) -> Asset:
    return Asset(data, media_type, f'"{hashlib.sha256(data).hexdigest()[:32]}"')


def _answer(request: Request, asset: Asset, policy: Mapping[str, str] = _DEMO_POLICY) -> Response:
    """The file, or 304 if the client has its current version."""
    written = "; ".join(f"{name} {value}" for name, value in policy.items())
    headers = _HEADERS | {"content-security-policy": written, "etag": asset.etag}
    known = request.headers.get("if-none-match", "").replace("W/", "").split(",")
    if asset.etag in (tag.strip() for tag in known):
        return Response(status_code=304, headers=headers)
    return Response(asset.data, headers=headers, media_type=asset.media_type)


@router.get("/")
async def demo_page(request: Request) -> Response:
    """The demo page."""
    return _answer(request, load_asset("service.http", "web", "index.html"))


@router.get("/web/{name:path}")
async def web_file(request: Request, name: str) -> Response:
    """A file of the demo page."""
    if name not in WEB_FILES:
        raise HTTPException(404)
    return _answer(request, load_asset("service.http", "web", name))


@router.get("/docs")
async def docs_page(request: Request) -> Response:
    """The interactive description of the API (Swagger UI)."""
    return _answer(request, load_asset("service.http", "web", "docs.html"), _DOCS_POLICY)


@router.get("/docs/{name}")
async def docs_file(request: Request, name: str) -> Response:
    """A file of Swagger UI."""
    if name not in DOCS_FILES:
        raise HTTPException(404)
    return _answer(request, load_asset("fastapi_offline", "static", name), _DOCS_POLICY)


@router.get("/openapi.json")
async def openapi_document(request: Request) -> Response:
    """The OpenAPI document; the first request has it built, in a thread."""
    state = request.app.state
    if not hasattr(state, "openapi_document"):
        building = asyncio.to_thread(_build_document, request.app)
        state.openapi_document = asyncio.ensure_future(building)
    # A client that leaves does not end the building for others.
    return _answer(request, await asyncio.shield(state.openapi_document), _DOCS_POLICY)


def _build_document(app: FastAPI) -> Asset:
    return _build_asset(orjson.dumps(app.openapi()), "application/json")
