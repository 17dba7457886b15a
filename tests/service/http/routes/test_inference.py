from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from service.http.app import create_app
from service.http.keys import add_key
from service.http.model_schemas import ModelDetail
from service.http.oip.infer import build_options
from service.http.oip.read import read_request
from service.http.oip.schemas import InferResponse, ProtocolError
from service.models.repository import load_repository
from service.settings import Settings
from tests.service.conftest import OPTIONS, OpenClient
from tests.support.blob_model import draw_picture, encode_picture, poisoned_picture

RED_AND_BLUE = draw_picture(48, 64, {"red": (4, 8, 12, 16), "blue": (30, 30, 10, 10)})
PICTURE = encode_picture(RED_AND_BLUE)
INFER = "/v2/models/blobs/infer"


def files(*images: bytes, **members: Any) -> dict[str, Any]:
    data = [base64.b64encode(image).decode() for image in images]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(images)], "data": data}
    return {"inputs": [tensor], **members}


def tensors_of(response: httpx.Response) -> dict[str, np.ndarray[Any, Any]]:
    assert response.status_code == 200, response.text
    answer = InferResponse.model_validate(response.json())
    return {o.name: np.array(o.data).reshape(o.shape) for o in answer.outputs}


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    error = ProtocolError.model_validate_json(response.content, extra="forbid")
    return response.status_code, error.code, error.error


async def test_the_server_and_a_model_describe_themselves(client: httpx.AsyncClient) -> None:
    server = (await client.get("/v2")).json()
    assert server["name"] == "solo-serve"
    assert "binary_tensor_data" in server["extensions"]
    for path in ("/v2/models/blobs", "/v2/models/blobs/versions/1"):
        model = ModelDetail.model_validate((await client.get(path)).json())
        assert (model.versions, model.platform) == (["1"], "onnxruntime")
        (image,) = model.inputs
        assert (image.name, image.datatype, image.shape) == ("image", "BYTES", [-1])
        assert {o.name: o.shape for o in model.outputs}["bbox"] == [-1, 4]


