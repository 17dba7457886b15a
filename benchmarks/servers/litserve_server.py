"""LitServe: a worker process for each core, batches, the fast queue."""

# No postponed annotations: LitServe reads the request's type from the signature.
from collections.abc import Sequence
from typing import Annotated

import litserve as ls
from fastapi import Body, Response

from benchmarks.servers.model import HOST, JSON, MAX_BATCH, Model, read_cores, read_port
from pipeline.postprocess import TileCandidates
from service.work.steps import DecodedImage

Inferred = tuple[DecodedImage, Sequence[TileCandidates]]


class SegmentApi(ls.LitAPI):
    """The hooks in the order of their calls; each batch is one worker's."""

    def setup(self, device: str) -> None:
        """Builds the worker's engine."""
        self.model = Model(threads=1)

    def decode_request(self, request: Annotated[bytes, Body()]) -> DecodedImage:
        """The image's file to canvases."""
        return self.model.decode(request)

    def batch(self, inputs: list[DecodedImage]) -> list[DecodedImage]:
        """Nothing to stack: an image may have several canvases."""
        return inputs

    def predict(self, x: list[DecodedImage]) -> list[Inferred]:
        """Runs the engine."""
        return list(zip(x, self.model.infer(x), strict=True))

    def unbatch(self, output: list[Inferred]) -> list[Inferred]:
        """One entry is one image's already."""
        return output

    def encode_response(self, output: Inferred) -> Response:
        """Finished JSON, so that nothing is encoded twice."""
        return Response(self.model.encode(*output), media_type=JSON)


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
