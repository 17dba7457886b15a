"""TLS on the port of gRPC, with the unmodified tritonclient.grpc."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from tests.support.blob_model import draw_picture, publish
from tests.support.certificates import CertificateFiles, write_certificate
from tests.support.server import CPU_FLAGS, ServerProcess, run_server

PIXELS = draw_picture(48, 64)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CertificateFiles:
    return write_certificate(tmp_path_factory.mktemp("tls"))


def build_flags(folder: Path, certificate: Path, key: Path) -> list[str]:
    publish(folder / "repo")
    flags = ["--model-repo", f"{folder / 'repo'}", *CPU_FLAGS, "--grpc-port", "0"]
    return [*flags, "--grpc-tls-cert", f"{certificate}", "--grpc-tls-key", f"{key}"]


def open_client(server: ServerProcess, trusted: Path | None) -> Any:
    found = re.search(r"gRPC on (\S+:\d+), with TLS", server.read_log())
    assert found, server.read_log()
    if trusted is None:
        return triton.InferenceServerClient(found[1])
    return triton.InferenceServerClient(found[1], ssl=True, root_certificates=f"{trusted}")


def infer(server: ServerProcess, trusted: Path | None) -> list[int]:
    with open_client(server, trusted) as client:
        tensor = triton.InferInput("image", list(PIXELS.shape), "UINT8")
        answer = client.infer("blobs", [tensor.set_data_from_numpy(PIXELS)], client_timeout=20)
        found: list[int] = answer.as_numpy("category_ids").tolist()
        return found


@pytest.mark.parametrize("workers", ["1", "2"])
def test_clients_that_trust_the_certificate_are_served_and_no_others(
    files: CertificateFiles, tmp_path: Path, workers: str
) -> None:
    other = write_certificate(tmp_path, "other")
    own = tmp_path / "own.crt", tmp_path / "own.key"
    shutil.copyfile(files.certificate, own[0])
    shutil.copyfile(files.key, own[1])
    flags = [*build_flags(tmp_path, *own), "--workers", workers]
    with run_server(tmp_path / "log", *flags) as server:
        assert infer(server, files.certificate) == [10]
        for trusted in (None, other.certificate):
            with pytest.raises(InferenceServerException, match=r"UNAVAILABLE|DEADLINE_EXCEEDED"):
                infer(server, trusted)
        shutil.copyfile(other.certificate, own[0])
        shutil.copyfile(other.key, own[1])
        assert infer(server, other.certificate) == [10]
        server.terminate()
        assert server.wait() == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_wrong_certificate_stops_the_start(
    files: CertificateFiles, tmp_path: Path, workers: str
) -> None:
    flags = [*build_flags(tmp_path, tmp_path / "gone.crt", files.key), "--workers", workers]
    server = ServerProcess(tmp_path / "log", *flags)
    assert server.wait() == 1
    *_, line = server.read_log().splitlines()
    assert line.endswith("gone.crt: No such file or directory")
    assert "Traceback" not in server.read_log()
