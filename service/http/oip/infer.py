"""An infer request between its parsing and its answer, whichever way it came."""

from __future__ import annotations

from collections.abc import Sequence

from service.errors import describe_error
from service.http.oip.read import InferCall
from service.work.request import Outcome, RequestOptions


def build_options(call: InferCall) -> RequestOptions:
    """The options of a call."""
    parameters = call.parameters
    return RequestOptions(
        score_threshold=parameters.score_threshold,
        max_instances=parameters.max_instances,
        overlaps=parameters.overlaps,
        object_size_px=parameters.object_size_px,
        um_per_px=parameters.um_per_px,
        channel=parameters.channel,
        z=parameters.z,
        t=parameters.t,
        scale=parameters.scale,
        masks="rle" if "rle" in call.outputs else "none",
        priority="batch" if parameters.priority > 1 else "interactive",
    )


def find_failure(call: InferCall, outcomes: Sequence[Outcome]) -> tuple[int, dict[str, str]] | None:
    """HTTP status, code and message of the image that makes the whole request fail."""
    failed = [index for index, outcome in enumerate(outcomes) if outcome.error is not None]
    if not failed or (len(outcomes) > 1 and "error" in call.outputs):
        return None
    error = outcomes[failed[0]].error
    assert error is not None
    status, detail = describe_error(error)
    return status, {**detail, "message": f"image {failed[0]}: {detail['message']}"}
