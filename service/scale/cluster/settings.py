"""Settings of an application on Ray: those of the server, and how many of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from service.settings import PositiveInt, Settings

_ONE_SERVER_ONLY = {
    "admin_port": "Serve has one port",
    "devices": "Ray gives each worker its GPUs, see --num-gpus",
    "model_control": "it would change one worker; use --model-poll-s",
    "workers": "use --min-replicas",
    "worker_timeout_s": "Serve checks its replicas",
}
"""Settings that mean nothing here, and what to do instead."""


class ClusterSettings(Settings):
    """`SOLO_MAX_REPLICAS=4` sets `max_replicas`; every other setting goes to fronts and workers.

    `threads`, `pool_threads` and `device` follow from `num_cpus` and `num_gpus` unless they are
    set, `jobs_in_flight` from the number of workers.
    """

    ray_address: Annotated[
        str | None,
        Field(description="cluster to deploy to, e.g. auto (default: a new one, on this machine)"),
    ] = None
    app_name: Annotated[str, Field(min_length=1, description="name of the Serve application")] = (
        "solo-serve"
    )
    fronts: Annotated[
        PositiveInt, Field(description="processes that read requests; best one for each node")
    ] = 1
    min_replicas: Annotated[PositiveInt, Field(description="fewest workers")] = 1
    max_replicas: Annotated[
        PositiveInt | None,
        Field(description="most workers, scaled with the load (default: min_replicas)"),
    ] = None
    num_cpus: Annotated[
        float, Field(ge=0, description="logical CPUs that Ray reserves for a worker")
    ] = 1.0
    num_gpus: Annotated[
        float, Field(ge=0, description="GPUs of a worker; 0.5 puts two on one GPU")
    ] = 0.0
    max_requests: Annotated[
        PositiveInt,
        Field(description="requests in flight in one worker; others wait at the fronts"),
    ] = 32
    target_requests: Annotated[
        float,
        Field(gt=0, description="requests, in flight or waiting, per worker; the scaling target"),
    ] = 16.0
    upscale_delay_s: Annotated[
        float, Field(ge=0, description="time above the target before workers are added, s")
    ] = 10.0
    downscale_delay_s: Annotated[
        float, Field(ge=0, description="time below the target before workers are removed, s")
    ] = 300.0
    surge_percent: Annotated[
        int,
        Field(
            ge=0,
            le=100,
            description="extra workers during an upgrade, at least 1; 0 where there is no room",
        ),
    ] = 25

    @model_validator(mode="before")
    @classmethod
    def _follow_resources(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values

        def read(name: str) -> float:
            return float(values.get(name, cls.model_fields[name].default))

        try:
            cores, has_gpu = max(1, int(read("num_cpus"))), read("num_gpus") > 0
            has_most = values.get("max_replicas") is not None
            workers = read("max_replicas" if has_most else "min_replicas")
            jobs = max(1, math.ceil(workers * (cores + 1) / read("fronts")))
        except (TypeError, ValueError, ArithmeticError):
            return values  # the fields' own checks say what is wrong
        implied = {
            "threads": cores,
            "pool_threads": cores,
            "device": "cuda" if has_gpu else "cpu",
            "jobs_in_flight": jobs,
        }
        return {**implied, **values}

    @model_validator(mode="after")
    def _check(self) -> ClusterSettings:
        for name, instead in _ONE_SERVER_ONLY.items():
            if getattr(self, name) != Settings.model_fields[name].default:
                raise ValueError(f"{name} is not for a cluster: {instead}")
        if self.grpc_port == 0:
            raise ValueError("grpc_port 0: fronts share a port, so give its number")
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}"
            )
        return self

    def server_settings(self) -> dict[str, Any]:
        """What each process's `Settings` are made of; its current folder is another one."""
        settings = self.model_dump(include=set(Settings.model_fields))
        if self.num_gpus >= 2:  # of those that Ray shows to the worker
            settings["devices"] = ",".join(map(str, range(int(self.num_gpus))))
        return {
            name: value.absolute() if isinstance(value, Path) else value
            for name, value in settings.items()
        }
