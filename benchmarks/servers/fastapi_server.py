"""A plain FastAPI handler: sync, so in the thread pool; one session that all threads share.

An engine call has one thread, for as many of them run at once as there are cores: in one process
with a thread for each core or, if SERVING_WORKERS is set, in a process for each core.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import anyio.to_thread
import uvicorn
from fastapi import Depends, FastAPI, Request, Response

from benchmarks.servers.model import HOST, JSON, Model, read_cores, read_port

WORKERS = read_cores() if "SERVING_WORKERS" in os.environ else 1


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Builds the engine. The pool's 40 threads would take turns on the cores, so it has fewer."""
    app.state.model = Model(threads=1)
    anyio.to_thread.current_default_thread_limiter().total_tokens = read_cores() // WORKERS
    yield


app = FastAPI(lifespan=lifespan)


async def read_body(request: Request) -> bytes:
    """The image's file."""
    return await request.body()


@app.post("/segment")
def segment(request: Request, body: Annotated[bytes, Depends(read_body)]) -> Response:
    """Segments one image."""
    model: Model = request.app.state.model
    image = model.decode(body)
    (candidates,) = model.infer([image])
    return Response(model.encode(image, candidates), media_type=JSON)


if __name__ == "__main__":
    name = "benchmarks.servers.fastapi_server:app"
    uvicorn.run(name, host=HOST, port=read_port(), workers=WORKERS, log_level="warning")
