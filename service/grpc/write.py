"""The answer of an infer request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from service.grpc.messages import MESSAGES
from service.grpc.read import RpcCall
from service.http.oip.schemas import OUTPUTS
from service.http.oip.write import build_tensors, find_shape, to_bytes
from service.protocol import ModelState
from service.work.request import Outcome

_FINAL = "triton_final_response"


def build_response(model: ModelState, call: RpcCall, outcomes: Sequence[Outcome]) -> Any:
    """A ModelInferResponse; its tensors are raw."""
    response = MESSAGES["ModelInferResponse"](
        model_name=model.name, model_version=str(model.version), id=call.call.request_id or ""
    )
    if call.marks_final:
        response.parameters[_FINAL].bool_param = True
    # An image's answer is written once for all protocols, so all say the same of it.
    tensors = build_tensors([orjson.loads(outcome.payload) for outcome in outcomes])
    for name in call.call.outputs:
        values = tensors[name]
        response.outputs.add(name=name, datatype=OUTPUTS[name].datatype, shape=find_shape(values))
        response.raw_output_contents.append(to_bytes(values))
    return response
