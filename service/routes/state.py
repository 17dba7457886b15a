"""What routes take from their application: there are no globals."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request

from service.segmenter import Segmenter


async def get_segmenter(request: Request) -> Segmenter:
    """The application's segmenter."""
    return cast(Segmenter, request.app.state.segmenter)


SegmenterDep = Annotated[Segmenter, Depends(get_segmenter)]