async def test_ready_says_whether_a_model_takes_work(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    paths = ("/v2/models/blobs/ready", "/v2/models/blobs/versions/1/ready")
    for path in paths:
        response = await client.get(path)
        assert (response.status_code, response.json()) == (200, {"name": "blobs", "ready": True})
    assert error_of(await client.get("/v2/models/cats/ready"))[:2] == (404, "unknown_model")
    assert error_of(await client.get("/v2/models/broken/ready"))[:2] == (503, "model_unavailable")
    unknown = await client.get("/v2/models/blobs/versions/7/ready")
    assert error_of(unknown)[:2] == (404, "unknown_version")
    app.state.segmenter.admission.close()
    for path in paths:
        response = await client.get(path)
        assert (response.status_code, response.json()["ready"]) == (503, False)


async def test_the_answer_is_that_of_segment(client: httpx.AsyncClient) -> None:
    segmented = (await client.post("/segment", content=PICTURE)).json()["results"][0]
    response = await client.post(INFER, json=files(PICTURE, id="a"))
    answer = response.json()
    assert (answer["model_name"], answer["model_version"]) == ("blobs", "1")
    assert answer["id"] == "a"
    outputs = {o["name"]: o["data"] for o in answer["outputs"]}
    instances = segmented["instances"]
    assert outputs["scores"] == [i["score"] for i in instances]
    assert outputs["category_ids"] == [i["category_id"] for i in instances] == [10, 30]
    assert outputs["rle"] == [i["segmentation"]["counts"] for i in instances]
    tensors = tensors_of(response)
    assert tensors["bbox"].tolist() == [i["bbox"] for i in instances]
    assert tensors["image_hw"].tolist() == [[48, 64]]
    assert tensors["error"].tolist() == [""]


@pytest.mark.parametrize("binary", [False, True])
async def test_pixels_give_the_answer_of_their_file(
    client: httpx.AsyncClient, binary: bool
) -> None:
    tensor: dict[str, Any] = {"name": "image", "datatype": "UINT8", "shape": [48, 64, 3]}
    if binary:
        tensor["parameters"] = {"binary_data_size": RED_AND_BLUE.size}
        text = json.dumps({"inputs": [tensor]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(text))}
        body = text + RED_AND_BLUE.tobytes()
        response = await client.post(INFER, content=body, headers=headers)
    else:
        tensor["data"] = RED_AND_BLUE.tolist()
        response = await client.post(INFER, json={"inputs": [tensor]})
    expected = await client.post(INFER, json=files(PICTURE))
    assert response.json() == expected.json()


async def test_binary_outputs_follow_the_json(client: httpx.AsyncClient) -> None:
    request = files(PICTURE, parameters={"binary_data_output": True}, outputs=[{"name": "rle"}])
    response = await client.post(INFER, json=request)
    json_bytes = int(response.headers["inference-header-content-length"])
    assert response.headers["content-type"] == "application/octet-stream"
    (output,) = json.loads(response.content[:json_bytes])["outputs"]
    assert output["parameters"]["binary_data_size"] == len(response.content) - json_bytes
    (length,) = struct.unpack_from("<I", response.content, json_bytes)
    segmented = (await client.post("/segment", content=PICTURE)).json()["results"][0]
    first = response.content[json_bytes + 4 : json_bytes + 4 + length].decode()
    assert first == segmented["instances"][0]["segmentation"]["counts"]


async def test_parameters_are_obeyed(client: httpx.AsyncClient) -> None:
    async def count(**parameters: float) -> int:
        response = await client.post(INFER, json=files(PICTURE, parameters=parameters))
        return len(tensors_of(response)["scores"])

    assert await count() == 2
    assert await count(max_instances=1) == 1
    assert await count(score_threshold=0.96) == 1


async def test_of_several_images_a_bad_one_has_an_error(client: httpx.AsyncClient) -> None:
    response = await client.post(INFER, json=files(PICTURE, b"no image", b"", PICTURE))
    tensors = tensors_of(response)
    assert tensors["image_index"].tolist() == [0, 0, 3, 3]
    assert tensors["image_hw"].tolist() == [[48, 64], [0, 0], [0, 0], [48, 64]]
    codes = [str(text).partition(":")[0] for text in tensors["error"]]
    assert codes == ["", "unsupported_format", "empty_image", ""]


async def test_an_error_that_nobody_would_see_fails_the_request(client: httpx.AsyncClient) -> None:
    request = files(PICTURE, b"no image", outputs=[{"name": "scores"}])
    status, code, text = error_of(await client.post(INFER, json=request))
    assert (status, code) == (415, "unsupported_format")
    assert text.startswith("image 1: not an image")
    alone = await client.post(INFER, json=files(b"no image"))
    assert error_of(alone)[:2] == (415, "unsupported_format")


async def test_an_engine_failure_harms_only_its_image(client: httpx.AsyncClient) -> None:
    request = files(PICTURE, encode_picture(poisoned_picture()), PICTURE)
    tensors = tensors_of(await client.post("/v2/models/wide/infer", json=request))
    assert tensors["image_index"].tolist() == [0, 0, 2, 2]
    assert str(tensors["error"][1]).startswith("engine_error: ")


async def test_errors_are_those_of_the_protocol(client: httpx.AsyncClient) -> None:
    request = files(PICTURE)
    for path, status, code in (
        ("/v2/models/cats/infer", 404, "unknown_model"),
        ("/v2/models/broken/infer", 503, "model_unavailable"),
        ("/v2/models/blobs/versions/2/infer", 404, "unknown_version"),
        ("/v2/models/blobs/versions/new/infer", 422, "invalid_parameter"),
        ("/v2/models/blobs/guess", 404, "not_found"),
    ):
        assert error_of(await client.post(path, json=request))[:2] == (status, code)
    assert (await client.post("/v2/models/blobs/versions/1/infer", json=request)).is_success
    assert error_of(await client.get(INFER))[:2] == (405, "method_not_allowed")
    assert error_of(await client.post(INFER))[:2] == (400, "empty_body")
    for headers, status, code in (
        ({"content-encoding": "gzip"}, 415, "unsupported_encoding"),
        ({"inference-header-content-length": "999"}, 400, "invalid_request"),
        ({"inference-header-content-length": "x"}, 422, "invalid_parameter"),
        ({"inference-header-content-length": "0"}, 422, "invalid_parameter"),
    ):
        assert error_of(await client.post(INFER, content=b"{}", headers=headers))[:2] == (
            status,
            code,
        )


async def test_too_many_images_or_pixels_are_refused(
    settings: Settings, open_client: OpenClient
) -> None:
    small = settings.model_copy(update={"max_image_pixels": 3000})
    app = create_app(small, load_repository(small.model_repo, OPTIONS))
    image = {"name": "image", "datatype": "BYTES", "shape": [300], "data": ["AAAA"] * 300}
    pixels = {
        "name": "image",
        "datatype": "UINT8",
        "shape": [48, 64, 3],
        "data": RED_AND_BLUE.reshape(-1).tolist(),
    }
    async with open_client(app) as client:
        response = await client.post(INFER, json={"inputs": [image]})
        assert error_of(response)[:2] == (413, "too_many_images")
        response = await client.post(INFER, json={"inputs": [pixels]})
        assert error_of(response)[:2] == (413, "image_too_large")
        assert "64x48 px" in error_of(response)[2]


@pytest.mark.parametrize("header", [False, True])
async def test_a_deadline_that_passes_is_504(
    settings: Settings, open_client: OpenClient, header: bool
) -> None:
    patient = settings.model_copy(update={"max_delay_ms": 10_000.0})
    app = create_app(patient, load_repository(patient.model_repo, OPTIONS))
    parameters = {} if header else {"timeout": 59_001}
    headers = {"X-Timeout-Ms": "60"} if header else {}
    async with open_client(app) as client:
        request = files(PICTURE, parameters=parameters)
        response = await client.post(INFER, json=request, headers=headers)
        assert error_of(response)[:2] == (504, "deadline_exceeded")
        assert "60 ms" in error_of(response)[2]
        assert app.state.segmenter.admission.images == 0


@pytest.mark.parametrize(
    ("parameters", "priority"),
    [({}, "interactive"), ({"priority": 1}, "interactive"), ({"priority": 2}, "batch")],
)
def test_a_low_priority_is_batch_work(parameters: dict[str, int], priority: str) -> None:
    body = json.dumps(files(PICTURE, parameters=parameters)).encode()
    assert build_options(read_request(body, None, 1)).priority == priority


async def test_a_key_is_asked_for_and_its_share_holds(
    settings: Settings, open_client: OpenClient, tmp_path: Path
) -> None:
    key = add_key(tmp_path / "keys.json", "shop", canvases_per_minute=2)
    closed = settings.model_copy(update={"keys_file": tmp_path / "keys.json"})
    app = create_app(closed, load_repository(closed.model_repo, OPTIONS))
    async with open_client(app) as client:
        assert error_of(await client.post(INFER, json=files(PICTURE)))[0] == 401
        headers = {"X-API-Key": key}
        assert (await client.post(INFER, json=files(PICTURE, PICTURE), headers=headers)).is_success
        refused = await client.post(INFER, json=files(PICTURE), headers=headers)
        assert error_of(refused)[:2] == (429, "quota_exceeded")
        assert int(refused.headers["retry-after"]) > 0


async def test_a_draining_server_takes_nothing(app: FastAPI, client: httpx.AsyncClient) -> None:
    app.state.segmenter.admission.close()
    response = await client.post(INFER, json=files(PICTURE))
    assert error_of(response)[:2] == (503, "draining")
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    "version", ["01", "%2B1", "%201", "1%20", "1%0A", "1.0", "1_", "0", "-1", "%D9%A1", "9" * 5000]
)
async def test_a_version_has_one_spelling(client: httpx.AsyncClient, version: str) -> None:
    path = f"/v2/models/blobs/versions/{version}"
    for answer in (
        await client.get(path),
        await client.get(f"{path}/ready"),
        await client.post(f"{path}/infer", json=files(PICTURE)),
        await client.post(f"/segment?version={version}", content=PICTURE),
    ):
        assert answer.status_code == 422
        assert "invalid_parameter" in answer.text
        assert "version: a version is a whole number from 1" in answer.text


async def test_a_version_beyond_all_others_is_unknown(client: httpx.AsyncClient) -> None:
    answer = await client.get(f"/v2/models/blobs/versions/{10**18}")
    assert error_of(answer)[:2] == (404, "unknown_version")
