from __future__ import annotations

import base64
import io
import json
import re
import zipfile
from urllib.parse import unquote

import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.writers import FORMATS, choose_writer
from service.http.routes import documents
from service.http.routes.documents import FILE_TYPES
from tests.support.blob_model import draw_picture, encode_picture

PICTURE = encode_picture(draw_picture(48, 64, {"red": (4, 8, 12, 16), "blue": (30, 30, 10, 10)}))
NOTHING = encode_picture(np.zeros((20, 30, 3), np.uint8))
SINGLE = sorted(FORMATS)
PAGES = sorted(name for name, chosen in FORMATS.items() if chosen.join is None)


def part(data: bytes, name: str = "a.png") -> tuple[str, tuple[str, bytes]]:
    return "images", (name, data)


async def ask(client: httpx.AsyncClient, name: str, *files: bytes) -> httpx.Response:
    parts = [part(data, f"{number}.png") for number, data in enumerate(files)]
    response = await client.post(f"/segment?format={name}", files=parts)
    assert response.status_code == 200, response.text
    return response


def name_of(response: httpx.Response) -> str:
    """The file name that a browser would take."""
    header = response.headers["content-disposition"]
    found = re.fullmatch(r"""attachment; filename="([ -~]*)"; filename\*=UTF-8''(\S+)""", header)
    assert found is not None, header
    return unquote(found[2])


@pytest.mark.parametrize("name", SINGLE)
async def test_one_image_is_answered_with_one_file(client: httpx.AsyncClient, name: str) -> None:
    chosen = FORMATS[name]
    response = await ask(client, name, PICTURE)
    assert response.headers["content-type"].partition(";")[0] == chosen.media_type
    assert name_of(response) == f"0{chosen.suffix}"
    assert response.content and response.headers["vary"] == "accept"
    empty = await ask(client, name, NOTHING)
    assert len(empty.content) < len(response.content)


@pytest.mark.parametrize("name", PAGES)
async def test_several_images_are_answered_with_an_archive(
    client: httpx.AsyncClient, name: str
) -> None:
    chosen = FORMATS[name]
    response = await ask(client, name, PICTURE, NOTHING)
    assert response.headers["content-type"] == "application/zip"
    assert name_of(response) == f"{name}.zip"
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        files = {file: archive.read(file) for file in archive.namelist()}
    folder = f"{chosen.folder}/" if chosen.folder else ""
    assert {f"{folder}0{chosen.suffix}", f"{folder}1{chosen.suffix}"} <= set(files)
    alone = await ask(client, name, PICTURE)
    assert files[f"{folder}0{chosen.suffix}"] == alone.content
    assert ("data.yaml" in files) == (name == "yolo")


@pytest.mark.parametrize("name", sorted(set(SINGLE) - set(PAGES)))
async def test_several_images_are_answered_with_one_document(
    client: httpx.AsyncClient, name: str
) -> None:
    response = await ask(client, name, PICTURE, NOTHING, PICTURE)
    assert name_of(response) == f"results{FORMATS[name].suffix}"
    assert response.text.count("0.png") and response.text.count("2.png")


async def test_coco_has_the_masks_of_the_ordinary_answer(client: httpx.AsyncClient) -> None:
    ordinary = (await client.post("/segment", files=[part(PICTURE)])).json()["results"][0]
    content = json.loads((await ask(client, "coco", PICTURE)).content)
    assert content["images"] == [{"id": 1, "file_name": "0.png", "height": 48, "width": 64}]
    for found, expected in zip(content["annotations"], ordinary["instances"], strict=True):
        assert {key: found[key] for key in ("bbox", "area", "score", "segmentation")} == {
            key: expected[key] for key in ("bbox", "area", "score", "segmentation")
        }


