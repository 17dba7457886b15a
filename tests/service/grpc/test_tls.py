from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc import aio

from service.errors import StartupError
from service.grpc.tls import TlsFiles
from tests.support.certificates import CertificateFiles, write_certificate


@pytest.fixture
def files(tmp_path: Path) -> CertificateFiles:
    return write_certificate(tmp_path)


def build(files: CertificateFiles) -> TlsFiles:
    return TlsFiles(files.certificate, files.key)


def replace(files: CertificateFiles, by: CertificateFiles) -> None:
    shutil.copyfile(by.certificate, files.certificate)
    shutil.copyfile(by.key, files.key)


@asynccontextmanager
async def serve(tls: TlsFiles) -> AsyncIterator[int]:
    server = aio.server()
    port = server.add_secure_port("127.0.0.1:0", tls.build_credentials())
    await server.start()
    yield port
    await server.stop(0)


async def shakes_hands(port: int, certificate: Path) -> bool:
    """Whether a new connection trusts the server."""
    credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        try:
            async with asyncio.timeout(10):
                await channel.unary_unary("/none/None")(b"", wait_for_ready=False)
        except aio.AioRpcError as error:
            return bool(error.code() == grpc.StatusCode.UNIMPLEMENTED)
    return True


async def test_a_changed_certificate_holds_for_new_connections(
    files: CertificateFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    old = tmp_path / "old.crt"
    shutil.copyfile(files.certificate, old)
    new = write_certificate(tmp_path, "new")
    async with serve(build(files)) as port:
        assert await shakes_hands(port, old)
        assert not await shakes_hands(port, new.certificate)
        files.certificate.write_bytes(new.certificate.read_bytes())  # not the key, yet
        assert await shakes_hands(port, old)
        assert "stays as it was" in caplog.text
        replace(files, new)
        assert await shakes_hands(port, new.certificate)
        assert not await shakes_hands(port, old)
        assert caplog.text.count("gRPC has a new certificate") == 1
        files.key.unlink()
        assert await shakes_hands(port, new.certificate)


def test_files_that_cannot_be_used_are_named(files: CertificateFiles, tmp_path: Path) -> None:
    other = write_certificate(tmp_path, "other")
    locked = write_certificate(tmp_path, "locked", password="secret")
    empty = tmp_path / "empty.pem"
    empty.touch()
    for certificate, key, said in (
        (tmp_path / "gone.pem", files.key, r"gone\.pem: No such file"),
        (files.certificate, tmp_path / "gone.pem", r"gone\.pem: No such file"),
        (files.certificate, other.key, r"server\.crt and .*other\.key are no certificate"),
        (files.key, files.certificate, "are no certificate and its key"),
        (empty, files.key, r"empty\.pem and"),
        (locked.certificate, locked.key, "without a password"),
        (tmp_path, files.key, f"{tmp_path}"),
    ):
        with pytest.raises(StartupError, match=said):
            TlsFiles(certificate, key)
