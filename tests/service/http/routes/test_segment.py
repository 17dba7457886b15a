from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from service.errors import EngineError
from service.http.routes.segment import JSON, NDJSON, PNG, choose_media_type
from service.http.schemas import SegmentResponse
from tests.support.blob_model import draw_picture, encode_picture, poisoned_picture
from tests.support.pictures import build_gif, build_png_header, build_truncated_jpeg

PICTURE = encode_picture(draw_picture(48, 64, {"red": (4, 8, 12, 16), "blue": (30, 30, 10, 10)}))
STAGES = ("decode", "queue", "infer", "postprocess", "encode")


def part(data: bytes, name: str = "a.png") -> tuple[str, tuple[str, bytes]]:
    return "images", (name, data)


def error_of(response: httpx.Response) -> dict[str, str]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message"}
    error: dict[str, str] = body["error"]
    return error


@pytest.mark.parametrize("charset", ["unicode_escape", "punycode", "utf-7", "no such codec"])
async def test_the_charset_of_a_form_changes_nothing(
    client: httpx.AsyncClient, charset: str
) -> None:
    name = rb'Content-Disposition: form-data; name="images"; filename="a\ud800+AGE-.png"'
    body = b"".join(
        b"--x\r\n" + name + b"\r\n\r\n" + data + b"\r\n" for data in (PICTURE, b"no image")
    )
    response = await client.post(
        "/segment?timeout_ms=10000",
        content=body + b"--x--\r\n",
        headers={"content-type": f"multipart/form-data; boundary=x; charset={charset}"},
    )
    assert response.status_code == 200
    good, bad = response.json()["results"]
    assert good["file_name"] == bad["file_name"] == r"a\ud800+AGE-.png"
    assert "error" not in good and bad["error"]["code"] == "unsupported_format"


