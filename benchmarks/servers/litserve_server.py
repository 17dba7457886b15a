"""LitServe: a worker process for each core, batches, the fast queue."""

# No postponed annotations: LitServe reads the request's type from the signature.
from collections.abc import Sequence
from typing import Annotated

import litserve as ls
from fastapi import Body, Response

from benchmarks.ours import DecodedImage
from benchmarks.servers.common import HOST, JSON, MAX_BATCH, load_engine, read_cores, read_port
from pipeline.postprocess import TileCandidates

Inferred = tuple[DecodedImage, Sequence[TileCandidates]]


class SegmentApi(ls.LitAPI):
    """LitServe's hooks in the order of their calls; one worker runs all of them on a batch."""

    def setup(self, device: str) -> None:
        """Loads the worker's engine."""
        self.engine = load_engine()

    def decode_request(self, request: Annotated[bytes, Body()]) -> DecodedImage:
        """The image's file to canvases."""
        return self.engine.decode(request)

    def batch(self, inputs: list[DecodedImage]) -> list[DecodedImage]:
        """The images as they are: each may have several canvases."""
        return inputs

    def predict(self, x: list[DecodedImage]) -> list[Inferred]:
        """Runs the engine."""
        return list(zip(x, self.engine.infer(x), strict=True))

    def unbatch(self, output: list[Inferred]) -> list[Inferred]:
        """One entry for each image, as `predict` returns them."""
        return output

    def encode_response(self, output: Inferred) -> Response:
        """The finished JSON, which is not encoded again."""
        return Response(self.engine.encode(*output), media_type=JSON)


if __name__ == "__main__":
    api = SegmentApi(api_path="/segment", max_batch_size=MAX_BATCH, batch_timeout=0.005)
    server = ls.LitServer(
        api, accelerator="cpu", devices=1, workers_per_device=read_cores(), fast_queue=True
    )
    server.run(
        host=HOST,
        port=read_port(),
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )
