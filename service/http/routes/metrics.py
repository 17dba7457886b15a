"""GET /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.http.routes.state import SegmenterDep

router = APIRouter(tags=["health"])


@router.get("/metrics", response_class=Response)
async def metrics(request: Request, segmenter: SegmenterDep) -> Response:
    """Metrics in Prometheus' text format, or in that of OpenMetrics if the client prefers it.

    ```sh
    curl --fail-with-body localhost:8000/metrics
    ```
    """
    body, media_type = await segmenter.metrics.answer(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": media_type, "vary": "accept"})