async def test_a_multipart_image_is_answered_as_the_contract_says(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post("/segment", files=[part(PICTURE)])
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == [
        *("model", "version", "task", "canvases", "cost", "results", "timing_ms"),
    ]
    assert (body["model"], body["version"], body["task"]) == ("blobs", 1, "segmentation")
    (result,) = body["results"]
    assert (result["file_name"], result["width"], result["height"]) == ("a.png", 64, 48)
    assert (result["canvases"], result["instances_found"], result["truncated"]) == (1, 2, False)
    red, blue = result["instances"]
    assert (red["category_id"], red["category"]) == (10, "red")
    assert (red["bbox"], red["area"]) == ([4, 8, 12, 16], 192)
    assert (blue["category_id"], blue["bbox"]) == (30, [30, 30, 10, 10])
    mask = coco_mask.decode(red["segmentation"])
    assert mask.shape == (48, 64)
    assert mask[8:24, 4:16].all()
    assert mask.sum() == 192
    SegmentResponse.model_validate(body)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP"])
async def test_a_raw_body_of_each_format(client: httpx.AsyncClient, image_format: str) -> None:
    data = encode_picture(draw_picture(), image_format)
    headers = {"content-type": f"image/{image_format.lower()}"}
    response = await client.post("/segment", content=data, headers=headers)
    assert response.status_code == 200
    (result,) = response.json()["results"]
    assert result["file_name"] is None
    assert [i["category"] for i in result["instances"]] == ["red"]


async def test_the_format_is_known_by_content_not_by_type(client: httpx.AsyncClient) -> None:
    response = await client.post("/segment", content=PICTURE, headers={"content-type": "text/x"})
    assert response.status_code == 200


async def test_results_with_an_image_id_are_coco_results(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    response = await client.post("/segment", files=[part(PICTURE)])
    results = [
        {**instance, "image_id": 5} for instance in response.json()["results"][0]["instances"]
    ]
    categories = [{"id": i, "name": str(i)} for i in (10, 20, 30)]
    truth = {"images": [{"id": 5, "width": 64, "height": 48}], "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps({**truth, "annotations": []}))
    (tmp_path / "results.json").write_text(json.dumps(results))
    loaded = COCO(str(tmp_path / "truth.json")).loadRes(str(tmp_path / "results.json"))
    assert [a["category_id"] for a in loaded.anns.values()] == [10, 30]


@pytest.mark.parametrize("masks", ["rle", "polygon", "none"])
async def test_masks_are_written_as_asked(client: httpx.AsyncClient, masks: str) -> None:
    response = await client.post("/segment", params={"masks": masks}, files=[part(PICTURE)])
    red = response.json()["results"][0]["instances"][0]
    if masks == "none":
        assert "segmentation" not in red
    elif masks == "polygon":
        (ring,) = red["segmentation"]
        assert (min(ring[::2]), min(ring[1::2])) == (4, 8)
    else:
        assert isinstance(red["segmentation"]["counts"], str)
    SegmentResponse.model_validate(response.json())


async def test_thresholds_and_bounds_are_obeyed(client: httpx.AsyncClient) -> None:
    async def count(**params: float) -> int:
        response = await client.post("/segment", params=params, files=[part(PICTURE)])
        return len(response.json()["results"][0]["instances"])

    assert await count() == 2
    assert await count(max_instances=1) == 1
    assert await count(score_threshold=0.96) == 1
    assert await count(score_threshold=1) == 0


async def test_model_and_version_are_chosen(client: httpx.AsyncClient) -> None:
    response = await client.post("/segment?model=wide&version=1", files=[part(PICTURE)])
    assert response.json()["model"] == "wide"


async def test_the_stages_add_up_to_the_total(client: httpx.AsyncClient) -> None:
    for _ in range(3):
        response = await client.post("/segment", files=[part(PICTURE)])
        timing = response.json()["timing_ms"]
        assert list(timing) == [*STAGES, "total"]
        assert 0 < sum(timing[stage] for stage in STAGES) <= timing["total"] + 0.01


@pytest.mark.parametrize("accept", ["image/png", "image/png, application/json;q=0.5", "image/*"])
async def test_accept_png_answers_with_the_picture(client: httpx.AsyncClient, accept: str) -> None:
    response = await client.post("/segment", files=[part(PICTURE)], headers={"accept": accept})
    assert response.headers["content-type"] == "image/png"
    assert response.headers["vary"] == "accept"
    picture = np.asarray(Image.open(io.BytesIO(response.content)))
    assert picture.shape == (48, 64, 3)
    assert (picture != np.asarray(Image.open(io.BytesIO(PICTURE)))).any()


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("application/json", JSON),
        ("application/json, image/png", JSON),
        ("image/png;q=0", JSON),
        ("image/png;q=oops", JSON),
        ("IMAGE/PNG", PNG),
        ("image/*", PNG),
        ("application/json;q=0.1, image/png;q=0.2", PNG),
        ("application/x-ndjson", NDJSON),
        ("Application/X-NDJSON; charset=utf-8 ; q=0.3", NDJSON),
        ("application/x-ndjson, application/json", JSON),
        ("application/x-ndjson, image/png", PNG),
        ("application/x-ndjson, application/json;q=0.9, */*;q=0.8", NDJSON),
        ("application/x-ndjson;q=0", JSON),
        ("text/html, application/x-ndjson;q=0.1", NDJSON),
        ("image/png;q=0.2, image/png;q=0.7, application/json;q=0.5", PNG),
    ],
)
def test_accept_is_read_with_its_weights(accept: str, media_type: str) -> None:
    assert choose_media_type(accept) == media_type


async def test_accept_png_with_several_images_is_refused(client: httpx.AsyncClient) -> None:
    response = await client.post(
        "/segment", files=[part(PICTURE)] * 2, headers={"accept": "image/png"}
    )
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_request"


BAD_BODIES = {
    "text": (b"hello, this is no image", 415, "unsupported_format"),
    "gif": (build_gif(), 415, "unsupported_format"),
    "truncated jpeg": (build_truncated_jpeg(), 422, "corrupt_image"),
    "60000x60000 png": (build_png_header(60_000, 60_000), 413, "image_too_large"),
    "body over the limit": (b"x" * 1_000_001, 413, "body_too_large"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_a_bad_image_is_a_4xx_and_the_server_goes_on(
    client: httpx.AsyncClient, name: str
) -> None:
    data, status, code = BAD_BODIES[name]
    for request in ({"files": [part(data)]}, {"content": data}):
        response = await client.post("/segment", **request)
        assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert (await client.post("/segment", files=[part(PICTURE)])).status_code == 200


async def test_an_empty_body_or_part(client: httpx.AsyncClient) -> None:
    response = await client.post("/segment", content=b"", headers={"content-type": "image/png"})
    assert (response.status_code, error_of(response)["code"]) == (400, "empty_body")
    response = await client.post(
        "/segment", headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert (response.status_code, error_of(response)["code"]) == (400, "empty_body")
    response = await client.post("/segment", files=[part(b"")])
    assert (response.status_code, error_of(response)["code"]) == (400, "empty_image")


@pytest.mark.parametrize(
    ("query", "status", "code", "named"),
    [
        ("model=cats", 404, "unknown_model", "cats"),
        ("model=broken", 503, "model_unavailable", "broken"),
        ("version=3", 404, "unknown_version", "3"),
        ("version=0", 422, "invalid_parameter", "version"),
        ("version=new", 422, "invalid_parameter", "new"),
        ("score_threshold=1.5", 422, "invalid_parameter", "1.5"),
        ("score_threshold=-0.1", 422, "invalid_parameter", "-0.1"),
        ("score_threshold=nan", 422, "invalid_parameter", "nan"),
        ("score_threshold=high", 422, "invalid_parameter", "high"),
        ("max_instances=0", 422, "invalid_parameter", "max_instances"),
        ("masks=svg", 422, "invalid_parameter", "svg"),
        ("score_treshold=0.5", 422, "invalid_parameter", "score_treshold"),
    ],
)
async def test_a_bad_query_is_a_4xx_that_names_it(
    client: httpx.AsyncClient, query: str, status: int, code: str, named: str
) -> None:
    response = await client.post(f"/segment?{query}", files=[part(PICTURE)])
    error = error_of(response)
    assert (response.status_code, error["code"]) == (status, code)
    assert named in error["message"]


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"content-type": "multipart/form-data"}, b"abc"),
        ({"content-type": "multipart/form-data; boundary=x"}, b"abc"),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\nbroken\r\n\r\n"),
        (
            {"content-type": "multipart/form-data; boundary=x"},
            b'--x\r\nContent-Disposition: form-data; name="images"\r\n\r\ntext\r\n--x--\r\n',
        ),
    ],
)
async def test_a_broken_multipart_body(
    client: httpx.AsyncClient, headers: dict[str, str], body: bytes
) -> None:
    response = await client.post("/segment", content=body, headers=headers)
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_multipart")


