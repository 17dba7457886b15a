"""The back end as Label Studio calls it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from integrations.label_studio import (
    LabelStudioBackend,
    TaskError,
    build_app,
    encode_brush,
    read_config,
)
from solo_client import Client, Instance
from tests.integrations.conftest import PICTURE, PIXELS
from tests.support.found import draw_blobs, to_instance
from tests.support.server import ServerProcess

POLYGONS = """<View><Image name="img" value="$image"/>
<PolygonLabels name="label" toName="img"><Label value="Red"/><Label value="blue"/></PolygonLabels>
</View>"""
BRUSH = POLYGONS.replace("PolygonLabels", "BrushLabels")
STUDIO = "http://studio.invalid:8080"


class Studio:
    """The files of Label Studio, and what was asked for."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.picture = PICTURE

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if request.url.path == "/api/token/refresh":
            return httpx.Response(200, json={"access": "short"})
        if request.url.path == "/missing.png":
            return httpx.Response(404)
        return httpx.Response(200, content=self.picture)


@pytest.fixture
def studio() -> Studio:
    return Studio()


@pytest.fixture
def backend(server: ServerProcess, studio: Studio) -> Iterator[LabelStudioBackend]:
    http = httpx.Client(transport=httpx.MockTransport(studio))
    with Client(server.url) as client:
        yield LabelStudioBackend(client, STUDIO, token="legacy", http=http)


@pytest.fixture
def asked(backend: LabelStudioBackend) -> TestClient:
    return TestClient(build_app(backend))


def predict(asked: TestClient, config: str, *images: str) -> list[dict[str, Any]]:
    tasks = [{"id": number, "data": {"image": image}} for number, image in enumerate(images)]
    content = {"tasks": tasks, "label_config": config, "project": "1.2", "params": {}}
    response = asked.post("/predict", json=content)
    assert response.status_code == 200, response.text
    assert response.json()["model_version"] == "blobs:1"
    results: list[dict[str, Any]] = response.json()["results"]
    return results


def decode_brush(data: list[int]) -> np.ndarray:
    """The pixels of a brush, by the format's description."""
    bits = "".join(f"{value:08b}" for value in data)
    at = 0

    def read(size: int) -> int:
        nonlocal at
        at += size
        return int(bits[at - size : at], 2)

    count, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    out: list[int] = []
    while len(out) < count:
        is_run, length = read(1), read(sizes[read(2)]) + 1
        out += [read(word)] * length if is_run else [read(word) for _ in range(length)]
    assert len(out) == count and len(bits) - at < 8
    return np.array(out, np.uint8)


def test_polygons_are_in_per_cent(asked: TestClient) -> None:
    (found,) = predict(asked, POLYGONS, "/data/upload/1/a.png")
    red, blue = found["result"]
    assert (red["type"], red["from_name"], red["to_name"]) == ("polygonlabels", "label", "img")
    assert (red["original_width"], red["original_height"], red["image_rotation"]) == (64, 48, 0)
    assert red["value"]["polygonlabels"] == ["Red"] and blue["value"]["polygonlabels"] == ["blue"]
    points = np.array(red["value"]["points"]) * (0.64, 0.48)
    np.testing.assert_allclose(points.min(axis=0), (4, 8))
    np.testing.assert_allclose(points.max(axis=0), (16, 24))
    assert red["value"]["closed"] is True
    assert found["score"] == pytest.approx((red["score"] + blue["score"]) / 2)


def test_brushes_have_the_pixels(asked: TestClient) -> None:
    (found,) = predict(asked, BRUSH, "/data/upload/1/a.png")
    red, _ = found["result"]
    assert red["value"]["format"] == "rle" and red["value"]["brushlabels"] == ["Red"]
    pixels = decode_brush(red["value"]["rle"]).reshape(48, 64, 4)
    expected = np.zeros((48, 64), np.uint8)
    expected[8:24, 4:16] = 255
    for channel in range(4):
        np.testing.assert_array_equal(pixels[..., channel], expected)


@pytest.mark.parametrize("seed", range(8))
def test_any_mask_becomes_a_brush(seed: int) -> None:
    mask = draw_blobs(seed, (1, 1) if not seed else (37, 20 + 200 * (seed == 1)))
    rle = to_instance(mask).rle
    coco = {"size": rle["size"], "counts": rle["counts"].decode()}
    packed = encode_brush(Instance(1, "a", 0.5, (0, 0, 1, 1), 1, coco))
    np.testing.assert_array_equal(decode_brush(packed)[::4].reshape(mask.shape) == 255, mask)


