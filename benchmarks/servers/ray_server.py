"""Ray Serve: a replica for each core, batches, and its options for high throughput.

HAProxy in front and requests straight to the replicas are variables, see contenders.py.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.ours import DecodedImage
from benchmarks.servers.common import HOST, JSON, MAX_BATCH, load_engine, read_cores, read_port
from pipeline.postprocess import TileCandidates


@serve.deployment(
    num_replicas=read_cores(), max_ongoing_requests=64, ray_actor_options={"num_cpus": 1}
)
class RaySegmenter:
    """A replica; it computes in threads, so that its event loop stays free."""

    def __init__(self) -> None:
        self.engine = load_engine()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.005)
    async def infer(self, images: list[DecodedImage]) -> list[list[TileCandidates]]:
        """Runs the engine; called with one image, it gets a batch of them."""
        return await asyncio.to_thread(self.engine.infer, images)

    async def __call__(self, request: Request) -> Response:
        """Segments one image."""
        image = await asyncio.to_thread(self.engine.decode, await request.body())
        candidates = await self.infer(image)
        return Response(
            await asyncio.to_thread(self.engine.encode, image, candidates), media_type=JSON
        )


if __name__ == "__main__":
    ray.init("local", num_cpus=read_cores(), include_dashboard=False, log_to_driver=False)
    serve.start(http_options=HTTPOptions(host=HOST, port=read_port()))
    application = cast(Any, RaySegmenter).bind()  # the decorator has made it a deployment
    serve.run(application, route_prefix="/segment", blocking=True)
