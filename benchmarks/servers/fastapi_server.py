"""A plain FastAPI handler: a sync function in the thread pool, with one engine for all threads.

An engine call has one thread, and as many run at once as there are cores: in one process or, if
SERVING_WORKERS is set, in a process for each core.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import anyio.to_thread
import uvicorn
from fastapi import Depends, FastAPI, Request, Response

from benchmarks.servers.common import HOST, JSON, SharedEngine, load_engine, read_cores, read_port

WORKERS = read_cores() if "SERVING_WORKERS" in os.environ else 1


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Loads the engine, and limits the thread pool (40 threads by default) to the cores."""
    app.state.engine = load_engine()
    anyio.to_thread.current_default_thread_limiter().total_tokens = read_cores() // WORKERS
    yield


app = FastAPI(lifespan=lifespan)


async def read_body(request: Request) -> bytes:
    """The image's file."""
    return await request.body()


@app.post("/segment")
def segment(request: Request, body: Annotated[bytes, Depends(read_body)]) -> Response:
    """Segments one image."""
    engine: SharedEngine = request.app.state.engine
    image = engine.decode(body)
    (candidates,) = engine.infer([image])
    return Response(engine.encode(image, candidates), media_type=JSON)


if __name__ == "__main__":
    name = "benchmarks.servers.fastapi_server:app"
    uvicorn.run(name, host=HOST, port=read_port(), workers=WORKERS, log_level="warning")
