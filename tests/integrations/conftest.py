from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.server import ServerProcess, run_server

PIXELS = draw_picture(48, 64, {"red": (4, 8, 12, 16), "blue": (30, 30, 10, 10)})
PICTURE = encode_picture(PIXELS)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with one model."""
    folder = tmp_path_factory.mktemp("integrations")
    publish(folder / "repo")
    flags = ("--device", "cpu", "--threads", "1", "--pool-threads", "1")
    with run_server(folder / "server.log", "--model-repo", f"{folder / 'repo'}", *flags) as running:
        yield running
