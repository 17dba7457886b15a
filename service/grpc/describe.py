"""The RPCs that tell of the server and its models, and those that change what is served."""

from __future__ import annotations

from typing import Any

from service.errors import Forbidden
from service.grpc.calls import Rpc
from service.grpc.messages import MESSAGES, read_parameters
from service.grpc.read import parse, read_version
from service.http.clients import check_admin
from service.http.oip.config import TRITON_TYPES, build_config
from service.http.oip.schemas import INPUT, OUTPUTS
from service.http.routes.inference import list_extensions
from service.http.routes.models import find_versions
from service.http.routes.repository import check_control, check_parameters, list_entries
from service.http.statistics import read_statistics
from service.protocol import ModelState

_NUMBERS = dict(TRITON_TYPES.values())


async def show_live(rpc: Rpc, message: bytes) -> Any:
    """Whether the process need not be replaced."""
    return MESSAGES["ServerLiveResponse"](live=rpc.state.segmenter.failure is None)


async def show_ready(rpc: Rpc, message: bytes) -> Any:
    """Whether new work is taken."""
    return MESSAGES["ServerReadyResponse"](ready=rpc.state.segmenter.is_ready)


async def show_model_ready(rpc: Rpc, message: bytes) -> Any:
    """Whether a model takes new work."""
    _find(rpc, parse("ModelReadyRequest", message))
    return MESSAGES["ModelReadyResponse"](ready=rpc.state.segmenter.is_ready)


async def show_server(rpc: Rpc, message: bytes) -> Any:
    """The server's name, version and what it knows of the protocol."""
    return MESSAGES["ServerMetadataResponse"](
        name="solo-serve", version=rpc.state.version, extensions=list_extensions(rpc.state.settings)
    )


async def show_model(rpc: Rpc, message: bytes) -> Any:
    """A model's versions and tensors."""
    model = _find(rpc, parse("ModelMetadataRequest", message))
    versions = find_versions(rpc.state.segmenter, model.name)
    response = MESSAGES["ModelMetadataResponse"](
        name=model.name, versions=map(str, versions), platform=model.engine.name
    )
    response.inputs.add(**INPUT.model_dump())
    for output in OUTPUTS.values():
        response.outputs.add(**output.model_dump())
    return response


async def show_config(rpc: Rpc, message: bytes) -> Any:
    """A model's configuration in Triton's words."""
    model = _find(rpc, parse("ModelConfigRequest", message))
    config = build_config(model, find_versions(rpc.state.segmenter, model.name)).model_dump()
    for tensor in (*config["input"], *config["output"]):
        tensor["data_type"] = _NUMBERS[tensor["data_type"]]
    return MESSAGES["ModelConfigResponse"](config=config)


async def show_statistics(rpc: Rpc, message: bytes) -> Any:
    """Images, engine calls and times of each version, of one model or of all."""
    request = parse("ModelStatisticsRequest", message)
    found = await read_statistics(
        rpc.state.segmenter, request.name or None, read_version(request.version)
    )
    return MESSAGES["ModelStatisticsResponse"](
        model_stats=[stats.model_dump(exclude={"batch_stats"}) for stats in found]
    )


async def show_index(rpc: Rpc, message: bytes) -> Any:
    """Every version that is served, and why other models, or newer versions, are not."""
    request = parse("RepositoryIndexRequest", message)
    _check_place(rpc)
    entries = list_entries(rpc.state.segmenter, only_ready=request.ready)
    return MESSAGES["RepositoryIndexResponse"](models=[entry.model_dump() for entry in entries])


async def load(rpc: Rpc, message: bytes) -> Any:
    """Serves what the model's config.json says now."""
    name = await _read_change(rpc, message)
    await rpc.state.segmenter.load(name)
    return MESSAGES["Empty"]()


async def unload(rpc: Rpc, message: bytes) -> Any:
    """Stops serving a model."""
    name = await _read_change(rpc, message)
    await rpc.state.segmenter.unload(name)
    return MESSAGES["Empty"]()


async def _read_change(rpc: Rpc, message: bytes) -> str:
    """The model that a request may change."""
    _check_place(rpc)
    check_control(rpc.state.settings)
    check_admin(await rpc.find_key())
    request = parse("RepositoryModelRequest", message)
    check_parameters(read_parameters(request.parameters))
    return str(request.model_name)


def _check_place(rpc: Rpc) -> None:
    port = rpc.state.settings.admin_port
    if port is not None:
        raise Forbidden("the model repository is served by the admin port alone, over HTTP")


def _find(rpc: Rpc, request: Any) -> ModelState:
    return rpc.state.segmenter.find(request.name or None, read_version(request.version))
