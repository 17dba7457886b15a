"""Programs that speak HTTP in their own way: proxies, and clients that offer an upgrade."""

from __future__ import annotations

import http.client
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.processes import free_port
from tests.support.server import CPU_FLAGS, ServerProcess, run_server
from tests.support.waiting import poll_until

PICTURE = encode_picture(draw_picture())
NGINX = """
daemon off; pid {folder}/pid; error_log {folder}/error.log warn; worker_processes 1;
events {{ worker_connections 256; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream solo {{ server 127.0.0.1:{server}; keepalive 64; keepalive_timeout {idle_s}s; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://solo; proxy_http_version 1.1; proxy_set_header Connection "";
    }}
  }}
}}
"""
JAVA = """
import java.net.URI;
import java.net.http.*;
import java.nio.file.Path;

public class Ask {
  public static void main(String[] words) throws Exception {
    HttpClient client = HttpClient.newHttpClient();
    HttpRequest request = HttpRequest.newBuilder(URI.create(words[0]))
        .POST(HttpRequest.BodyPublishers.ofFile(Path.of(words[1]))).build();
    for (int i = 0; i < 3; i++) {
      System.out.println(client.send(request, HttpResponse.BodyHandlers.ofString()).statusCode());
    }
  }
}
"""
NODE = """
const [url, path] = process.argv.slice(1);
const body = require("fs").readFileSync(path);
(async () => {
  for (const pause of [0, 10, 2000]) {
    await new Promise((done) => setTimeout(done, pause));
    const answers = Array.from({ length: 20 }, () => fetch(url, { method: "POST", body }));
    for (const answer of await Promise.all(answers)) {
      console.log(answer.status);
      await answer.arrayBuffer();
    }
  }
})();
"""


def needs(program: str, package: str) -> pytest.MarkDecorator:
    reason = f"{program} is not installed (Debian: apt-get install {package})"
    return pytest.mark.skipif(shutil.which(program) is None, reason=reason)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("clients")
    publish(root / "repo")
    (root / "picture.png").write_bytes(PICTURE)
    with run_server(root / "log", "--model-repo", str(root / "repo"), *CPU_FLAGS) as running:
        yield running


@pytest.fixture
def picture(server: ServerProcess) -> Path:
    return server.log.parent / "picture.png"


def run(*command: str | Path) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@needs("curl", "curl")
@pytest.mark.parametrize("framing", [(), ("-H", "Transfer-Encoding: chunked")])
def test_curl_that_offers_http2_is_answered(
    server: ServerProcess, picture: Path, framing: tuple[str, ...]
) -> None:
    url = f"{server.url}/segment"
    answer = ("-s", "-o", "/dev/null", "-w", "%{http_code} %{http_version}\n")
    more = ("--http2", "--data-binary", f"@{picture}", *framing)
    assert run("curl", *answer, *more, url, "--next", *answer, *more, url) == ["200", "1.1"] * 2


@needs("java", "default-jdk-headless")
@needs("javac", "default-jdk-headless")
def test_the_client_of_the_jdk_is_answered(
    server: ServerProcess, picture: Path, tmp_path: Path
) -> None:
    source = tmp_path / "Ask.java"
    source.write_text(JAVA, encoding="utf-8")
    assert run("java", source, f"{server.url}/segment", picture) == ["200"] * 3


@needs("node", "nodejs")
def test_fetch_of_node_is_answered(server: ServerProcess, picture: Path) -> None:
    assert run("node", "-e", NODE, f"{server.url}/segment", picture) == ["200"] * 60


@contextmanager
def run_nginx(folder: Path, server_port: int, idle_s: int) -> Iterator[int]:
    port = free_port()
    text = NGINX.format(folder=folder, server=server_port, port=port, idle_s=idle_s)
    (folder / "nginx.conf").write_text(text, encoding="ascii")
    process = subprocess.Popen(["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")])
    try:
        poll_until(lambda: ask(port) == 200, timeout_s=20, pause_s=0.05)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def ask(port: int, client: http.client.HTTPConnection | None = None) -> int:
    """Status of a request with a body; 0 without a connection. It costs the server little."""
    connection = client or http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/segment", b"x")
        response = connection.getresponse()
        response.read()
    except ConnectionRefusedError:
        return 0
    finally:
        if client is None:
            connection.close()
    return 200 if response.status == 415 else response.status


def send_in_bursts(port: int, bursts: int, clients: int, pause_s: float) -> Counter[int]:
    """Requests of all clients at once, each on a connection that it keeps, then a pause."""
    connections = [
        http.client.HTTPConnection("127.0.0.1", port, timeout=30) for _ in range(clients)
    ]
    statuses: Counter[int] = Counter()
    with ThreadPoolExecutor(clients) as pool:
        for _ in range(bursts):
            statuses.update(pool.map(lambda client: ask(port, client), connections))
            time.sleep(pause_s)
    for connection in connections:
        connection.close()
    return statuses


@needs("nginx", "nginx-light")
@pytest.mark.parametrize(
    ("bursts", "pause_s", "keep_alive_s"),
    [
        (15, 0.2, 4),
        (5, 1.99, 4),
        pytest.param(500, 0.0, 4, marks=pytest.mark.slow),
        pytest.param(20, 4.99, 75, marks=pytest.mark.slow),
    ],
)
def test_a_proxy_never_meets_a_closed_connection(
    tmp_path: Path, bursts: int, pause_s: float, keep_alive_s: int
) -> None:
    """It keeps idle connections for half as long as the server, and may not repeat a POST."""
    publish(tmp_path / "repo")
    flags = ("--model-repo", str(tmp_path / "repo"), *CPU_FLAGS)
    keep = ("--keep-alive-s", str(keep_alive_s))
    with run_server(tmp_path / "log", *flags, *keep) as server:
        server_port = int(server.url.rpartition(":")[2])
        with run_nginx(tmp_path, server_port, idle_s=max(2, keep_alive_s - 15)) as port:
            assert send_in_bursts(port, bursts, 20, pause_s) == {200: 20 * bursts}
