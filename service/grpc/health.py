"""grpc.health.v1.Health: readiness, as GET /v2/health/ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from service.errors import NotFound, ServiceError
from service.grpc.calls import Rpc
from service.grpc.messages import HEALTH, MESSAGES, PROTOCOL
from service.grpc.read import parse

SERVICE = f"{HEALTH}.Health"
INFERENCE = f"{PROTOCOL}.GRPCInferenceService"
WATCH_S = 0.25
"""Time between two looks of `watch`."""
_SERVING, _NOT_SERVING, _SERVICE_UNKNOWN = 1, 2, 3


async def check(rpc: Rpc, message: bytes) -> Any:
    """Whether new work is taken: of the server (an empty name), a service, or a model."""
    status = _find_status(rpc, parse("HealthCheckRequest", message).service)
    if status == _SERVICE_UNKNOWN:
        raise NotFound("the server has no service, and no model, of this name")
    return MESSAGES["HealthCheckResponse"](status=status)


async def watch(rpc: Rpc, message: bytes) -> AsyncIterator[Any]:
    """As `check`, at once and whenever it changes."""
    service, shown = parse("HealthCheckRequest", message).service, None
    while True:
        status = _find_status(rpc, service)
        if status != shown:
            shown = status
            yield MESSAGES["HealthCheckResponse"](status=status)
        await asyncio.sleep(WATCH_S)


def _find_status(rpc: Rpc, service: str) -> int:
    segmenter = rpc.state.segmenter
    if service not in ("", SERVICE, INFERENCE):
        if service not in {model.name for model in segmenter.models}:
            return _SERVICE_UNKNOWN
        try:
            segmenter.find(service, None)
        except ServiceError:
            return _NOT_SERVING
    return _SERVING if segmenter.is_ready else _NOT_SERVING
