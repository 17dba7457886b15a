"""BentoML: a worker process for each core with one thread, so an image at a time in each.

Without its adaptive batching, which takes lists: one image for each request then needs a second
service in front, and the hop between them costs more than a batch saves on a CPU
(docs/benchmarks.md).
"""

from __future__ import annotations

from typing import Annotated

import bentoml
from bentoml.validators import ContentType

from benchmarks.servers.model import JSON, Model, read_cores


@bentoml.service(workers=read_cores(), threads=1, logging={"access": {"enabled": False}})
class Segmenter:
    """A worker."""

    def __init__(self) -> None:
        """Builds the worker's engine."""
        self.model = Model(threads=1)

    @bentoml.api(route="/segment")
    def segment(self, image: bytes, /) -> Annotated[bytes, ContentType(JSON)]:
        """Segments one image."""
        decoded = self.model.decode(image)
        (candidates,) = self.model.infer([decoded])
        return self.model.encode(decoded, candidates)
