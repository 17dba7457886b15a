from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.cores import count_cores
from service.engines.base import BackendOptions
from service.errors import StartupError
from service.flags import build_parser, find_unknown_variables
from service.flags import read_settings as read_flags
from service.settings import Settings


def read_settings(arguments: list[str]) -> Settings:
    return read_flags(Settings, build_parser(), arguments)


def test_defaults_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read_settings([])
    assert settings.port == 8000
    assert settings.model_repo == Path("model_repo")
    assert settings.threads >= 1
    assert settings.pool_threads >= 1


def test_variables_set_and_flags_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLO_PORT", "9000")
    monkeypatch.setenv("SOLO_MAX_BATCH", "4")
    monkeypatch.setenv("SOLO_DEVICE", "CPU")
    monkeypatch.setenv("SOLO_DEFAULT_MODEL", "")
    settings = read_settings(["--port", "9001"])
    assert (settings.port, settings.max_batch, settings.device) == (9001, 4, "cpu")
    assert settings.default_model is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SOLO_PORT", "70000"),
        ("SOLO_PORT", "http"),
        ("SOLO_DEVICE", "tpu"),
        ("SOLO_THREADS", "0"),
        ("SOLO_MAX_BATCH", "-1"),
        ("SOLO_MAX_DELAY_MS", "nan"),
        ("SOLO_MAX_BODY_BYTES", "64MB"),
        ("SOLO_LOG_LEVEL", "loud"),
        ("SOLO_ENGINE", "opencl"),
        ("SOLO_PRECISION", "fp8"),
        ("SOLO_ENGINE_SLOTS", "0"),
        ("SOLO_GPU_MEM_LIMIT_BYTES", "4GB"),
        ("SOLO_ADMIN_PORT", "70000"),
        ("SOLO_OTLP_ENDPOINT", "localhost:4318"),
        ("SOLO_TRUSTED_PROXIES", "10.0.0.1,caddy"),
        ("SOLO_TRUSTED_PROXIES", "10.0.0.1/8"),
    ],
)
def test_a_wrong_variable_is_named_with_its_value(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(StartupError, match=f"{variable}: .*{value}"):
        read_settings([])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model-control", "true"], "model_control would change one worker"),
        (["--keys-file", "keys.json"], "keys_file needs workers 1"),
        (["--max-queue-canvases", "3"], "2 workers cannot share max_queue_canvases 3"),
        (["--max-connections", "1"], "max_connections 1"),
    ],
)
def test_what_workers_cannot_share_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        read_settings([*flags, "--workers", "2"])


def test_a_wrong_flag_is_named_as_a_flag() -> None:
    with pytest.raises(StartupError, match=r"--max-batch: .*not 'many'"):
        read_settings(["--max-batch", "many"])


def test_what_engines_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = BackendOptions(
        precision_fallback=True, free_precision=True, threads=count_cores(), divide="tiles"
    )
    assert read_settings([]).backend_options() == defaults
    fixed = replace(defaults, free_precision=False)
    assert read_settings(["--precision", "FP32"]).backend_options() == fixed
    assert read_settings(["--workers", "2"]).backend_options() == replace(defaults, divide="all")
    for name, value in {
        "ENGINE": "TRT",
        "PRECISION": "BF16",
        "ENGINE_SLOTS": "3",
        "ENGINE_CACHE": "/var/engines",
        "GPU_MEM_LIMIT_BYTES": "4000000000",
    }.items():
        monkeypatch.setenv(f"SOLO_{name}", value)
    assert read_settings(["--device", "cuda", "--threads", "2"]).backend_options() == (
        BackendOptions(
            device="cuda",
            engine="trt",
            precision="bf16",
            precision_fallback=True,
            threads=2,
            slots=3,
            divide="tiles",
            cache=Path("/var/engines"),
            gpu_mem_limit_bytes=4_000_000_000,
        )
    )


def test_devices_are_the_ordinals_of_a_process_that_sees_only_them() -> None:
    settings = read_settings(["--devices", "3,GPU-8932f937"])
    assert settings.device_names == ("3", "GPU-8932f937")
    assert settings.backend_options().gpus == (0, 1)
    assert settings.with_devices(("GPU-8932f937",)).backend_options().gpus == (0,)
    assert read_settings([]).device_names == ()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices", "0,cuda:1"], r"devices.*'cuda:1' is no device"),
        (["--devices", "MIG-aaaa,MIG-bbbb"], "one MIG slice"),
        (["--devices", ""], "'' is no device"),
    ],
)
def test_devices_that_cannot_be_used_stop_the_start(flags: list[str], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        read_settings(flags)
    assert read_settings(["--devices", "MIG-aaaa,MIG-bbbb", "--workers", "2"]).workers == 2


def test_an_unknown_flag_stops_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read_settings(["--max-bach", "3"])
    assert caught.value.code == 2
    assert "--max-bach" in capsys.readouterr().err


def test_a_queue_that_cannot_hold_the_largest_image_is_refused() -> None:
    message = "max_queue_canvases 101 is below twice max_image_canvases 51"
    with pytest.raises(StartupError, match=message):
        read_settings(["--max-queue-canvases", "101", "--max-image-canvases", "51"])
    with pytest.raises(StartupError, match="max_queue_canvases 1 is below twice"):
        read_settings(["--max-queue-canvases", "1"])


def test_a_smaller_queue_bounds_the_largest_image() -> None:
    """Half of it, which is what a client alone may have in flight."""
    settings = read_settings(["--max-queue-canvases", "101"])
    assert (settings.max_queue_canvases, settings.max_image_canvases) == (101, 50)
    settings = read_settings(["--max-queue-canvases", "100", "--max-image-canvases", "50"])
    assert (settings.max_queue_canvases, settings.max_image_canvases) == (100, 50)


def test_the_defaults_of_the_bounds() -> None:
    settings = read_settings([])
    assert (settings.max_image_canvases, settings.max_queue_canvases) == (4096, 32_768)
    assert settings.max_decoded_pixels == 200_000_000
    assert settings.request_timeout_ms == 600_000


def test_tls_needs_certificate_key_and_port(tmp_path: Path) -> None:
    both = {"grpc_tls_cert": tmp_path / "a", "grpc_tls_key": tmp_path / "b"}
    assert Settings.model_validate({**both, "grpc_port": 1}).grpc_tls_key == tmp_path / "b"
    for values in (both, *({name: path, "grpc_port": 1} for name, path in both.items())):
        with pytest.raises(ValidationError, match="need each other, and grpc_port"):
            Settings.model_validate(values)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_bach"):
        Settings(max_bach=3)  # type: ignore[call-arg]


def test_a_misspelt_variable_is_noticed() -> None:
    found = find_unknown_variables({"SOLO_MAX_BACH": "3", "SOLO_PORT": "1", "PATH": "x"})
    assert found == ["SOLO_MAX_BACH is not a setting and is ignored; did you mean SOLO_MAX_BATCH?"]


def test_every_setting_has_a_flag_with_a_help_text() -> None:
    text = build_parser().format_help()
    for name, setting in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert setting.description, name
    assert "(SOLO_CORS_ORIGINS)" in " ".join(text.split())  # an empty default is not shown


def test_the_bundled_models_serve_where_there_is_no_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("service.settings.BUNDLED", tmp_path / "bundled")
    assert Settings().model_repo == Path("model_repo")  # a source tree bundles nothing
    (tmp_path / "bundled").mkdir()
    assert Settings().model_repo == tmp_path / "bundled"
    (tmp_path / "model_repo").mkdir()
    assert Settings().model_repo == Path("model_repo")
