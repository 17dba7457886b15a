"""Settings: SOLO_* variables, or the flags of `solo-serve`; a wrong value stops the start."""

from __future__ import annotations

import sys
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.cores import count_cores
from service.engines.base import BackendOptions, EngineKind, Precision
from service.engines.visible import check_shares, parse_devices

MIB = 1024 * 1024
Device = Literal["auto", "cpu", "cuda"]
BUNDLED = Path(__file__).with_name("bundled_models")
"""In a wheel; see pyproject.toml."""
PositiveInt = Annotated[int, Field(gt=0)]


def find_model_repo() -> Path:
    """./model_repo, or the bundled models where only they exist."""
    here = Path("model_repo")
    return BUNDLED if BUNDLED.is_dir() and not here.exists() else here


class Settings(BaseSettings):
    """All settings; `SOLO_MAX_BATCH=4` sets `max_batch`. The help texts are also the flags'."""

    model_config = SettingsConfigDict(
        env_prefix="SOLO_", frozen=True, extra="forbid", env_ignore_empty=True
    )

    host: Annotated[str, Field(min_length=1, description="address to listen on")] = "127.0.0.1"
    port: Annotated[
        int, Field(ge=0, le=65535, description="port to listen on; 0 takes a free one")
    ] = 8000
    workers: Annotated[
        PositiveInt,
        Field(
            description="worker processes, each with its own engines, that share the port, the "
            "limits of work in flight, and /metrics"
        ),
    ] = 1
    trusted_proxies: Annotated[
        str,
        Field(
            description="addresses and networks, comma-separated, whose X-Forwarded-For names the "
            "client; * trusts all"
        ),
    ] = "127.0.0.1"
    worker_timeout_s: Annotated[
        float,
        Field(ge=2, description="longest silence of a worker, s; then it is killed and replaced"),
    ] = 10.0
    admin_port: Annotated[
        int | None,
        Field(
            ge=0,
            le=65535,
            description="port of /metrics and /v2/repository, which the other port then lacks; "
            "0 takes a free one (default: the other port has them)",
        ),
    ] = None
    admin_host: Annotated[
        str, Field(min_length=1, description="address to listen on for the admin port")
    ] = "127.0.0.1"
    grpc_port: Annotated[
        int | None,
        Field(
            ge=0,
            le=65535,
            description="port of the Open Inference Protocol over gRPC, on the same host; 0 takes "
            "a free one; needs the extra grpc (default: none)",
        ),
    ] = None
    grpc_tls_cert: Annotated[
        Path | None,
        Field(
            description="PEM file with the certificate of the gRPC port and those that lead to its "
            "authority; read again after a change (default: no TLS)"
        ),
    ] = None
    grpc_tls_key: Annotated[
        Path | None, Field(description="PEM file with its key, without a password")
    ] = None
    model_repo: Annotated[
        Path,
        Field(
            description="folder with <model>/config.json (default: ./model_repo, or, where there "
            "is none, the bundled model of an installed package)"
        ),
    ] = Field(default_factory=find_model_repo)
    model_control: Annotated[
        bool,
        Field(description="POST /v2/repository/models/{name}/load and unload may change models"),
    ] = False
    model_poll_s: Annotated[
        float,
        Field(
            ge=0,
            description="time between checks of the model repository, s; 0: no checks",
        ),
    ] = 0.0
    default_model: Annotated[
        str | None,
        Field(
            description="model of requests that name none (default: what `solo-models default` "
            "set, else the only one)"
        ),
    ] = None
    device: Annotated[
        Device, Field(description="auto takes CUDA where it works; cuda refuses to start without")
    ] = "auto"
    devices: Annotated[
        str | None,
        Field(
            description="GPUs: all, ordinals or UUIDs, comma-separated; with workers each gets a "
            "share, and MIG slices need a worker each (default: the first)"
        ),
    ] = None
    engine: Annotated[
        EngineKind,
        Field(
            description="auto takes the fastest that works; ort, openvino, trt, aoti: only that one"
        ),
    ] = "auto"
    precision: Annotated[
        Literal["auto", Precision],
        Field(
            description="fp32, fp16, bf16 or int8; a model may name its own, and one that lacks it "
            "is served in fp32. auto: fp32 on a GPU; on the CPU the fastest that costs no more "
            "than 0.002 AP"
        ),
    ] = "auto"
    engine_slots: Annotated[
        PositiveInt | None,
        Field(
            description="batches that an engine runs at once (default: 2 on a GPU; 1 on the CPU, "
            "or one per thread for models with tiles and with several workers)"
        ),
    ] = None
    engine_cache: Annotated[
        Path | None,
        Field(
            description="folder for what is built and timed here (default: the user's cache "
            "folder; for TensorRT the model's)"
        ),
    ] = None
    gpu_mem_limit_bytes: Annotated[
        PositiveInt | None,
        Field(description="most GPU memory of ONNX Runtime for each slot, bytes (default: all)"),
    ] = None
    threads: Annotated[
        PositiveInt,
        Field(
            description="threads of an engine on the CPU (default: physical cores; with workers "
            "twice their share)"
        ),
    ] = Field(default_factory=count_cores)
    pool_threads: Annotated[
        PositiveInt,
        Field(
            description="threads that decode, post-process and encode (default: physical "
            "cores, divided by the workers)"
        ),
    ] = Field(default_factory=count_cores)
    max_batch: Annotated[
        PositiveInt,
        Field(
            description="canvases in one engine call; a model's limit also holds, and without a "
            "delay 1 on the CPU"
        ),
    ] = 8
    engine_timeout_s: Annotated[
        float,
        Field(gt=0, description="longest engine call, s; then the engine is replaced"),
    ] = 120.0
    max_rebuilds: Annotated[
        PositiveInt,
        Field(
            description="failed attempts in a row to replace an engine; then the process ends with "
            "status 70, to be replaced itself"
        ),
    ] = 5
    max_delay_ms: Annotated[
        float | None,
        Field(
            ge=0,
            le=10_000,
            description="how long a canvas waits for others of its shape to share an engine call, "
            "ms (default: 5 on a GPU; 0 on the CPU, where batches gain nothing)",
        ),
    ] = None
    max_body_bytes: Annotated[
        PositiveInt, Field(description="largest request body, bytes; counted before parsing")
    ] = 64 * MIB
    max_bodies_bytes: Annotated[
        PositiveInt,
        Field(
            description="bytes of request bodies in memory; beyond it the largest one that is "
            "still arriving is answered 503. Raised to max_body_bytes if not set"
        ),
    ] = 512 * MIB
    max_image_pixels: Annotated[
        PositiveInt, Field(description="largest image, pixels; read from its header")
    ] = 50_000_000
    scaled_decode: Annotated[
        bool,
        Field(
            description="decode a JPEG at k/8 of its size where the model shrinks it that far: "
            "faster, but not the published pipeline to the pixel"
        ),
    ] = False
    max_image_canvases: Annotated[
        PositiveInt,
        Field(description="canvases (tiles) of one image; one that needs more is answered 413"),
    ] = 4096
    max_queue_canvases: Annotated[
        PositiveInt,
        Field(
            description="canvases in flight; more are answered 503. One client may hold at most as "
            "many as are free, so half of them while no other client has any"
        ),
    ] = 32_768
    max_decoded_pixels: Annotated[
        PositiveInt,
        Field(description="pixels of decoded images in memory; further images wait encoded"),
    ] = 200_000_000
    max_connections: Annotated[
        PositiveInt,
        Field(description="connections served at once; more are answered 503 unread"),
    ] = 1000
    head_timeout_s: Annotated[
        float, Field(gt=0, description="longest time for a request's headers, s; then 408")
    ] = 30.0
    body_timeout_s: Annotated[
        float,
        Field(gt=0, description="period in which a body must arrive at min_rate, s; then 408"),
    ] = 30.0
    body_total_s: Annotated[
        float, Field(gt=0, description="longest time for a request's body, s; then 408")
    ] = 600.0
    write_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            description="period in which a client must take its response at min_rate, s; then the "
            "connection is closed",
        ),
    ] = 30.0
    min_rate: Annotated[
        float, Field(ge=0, description="least rate of bodies and of responses, bytes/s")
    ] = 1024.0
    keep_alive_s: Annotated[
        float,
        Field(
            gt=0,
            description="how long a connection may wait for its next request, s; must exceed the "
            "proxy's own idle time",
        ),
    ] = 75.0
    request_timeout_ms: Annotated[
        PositiveInt, Field(description="deadline of requests that give none, ms; then 504")
    ] = 600_000
    keys_file: Annotated[
        Path | None,
        Field(description="API keys, see python -m service.http.keys --help (default: none)"),
    ] = None
    retry_after_s: Annotated[PositiveInt, Field(description="Retry-After of a 503, s")] = 1
    drain_timeout_s: Annotated[
        float, Field(ge=0, description="how long accepted work may take after SIGTERM, s")
    ] = 30.0
    jobs_dir: Annotated[
        Path | None,
        Field(
            description="folder for jobs (POST /v2/jobs), which outlast the process; all workers "
            "share it (default: no jobs)"
        ),
    ] = None
    jobs_roots: Annotated[
        str,
        Field(
            description="folders, and URIs such as s3://bucket/prefix, whose files jobs may name, "
            "comma-separated (default: none, only uploads)"
        ),
    ] = ""
    jobs_max_files: Annotated[PositiveInt, Field(description="files of one job")] = 100_000
    jobs_max_bytes: Annotated[
        PositiveInt,
        Field(
            description="uploads and results of all jobs, bytes; beyond it jobs that are done are "
            "deleted, and if none can be, new ones are answered 507"
        ),
    ] = 10 * 1024 * MIB
    jobs_keep_s: Annotated[
        float, Field(gt=0, description="how long a job is kept after it is done, s")
    ] = 604_800.0
    jobs_in_flight: Annotated[
        PositiveInt | None,
        Field(
            description="images of jobs that a process works on at once (default: one more than "
            "pool_threads)"
        ),
    ] = None
    jobs_webhook_hosts: Annotated[
        str,
        Field(
            description="hosts that webhooks may go to, comma-separated, such as *.example.com "
            "(default: none)"
        ),
    ] = ""
    jobs_webhook_secret: Annotated[
        SecretStr,
        Field(
            description="key that signs webhooks: whsec_ and base64 of 24 bytes or more "
            "(default: no webhooks)"
        ),
    ] = SecretStr("")
    jobs_webhook_private: Annotated[
        bool, Field(description="webhooks may go to addresses that are not public")
    ] = False
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Field(description="least level that is logged"),
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"], Field(description="json: one object a line, for log collectors")
    ] = "text"
    otlp_endpoint: Annotated[
        str | None,
        Field(
            pattern=r"^https?://\S+$",
            description="OpenTelemetry collector that gets traces, e.g. http://localhost:4318 "
            "(default: that of OTEL_EXPORTER_OTLP_ENDPOINT, else no traces)",
        ),
    ] = None
    cors_origins: Annotated[
        str,
        Field(
            description="origins allowed to send requests from browsers (CORS), comma-separated, "
            "or * (default: none)"
        ),
    ] = ""

    @field_validator("log_level", "log_format", "device", "engine", "precision", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @property
    def models_may_change(self) -> bool:
        """Whether the served models may change while the server runs."""
        return self.model_control or self.model_poll_s > 0

    def backend_options(self) -> BackendOptions:
        """What the settings say of the engines."""
        return BackendOptions(
            device=self.device,
            engine=self.engine,
            precision="fp32" if self.precision == "auto" else self.precision,
            free_precision=self.precision == "auto",
            precision_fallback=True,
            threads=self.threads,
            slots=self.engine_slots,
            divide="tiles" if self.workers == 1 else "all",
            cache=self.engine_cache,
            gpu_mem_limit_bytes=self.gpu_mem_limit_bytes,
            gpus=tuple(range(len(self.device_names))) or (0,),
        )

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies_are_addresses(cls, proxies: str) -> str:
        if proxies.strip() != "*":
            for proxy in proxies.split(","):
                ip_network(proxy.strip())
        return proxies.strip()

    @field_validator("devices")
    @classmethod
    def _devices_are_named(cls, devices: str | None) -> str | None:
        if devices is not None:
            parse_devices(devices)
        return devices

    @property
    def device_names(self) -> tuple[str, ...]:
        """The parts of `devices`."""
        return parse_devices(self.devices) if self.devices is not None else ()

    def with_devices(self, names: tuple[str, ...]) -> Settings:
        """For a process that uses these devices, and shows them to CUDA itself."""
        return self.model_copy(update={"devices": ",".join(names)})

    @model_validator(mode="after")
    def _devices_can_be_shared(self) -> Settings:
        check_shares(self.device_names, self.workers)
        return self

    @model_validator(mode="after")
    def _queue_holds_an_image(self) -> Settings:
        share = self.max_queue_canvases // 2  # of one client
        if share < self.max_image_canvases:
            if share < 1 or "max_image_canvases" in self.model_fields_set:
                raise ValueError(
                    f"max_queue_canvases {self.max_queue_canvases} is below twice "
                    f"max_image_canvases {self.max_image_canvases}: a client may use half of the "
                    "queue, so the largest allowed image could not be admitted"
                )
            object.__setattr__(self, "max_image_canvases", share)
        return self

    @model_validator(mode="after")
    def _bodies_hold_a_body(self) -> Settings:
        if self.max_bodies_bytes < self.max_body_bytes:
            if "max_bodies_bytes" in self.model_fields_set:
                raise ValueError(
                    f"max_bodies_bytes {self.max_bodies_bytes} is below max_body_bytes "
                    f"{self.max_body_bytes}: the largest allowed body could not be received"
                )
            object.__setattr__(self, "max_bodies_bytes", self.max_body_bytes)
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Settings:
        files = self.grpc_tls_cert, self.grpc_tls_key
        if files != (None, None) and (None in files or self.grpc_port is None):
            raise ValueError("grpc_tls_cert and grpc_tls_key need each other, and grpc_port")
        return self

    @model_validator(mode="after")
    def _workers_are_independent(self) -> Settings:
        if self.workers == 1:
            return self
        if sys.platform == "win32":
            raise ValueError(f"workers {self.workers}: this system cannot hand over connections")
        if self.model_control:
            raise ValueError("model_control would change one worker; use model_poll_s")
        if self.keys_file is not None:
            raise ValueError("keys_file needs workers 1: each would count a key's share for itself")
        if min(self.max_queue_canvases // 2, self.max_connections) < self.workers:
            raise ValueError(
                f"{self.workers} workers cannot share max_queue_canvases {self.max_queue_canvases} "
                f"and max_connections {self.max_connections}"
            )
        return self
