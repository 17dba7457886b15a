"""What routes take from their application: there are no globals."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, cast

from fastapi import Depends, Request

from service.errors import Forbidden, Unauthorized
from service.http.keys import KeyRing, Quota
from service.work.segmenter import Segmenter


async def get_segmenter(request: Request) -> Segmenter:
    """The application's segmenter."""
    return cast(Segmenter, request.app.state.segmenter)


SegmenterDep = Annotated[Segmenter, Depends(get_segmenter)]


async def find_quota(request: Request) -> Quota | None:
    """The quota of the request's API key; None where the server asks for no keys.

    Raises:
        Unauthorized: There is no key in the request, or it is not known.
    """
    ring = cast(KeyRing | None, request.app.state.keys)
    if ring is None:
        return None
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    key = request.headers.get("x-api-key") or (token.strip() if scheme.lower() == "bearer" else "")
    if not key:
        raise Unauthorized("the server asks for an API key: header X-API-Key, or a bearer token")
    quota = ring.find(key)
    if quota is None:
        raise Unauthorized("the API key is not known")
    return quota


QuotaDep = Annotated[Quota | None, Depends(find_quota)]


def admit_images(quota: Quota | None, images: int) -> AbstractContextManager[None]:
    """Counts a request's images against its key's quota, if it has one."""
    return nullcontext() if quota is None else quota.admit(images)


async def require_admin(quota: QuotaDep) -> None:
    """Refuses keys that may not change what is served.

    Raises:
        Forbidden: The key is not an administrator's.
    """
    if quota is not None and not quota.spec.admin:
        raise Forbidden(f"key {quota.spec.name!r} is not an administrator's")