async def test_parts_of_another_name_are_named(client: httpx.AsyncClient) -> None:
    response = await client.post("/segment", files=[("image", ("a.png", PICTURE))])
    assert response.status_code == 400
    assert "'image'" in error_of(response)["message"]


async def test_one_bad_image_of_several_harms_only_itself(client: httpx.AsyncClient) -> None:
    files = [part(PICTURE, "0.png"), part(b"text", "1.txt"), part(PICTURE, "2.png"), part(b"", "3")]
    response = await client.post("/segment", files=files)
    assert response.status_code == 200
    results = response.json()["results"]
    assert [result["file_name"] for result in results] == ["0.png", "1.txt", "2.png", "3"]
    assert results[0]["instances"] == results[2]["instances"]
    assert results[1]["error"]["code"] == "unsupported_format"
    assert results[3]["error"]["code"] == "empty_image"
    assert "instances" not in results[1]
    SegmentResponse.model_validate(response.json())


async def test_an_engine_failure_harms_only_its_image(client: httpx.AsyncClient) -> None:
    poisoned = encode_picture(poisoned_picture())
    files = [part(PICTURE), part(poisoned), part(PICTURE)]
    response = await client.post("/segment?model=wide", files=files)
    results = response.json()["results"]
    assert results[1]["error"]["code"] == EngineError.code
    assert len(results[0]["instances"]) == len(results[2]["instances"]) == 2
    alone = await client.post("/segment?model=wide", files=[part(poisoned)])
    assert (alone.status_code, error_of(alone)["code"]) == (500, "engine_error")


