"""BentoML: a worker process for each core, each with one thread, which serves one image at a time.

Without its adaptive batching: that takes lists, so one image per request would need a second
service in front, and the hop between them costs more than a batch saves on a CPU
(docs/benchmarks.md).
"""

from __future__ import annotations

from typing import Annotated

import bentoml
from bentoml.validators import ContentType

from benchmarks.servers.common import JSON, load_engine, read_cores


@bentoml.service(workers=read_cores(), threads=1, logging={"access": {"enabled": False}})
class BentoSegmenter:
    """A worker process."""

    def __init__(self) -> None:
        self.engine = load_engine()

    @bentoml.api(route="/segment")
    def segment(self, image: bytes, /) -> Annotated[bytes, ContentType(JSON)]:
        """Segments one image."""
        decoded = self.engine.decode(image)
        (candidates,) = self.engine.infer([decoded])
        return self.engine.encode(decoded, candidates)