def test_a_long_run_is_split() -> None:
    full = to_instance(np.ones((300, 300), bool))
    coco = {"size": [300, 300], "counts": full.rle["counts"].decode()}
    pixels = decode_brush(encode_brush(Instance(1, "a", 0.5, (0, 0, 1, 1), 1, coco)))
    assert pixels.size == 360_000 and pixels.min() == 255


def test_polygons_lie_on_the_picture_as_it_is_turned(asked: TestClient, studio: Studio) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "JPEG", quality=95, exif=exif)
    studio.picture = file.getvalue()
    for config in (POLYGONS, BRUSH):
        (found,) = predict(asked, config, "/a.jpg")
        sizes = {(r["original_width"], r["original_height"]) for r in found["result"]}
        assert sizes == {(48, 64)}


def test_a_single_label_takes_every_class(asked: TestClient) -> None:
    config = POLYGONS.replace('<Label value="blue"/>', "").replace("Red", "thing")
    (found,) = predict(asked, config, "/a.png")
    assert [r["value"]["polygonlabels"] for r in found["result"]] == [["thing"], ["thing"]]


def test_a_class_without_label_is_left_out(asked: TestClient) -> None:
    (found,) = predict(asked, POLYGONS.replace("blue", "other"), "/a.png")
    assert [r["value"]["polygonlabels"] for r in found["result"]] == [["Red"]]


def test_tasks_are_answered_in_their_order_and_none_is_none(asked: TestClient) -> None:
    assert len(predict(asked, POLYGONS, "/a.png", "/b.png")) == 2
    content = {"tasks": [], "label_config": POLYGONS}
    assert asked.post("/predict", json=content).json()["results"] == []


def test_the_token_is_sent_to_label_studio_only(
    backend: LabelStudioBackend, studio: Studio
) -> None:
    backend.fetch("/data/upload/a.png")
    backend.fetch("https://elsewhere.invalid/a.png")
    backend.token = "a.b.c"
    backend.fetch("/data/upload/a.png")
    sent = [(r.url.host, r.headers.get("authorization")) for r in studio.requests]
    assert sent == [
        ("studio.invalid", "Token legacy"),
        ("elsewhere.invalid", None),
        *(("studio.invalid", None), ("studio.invalid", "Bearer short")),
    ]


def test_label_studio_sees_whether_the_server_is_there(
    asked: TestClient, backend: LabelStudioBackend
) -> None:
    assert asked.get("/health").json() == {"status": "UP", "model_class": "solo-serve"}
    content = {"project": "1.2", "schema": POLYGONS, "hostname": "", "access_token": ""}
    assert asked.post("/setup", json=content).json() == {"model_version": "blobs:1"}
    assert asked.post("/webhook", json={"action": "ANNOTATION_CREATED"}).status_code == 201
    backend.client = Client("http://127.0.0.1:9")
    assert asked.get("/health").status_code == 503


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "a list 'tasks'"),
        ({"tasks": [{}], "label_config": POLYGONS}, "no data field 'image'"),
        ({"tasks": [{"data": 1}], "label_config": POLYGONS}, "no data field 'image'"),
        ({"tasks": [], "label_config": "<View"}, "not XML"),
        ({"tasks": [], "label_config": "<View/>"}, "none of PolygonLabels, BrushLabels"),
        ({"tasks": [{"data": {"image": "s3://b/a"}}], "label_config": BRUSH}, "HTTP address"),
        ({"tasks": [{"data": {"image": "file:///a"}}], "label_config": BRUSH}, "HTTP address"),
        ({"tasks": [{"data": {"image": "/missing.png"}}], "label_config": BRUSH}, "404"),
    ],
)
def test_a_bad_request_is_named(asked: TestClient, content: Any, reason: str) -> None:
    sent = {"content": content} if isinstance(content, bytes) else {"json": content}
    response = asked.post("/predict", **sent)
    assert response.status_code == 400
    assert reason in response.json()["error"]


def test_an_error_of_the_server_is_passed_on(
    asked: TestClient, backend: LabelStudioBackend
) -> None:
    backend.options["model"] = "missing"
    content = {"tasks": [{"data": {"image": "/a.png"}}], "label_config": BRUSH}
    response = asked.post("/predict", json=content)
    assert response.status_code == 502 and "missing" in response.json()["error"]


def test_entities_do_not_explode() -> None:
    bomb = "<!DOCTYPE x [" + "".join(
        f'<!ENTITY a{n} "{f"&a{n - 1};" * 10 if n else "x" * 1000}">' for n in range(10)
    )
    with pytest.raises(TaskError):
        read_config(bomb + "]><View>&a9;</View>")
