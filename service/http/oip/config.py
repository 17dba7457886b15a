"""A model's configuration as Triton describes one: what its clients read of it."""

from __future__ import annotations

from pydantic import BaseModel

from service.http.oip.schemas import INPUT, OUTPUTS, TensorMetadata
from service.protocol import ModelState

TRITON_TYPES = {"UINT8": ("TYPE_UINT8", 2), "INT64": ("TYPE_INT64", 9)} | {
    "FP32": ("TYPE_FP32", 11),
    "BYTES": ("TYPE_STRING", 13),
}
"""Name and number of each type."""


class TritonTensor(BaseModel):
    """An input or output; -1 is a dimension of any size."""

    name: str
    data_type: str
    dims: list[int]


class ServedVersions(BaseModel):
    """The versions that are served."""

    versions: list[int]


class VersionPolicy(BaseModel):
    """Which versions are served."""

    specific: ServedVersions


class TritonConfig(BaseModel):
    """Answer of GET /v2/models/{name}/config.

    Attributes:
        max_batch_size: 0: the tensors' first dimension is not a batch; see `max_batch` of the
            model's metadata.
    """

    name: str
    platform: str
    backend: str
    version_policy: VersionPolicy
    max_batch_size: int = 0
    input: list[TritonTensor]
    output: list[TritonTensor]


def build_config(model: ModelState, versions: list[int]) -> TritonConfig:
    """The configuration of a model.

    Args:
        model: One of its versions.
        versions: All that are served.
    """
    return TritonConfig(
        name=model.name,
        platform=model.engine.name,
        backend=model.engine.name,
        version_policy=VersionPolicy(specific=ServedVersions(versions=sorted(versions))),
        input=[_describe(INPUT)],
        output=[_describe(tensor) for tensor in OUTPUTS.values()],
    )


def _describe(tensor: TensorMetadata) -> TritonTensor:
    return TritonTensor(
        name=tensor.name, data_type=TRITON_TYPES[tensor.datatype][0], dims=tensor.shape
    )