async def test_a_batch_does_not_change_a_result(client: httpx.AsyncClient) -> None:
    """Mixed canvas shapes together are equal to one at a time (mask IoU >= 0.999)."""
    sizes = [(48, 48), (48, 90), (90, 48), (64, 64), (30, 100), (100, 100), (48, 47), (20, 20)]
    pictures = [
        encode_picture(
            draw_picture(h, w, {"red": (2, 2, w // 2, h // 2), "green": (w // 2, 1, 9, 9)})
        )
        for h, w in sizes
    ]

    async def ask(images: list[bytes]) -> list[dict[str, Any]]:
        response = await client.post("/segment?model=wide", files=[part(i) for i in images])
        results: list[dict[str, Any]] = response.json()["results"]
        return results

    alone = [(await ask([picture]))[0] for picture in pictures]
    for batch in (
        await ask(pictures),
        [r for rs in await asyncio.gather(*(ask([p]) for p in pictures)) for r in rs],
    ):
        for one, other in zip(alone, batch, strict=True):
            assert len(one["instances"]) == len(other["instances"]) > 0
            for a, b in zip(one["instances"], other["instances"], strict=True):
                assert a["category_id"] == b["category_id"]
                assert a["score"] == pytest.approx(b["score"], abs=1e-5)
                iou = coco_mask.iou([a["segmentation"]], [b["segmentation"]], [0])
                assert iou[0, 0] >= 0.999


async def test_the_answer_says_what_the_request_cost(client: httpx.AsyncClient) -> None:
    files = [part(PICTURE), part(encode_picture(draw_picture(128, 128))), part(b"text")]
    body = (await client.post("/segment", files=files)).raise_for_status().json()
    assert [result.get("canvases") for result in body["results"]] == [1, 9, None]
    assert body["canvases"] == body["cost"]["canvases"] == 10
    assert 0 < body["cost"]["engine_ms"] < 60_000
    text = (await client.get("/metrics")).text
    counted = re.findall(r'^solo_canvases_total{model="blobs".*} (.*)$', text, re.MULTILINE)
    assert sum(map(float, counted)) >= 10  # the server on Ray has answered other tests too


async def test_the_answer_says_that_instances_were_left_out(client: httpx.AsyncClient) -> None:
    for params, found, left, truncated in (
        ({"max_instances": 1}, 2, 1, True),
        ({"max_instances": 2}, 2, 2, False),
        ({"score_threshold": 1}, 0, 0, False),
    ):
        response = await client.post("/segment", params=params, files=[part(PICTURE)])
        (result,) = response.json()["results"]
        assert (result["instances_found"], len(result["instances"])) == (found, left)
        assert result["truncated"] is truncated


async def test_masks_as_one_index_image(client: httpx.AsyncClient) -> None:
    response = await client.post("/segment?masks=png", files=[part(PICTURE)] * 2)
    for result in SegmentResponse.model_validate(response.json()).results:
        assert result.index_png is not None and result.instances is not None
        index = np.asarray(Image.open(io.BytesIO(base64.b64decode(result.index_png))))
        assert index.shape == (48, 64)
        assert [int((index == n).sum()) for n in (1, 2)] == [i.area for i in result.instances]
        assert (index[8:24, 4:16] == 1).all()
        assert all(instance.segmentation is None for instance in result.instances)
