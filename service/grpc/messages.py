"""The messages of the Open Inference Protocol and of gRPC's health service.

Their descriptors are built from a table when the module is imported, in a pool of their own: there
is no generated code, which would be tied to a version of protobuf and could not be loaded beside a
client's. Of Triton's ModelConfig and ModelStatistics only the fields that are filled are here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PROTOCOL, HEALTH = "inference", "grpc.health.v1"
"""Packages."""
_PARAMETER = ("bool bool_param 1", "int64 int64_param 2", "string string_param 3")
_TENSOR = (
    *("string name 1", "string datatype 2", "repeated int64 shape 3"),
    "map InferParameter parameters 4",
)
_MODEL = ("string name 1", "string version 2")
_TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    PROTOCOL: {
        "Empty": (),
        "ServerLiveResponse": ("bool live 1",),
        "ServerReadyResponse": ("bool ready 1",),
        "ModelReadyRequest": _MODEL,
        "ModelReadyResponse": ("bool ready 1",),
        "ServerMetadataResponse": (*_MODEL, "repeated string extensions 3"),
        "ModelMetadataRequest": _MODEL,
        "TensorMetadata": _TENSOR[:3],
        "ModelMetadataResponse": (
            *("string name 1", "repeated string versions 2", "string platform 3"),
            *("repeated TensorMetadata inputs 4", "repeated TensorMetadata outputs 5"),
        ),
        "InferParameter": (
            *(f"oneof {field}" for field in _PARAMETER),
            *("oneof double double_param 4", "oneof uint64 uint64_param 5"),
        ),
        "InferInputTensor": _TENSOR,
        "InferRequestedOutputTensor": ("string name 1", "map InferParameter parameters 2"),
        "ModelInferRequest": (
            *("string model_name 1", "string model_version 2", "string id 3"),
            *("map InferParameter parameters 4", "repeated InferInputTensor inputs 5"),
            "repeated InferRequestedOutputTensor outputs 6",
        ),
        "InferOutputTensor": _TENSOR,
        "ModelInferResponse": (
            *("string model_name 1", "string model_version 2", "string id 3"),
            *("map InferParameter parameters 4", "repeated InferOutputTensor outputs 5"),
            "repeated bytes raw_output_contents 6",
        ),
        "ModelStreamInferResponse": (
            *("string error_message 1", "ModelInferResponse infer_response 2"),
        ),
        "ModelConfigRequest": _MODEL,
        "ModelInput": ("string name 1", "int32 data_type 2", "repeated int64 dims 4"),
        "ModelOutput": ("string name 1", "int32 data_type 2", "repeated int64 dims 3"),
        "Specific": ("repeated int64 versions 1",),
        "ModelVersionPolicy": ("Specific specific 3",),
        "ModelConfig": (
            *("string name 1", "string platform 2", "string backend 17", "int32 max_batch_size 4"),
            *("ModelVersionPolicy version_policy 3", "repeated ModelInput input 5"),
            "repeated ModelOutput output 6",
        ),
        "ModelConfigResponse": ("ModelConfig config 1",),
        "ModelStatisticsRequest": _MODEL,
        "StatisticDuration": ("uint64 count 1", "uint64 ns 2"),
        "InferStatistics": (
            *("StatisticDuration success 1", "StatisticDuration fail 2"),
            *("StatisticDuration queue 3", "StatisticDuration compute_input 4"),
            *("StatisticDuration compute_infer 5", "StatisticDuration compute_output 6"),
            *("StatisticDuration cache_hit 7", "StatisticDuration cache_miss 8"),
        ),
        "ModelStatistics": (
            *(*_MODEL, "uint64 last_inference 3", "uint64 inference_count 4"),
            *("uint64 execution_count 5", "InferStatistics inference_stats 6"),
        ),
        "ModelStatisticsResponse": ("repeated ModelStatistics model_stats 1",),
        "ModelRepositoryParameter": (
            *(f"oneof {field}" for field in _PARAMETER),
            "oneof bytes bytes_param 4",
        ),
        "RepositoryIndexRequest": ("string repository_name 1", "bool ready 2"),
        "ModelIndex": (*_MODEL, "string state 3", "string reason 4"),
        "RepositoryIndexResponse": ("repeated ModelIndex models 1",),
        "RepositoryModelRequest": (
            *("string repository_name 1", "string model_name 2"),
            "map ModelRepositoryParameter parameters 3",
        ),
    },
    HEALTH: {
        "HealthCheckRequest": ("string service 1",),
        "HealthCheckResponse": ("int32 status 1",),  # an enum is written as an int32
    },
}
"""`[repeated|map|oneof] TYPE NAME NUMBER` for each field; the keys of a map are strings."""
_FIELD = descriptor_pb2.FieldDescriptorProto


def _describe(package: str) -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name=f"solo_serve/{package}.proto", package=package, syntax="proto3"
    )
    for name, fields in _TABLE[package].items():
        message = file.message_type.add(name=name)
        for field in fields:
            *rule, kind, label, number = field.split()
            _add_field(package, message, rule, kind, label, int(number))
    return file


def _add_field(
    package: str, message: Any, rule: list[str], kind: str, name: str, number: int
) -> None:
    field = message.field.add(name=name, number=number, label=_FIELD.LABEL_OPTIONAL)
    if "map" in rule:
        entry = message.nested_type.add(name=f"{name.title()}Entry")
        entry.options.map_entry = True
        _add_field(package, entry, [], "string", "key", 1)
        _add_field(package, entry, [], kind, "value", 2)
        kind = f"{message.name}.{entry.name}"
    if rule and rule[0] in ("map", "repeated"):
        field.label = _FIELD.LABEL_REPEATED
    elif rule:
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    if kind[0].isupper():
        field.type, field.type_name = _FIELD.TYPE_MESSAGE, f".{package}.{kind}"
    else:
        field.type = _FIELD.Type.Value(f"TYPE_{kind.upper()}")


def _build() -> Iterator[tuple[str, Any]]:
    pool = descriptor_pool.DescriptorPool()
    for package, messages in _TABLE.items():
        pool.Add(_describe(package))
        for name in messages:
            descriptor = pool.FindMessageTypeByName(f"{package}.{name}")
            yield name, message_factory.GetMessageClass(descriptor)


MESSAGES: dict[str, Any] = dict(_build())
"""Message classes by name."""


def read_parameters(parameters: Any) -> dict[str, object]:
    """A map of `InferParameter` or `ModelRepositoryParameter` as plain values."""
    found = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        found[name] = None if choice is None else getattr(parameter, choice)
    return found