async def test_labels_are_those_of_resolved_overlaps(client: httpx.AsyncClient) -> None:
    nested = {"red": (4, 4, 40, 40), "green": (8, 8, 30, 30)}
    picture = encode_picture(draw_picture(48, 64, nested))
    response = await client.post("/segment?overlaps=resolve", files=[part(picture)])
    left = response.json()["results"][0]["instances"]
    with Image.open(io.BytesIO((await ask(client, "labels", picture)).content)) as image:
        pixels = np.asarray(image)
    assert pixels.max() == len(left) >= 1
    for number, instance in enumerate(left, 1):
        mask = coco_mask.decode(instance["segmentation"]).astype(bool)
        np.testing.assert_array_equal(pixels == number, mask)


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        ("../../etc/passwd", "passwd.geojson"),
        ('a"; x="b.png', "a_; x=_b.geojson"),
        ("ядро 1.tif", "ядро 1.geojson"),
        ("con.png", "_con.geojson"),
        ("a\u2028b.png", "a_b.geojson"),
    ],
)
async def test_a_hostile_name_cannot_leave_its_header_or_folder(
    client: httpx.AsyncClient, sent: str, received: str
) -> None:
    response = await client.post("/segment?format=geojson", files=[part(PICTURE, sent)])
    assert response.status_code == 200
    assert name_of(response) == received
    both = [part(PICTURE, sent), part(PICTURE, sent)]
    response = await client.post("/segment?format=geojson", files=both)
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        names = archive.namelist()
    assert len(set(names)) == 2
    assert not any(name.startswith("/") or ".." in name.split("/") for name in names)


async def test_a_body_without_a_name_is_called_image(client: httpx.AsyncClient) -> None:
    response = await client.post("/segment?format=csv", content=PICTURE)
    assert name_of(response) == "image.csv"
    assert response.text.splitlines()[1].startswith("image,1,10,red,")


async def test_the_format_may_be_a_field_and_decides_over_accept(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post(
        "/segment",
        files=[part(PICTURE)],
        data={"format": "geojson", "simplify_px": "3"},
        headers={"accept": "image/png"},
    )
    assert response.headers["content-type"] == "application/geo+json"
    assert len(response.json()["features"]) == 2


async def test_a_stream_has_progress_and_then_the_file(client: httpx.AsyncClient) -> None:
    ndjson = {"accept": "application/x-ndjson"}
    response = await client.post("/segment?format=yolo", content=PICTURE, headers=ndjson)
    *_, last = map(json.loads, response.text.splitlines())
    alone = await client.post("/segment?format=yolo", content=PICTURE)
    assert last["result"]["file_name"] == "image.txt"
    assert last["result"]["media_type"] == "text/plain"
    assert base64.b64decode(last["result"]["base64"]) == alone.content


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("format=svg", "format: Input should be 'coco'"),
        ("format=csv&simplify_px=1", "format: the format csv has no outlines"),
        ("format=csv&masks=rle", "masks: the format csv has its own masks"),
        ("format=yolo&simplify_px=-1", "simplify_px"),
        ("format=yolo&simplify_px=nan", "simplify_px"),
        ("simplify_px=1", "simplify_px: it needs a format that has outlines"),
    ],
)
async def test_what_cannot_be_written_is_refused_by_name(
    client: httpx.AsyncClient, query: str, reason: str
) -> None:
    response = await client.post(f"/segment?{query}", content=PICTURE)
    assert response.status_code == 422
    assert reason in response.json()["error"]["message"]


async def test_a_missing_package_is_named_before_any_work(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, app: object
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    response = await client.post("/segment?format=ome-tiff", content=b"no image")
    assert response.status_code == 422
    assert "needs the package tifffile, in the extra 'science'" in response.text


async def test_a_bad_image_among_several_fails_the_file_and_is_named(
    client: httpx.AsyncClient,
) -> None:
    files = [part(PICTURE), part(b"no image", "bad.png")]
    response = await client.post("/segment?format=csv", files=files)
    assert response.status_code == 415
    message = response.json()["error"]["message"]
    assert message.startswith("image 2 ('bad.png'): ")
    response = await client.post("/segment?format=csv", content=b"no image")
    assert response.status_code == 415 and "image 1" not in response.text


async def test_a_large_document_is_sent_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = list(documents.gather(b"x" * 1000 for _ in range(200)))
    assert b"".join(pieces) == b"x" * 200_000
    assert len(pieces) == 4 and min(map(len, pieces[:-1])) >= 1 << 16


def test_every_format_is_described() -> None:
    for name, chosen in FORMATS.items():
        assert choose_writer(name) is chosen
        assert chosen.media_type in (*FILE_TYPES, "application/json")
