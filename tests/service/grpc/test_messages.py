"""Our messages are those of Triton's clients on the wire."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from tritonclient.grpc import model_config_pb2, service_pb2

from service.grpc.messages import HEALTH, MESSAGES, read_parameters

# Where one of ours stands for several of theirs, or a nested one of theirs is not nested here.
THEIRS = {
    "Empty": "ServerLiveRequest",
    "RepositoryModelRequest": "RepositoryModelLoadRequest",
    "TensorMetadata": "ModelMetadataResponse.TensorMetadata",
    "InferInputTensor": "ModelInferRequest.InferInputTensor",
    "InferRequestedOutputTensor": "ModelInferRequest.InferRequestedOutputTensor",
    "InferOutputTensor": "ModelInferResponse.InferOutputTensor",
    "ModelIndex": "RepositoryIndexResponse.ModelIndex",
    "Specific": "ModelVersionPolicy.Specific",
}
OURS = [name for name, kind in MESSAGES.items() if kind.DESCRIPTOR.file.package != HEALTH]
_ENUM, _INT32 = FieldDescriptor.TYPE_ENUM, FieldDescriptor.TYPE_INT32


def find_theirs(name: str) -> Any:
    first, *rest = THEIRS.get(name, name).split(".")
    tops = service_pb2.DESCRIPTOR.message_types_by_name
    found = tops.get(first) or model_config_pb2.DESCRIPTOR.message_types_by_name[first]
    for part in rest:
        found = found.nested_types_by_name[part]
    return found


@pytest.mark.parametrize("name", OURS)
def test_every_field_is_that_of_tritons_protocol(name: str) -> None:
    theirs = find_theirs(name).fields_by_name
    for field in MESSAGES[name].DESCRIPTOR.fields:
        other = theirs[field.name]
        kind = _INT32 if other.type == _ENUM else other.type
        assert (field.number, field.type, field.is_repeated) == (
            other.number,
            kind,
            other.is_repeated,
        ), field.name
        choice = other.containing_oneof
        is_choice = choice is not None and choice.name == "parameter_choice"
        assert (field.containing_oneof is not None) == is_choice


def test_only_fields_that_are_not_needed_are_missing() -> None:
    partial = {"ModelConfig", "ModelInput", "ModelOutput", "ModelVersionPolicy", "ModelStatistics"}
    for name in set(OURS) - partial:
        missing = set(find_theirs(name).fields_by_name) - set(
            MESSAGES[name].DESCRIPTOR.fields_by_name
        )
        # Tensors are taken out of a request before it is parsed.
        assert missing <= {"contents", "raw_input_contents"}, name


def test_parameters_are_plain_values() -> None:
    request = service_pb2.ModelInferRequest()
    request.parameters["a"].bool_param = False
    request.parameters["b"].int64_param = -3
    request.parameters["c"].string_param = "x"
    request.parameters["d"].double_param = 0.5
    request.parameters["e"].uint64_param = 2**63
    request.parameters["f"].SetInParent()
    ours = MESSAGES["ModelInferRequest"].FromString(request.SerializeToString())
    assert read_parameters(ours.parameters) == {
        "a": False,
        "b": -3,
        "c": "x",
        "d": 0.5,
        "e": 2**63,
        "f": None,
    }
