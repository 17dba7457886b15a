"""The image has less than the sources' environment; its answers are the same to the last bit."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import httpx
import pytest
from PIL import Image

from tests.deploy.images import ROOT, build_server_image, docker, find_base, find_fault
from tests.support.processes import free_port
from tests.support.server import CPU_FLAGS, run_server
from tests.support.waiting import poll_until

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1800)]

IMAGE, EXTENDED_IMAGE = "solo-serve:test", "solo-serve:test-extended"
MAX_MB = 260
"""Above the base."""
SAME = {"SOLO_PRECISION": "fp32", "SOLO_THREADS": "1"}
"""`auto` may choose another precision on a busy machine."""
PICTURE = ROOT / "tests/data/nuclei/images/16c3d5935ba94b72.jpg"
INPUTS = ("JPEG", "PNG", "WEBP", "BMP")
FORMATS = (
    "coco",
    "coco-polygons",
    "geojson",
    "labels",
    "ome-zarr",
    "yolo",
    "labelme",
    "cvat",
    "csv",
)
CHANGING = ("timing_ms", "cost", "request_id")


@pytest.fixture(scope="module")
def image() -> str:
    fault = find_fault()
    if fault is not None:
        pytest.skip(fault)
    build_server_image(IMAGE)
    return IMAGE


@contextmanager
def run_container(image: str, *options: str) -> Iterator[str]:
    """Address of the server in a container that may write nothing."""
    port = free_port()
    variables = [part for name, value in SAME.items() for part in ("--env", f"{name}={value}")]
    bounds = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL")
    published = ("--publish", f"127.0.0.1:{port}:8000")
    started = docker("run", "--detach", *published, *variables, *bounds, *options, image).strip()
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        try:
            return httpx.get(f"{url}/v2/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    try:
        poll_until(is_ready, timeout_s=120, pause_s=0.2, describe=lambda: docker("logs", started))
        yield url
    finally:
        docker("rm", "--force", started)


@pytest.fixture(scope="module")
def container(image: str) -> Iterator[str]:
    with run_container(image) as url:
        yield url


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server of this checkout, with all files of the bundled models."""
    log = tmp_path_factory.mktemp("sources") / "log"
    flags = ("--model-repo", str(ROOT / "model_repo"), *CPU_FLAGS)
    with run_server(log, *flags, environment=SAME) as server:
        yield server.url


def ask(url: str, body: bytes, **params: Any) -> Any:
    """The answer to one image without what changes from request to request; files by name."""
    answer = httpx.post(f"{url}/segment", content=body, params=params, timeout=120)
    assert answer.status_code == 200, answer.text
    if answer.content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    if "format" in params or not answer.headers["content-type"].startswith("application/json"):
        return answer.content
    return {key: value for key, value in answer.json().items() if key not in CHANGING}


def encode(image_format: str) -> bytes:
    file = io.BytesIO()
    Image.open(PICTURE).save(file, image_format)
    return file.getvalue()


def test_it_is_small_above_its_base(image: str) -> None:
    sizes = [
        int(docker("image", "inspect", "--format", "{{.Size}}", i)) for i in (image, find_base())
    ]
    assert (sizes[0] - sizes[1]) / 1e6 < MAX_MB


def test_its_models_are_whole(image: str) -> None:
    assert (
        docker("run", "--rm", "--entrypoint", "solo-models", image, "list").count("verified") == 2
    )


@pytest.mark.parametrize("model", ["nuclei", "facades"])
@pytest.mark.parametrize("image_format", INPUTS)
def test_images_of_each_format_have_the_same_answer(
    container: str, sources: str, model: str, image_format: str
) -> None:
    body = encode(image_format)
    params = {"model": model, "score_threshold": 0.05, "masks": "polygon"}
    answer = ask(container, body, **params)
    assert answer == ask(sources, body, **params)
    assert model != "nuclei" or answer["results"][0]["instances"]


@pytest.mark.parametrize("wanted", FORMATS)
def test_files_are_the_same(container: str, sources: str, wanted: str) -> None:
    body = PICTURE.read_bytes()
    assert ask(container, body, format=wanted) == ask(sources, body, format=wanted)


@pytest.mark.parametrize(
    "params",
    [{"scale": "auto"}, {"overlaps": "resolve"}, {"masks": "png"}, {"object_size_px": 30}],
    ids=lambda params: next(iter(params)),
)
def test_parameters_have_the_same_effect(
    container: str, sources: str, params: dict[str, Any]
) -> None:
    body = PICTURE.read_bytes()
    assert ask(container, body, **params) == ask(sources, body, **params)


def test_the_drawn_picture_is_the_same(container: str, sources: str) -> None:
    drawn = [
        httpx.post(
            f"{url}/segment",
            content=PICTURE.read_bytes(),
            headers={"Accept": "image/png"},
            timeout=120,
        )
        for url in (container, sources)
    ]
    assert drawn[0].headers["content-type"] == "image/png"
    assert drawn[0].content == drawn[1].content


@pytest.mark.parametrize("body", [b"no image", b"\0\0\0\x20ftypavif" + bytes(200), b"RIFF" * 60])
def test_what_is_no_image_is_refused_and_ends_nothing(container: str, body: bytes) -> None:
    answer = httpx.post(f"{container}/segment", content=body)
    assert answer.status_code in (415, 422), answer.text
    assert httpx.get(f"{container}/v2/health/ready").status_code == 200


def test_pages_metrics_and_statistics_answer(container: str) -> None:
    for path in ("/", "/docs", "/metrics", "/v2/models/stats", "/v2/models/nuclei"):
        assert httpx.get(f"{container}{path}").status_code == 200, path


def test_with_extras_it_reads_tiff_and_speaks_grpc(image: str, sources: str) -> None:
    build_server_image(EXTENDED_IMAGE, "grpc,science")
    port, body = free_port(), encode("TIFF")
    more = ("--env", "SOLO_GRPC_PORT=8001", "--publish", f"127.0.0.1:{port}:8001")
    with run_container(EXTENDED_IMAGE, *more) as url:
        assert ask(url, body) == ask(sources, body)
        assert ask(url, body, format="ome-tiff") == ask(sources, body, format="ome-tiff")
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            assert check(b"", timeout=60) == b"\x08\x01"
            ready = channel.unary_unary("/inference.GRPCInferenceService/ModelStatistics")
            assert b"nuclei" in ready(b"", timeout=60)
