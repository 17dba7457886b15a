"""The unmodified tritonclient against the real server."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from pycocotools import mask as coco_mask

from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.server import ServerProcess, run_server

BOXES = {"red": (4, 8, 12, 16), "blue": (30, 30, 10, 10)}
PIXELS = draw_picture(48, 64, BOXES)
FILE = encode_picture(PIXELS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("repo")
    publish(root)
    log = tmp_path_factory.mktemp("log") / "server.log"
    flags = ("--device", "cpu", "--threads", "1", "--pool-threads", "1")
    with run_server(log, "--model-repo", str(root), *flags) as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Any]:
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as opened:
        yield opened


def files_input(files: list[bytes], *, binary: bool) -> Any:
    tensor = triton.InferInput("image", [len(files)], "BYTES")
    sent = files if binary else [base64.b64encode(file) for file in files]
    return tensor.set_data_from_numpy(np.array(sent, np.object_), binary_data=binary)


def pixels_input(*, binary: bool) -> Any:
    tensor = triton.InferInput("image", list(PIXELS.shape), "UINT8")
    return tensor.set_data_from_numpy(PIXELS, binary_data=binary)


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("blobs")
    assert client.is_model_ready("blobs", "1")
    assert not client.is_model_ready("blobs", "2")
    assert not client.is_model_ready("cats")
    assert client.get_server_metadata()["name"] == "solo-serve"
    metadata = client.get_model_metadata("blobs", "1")
    assert metadata["versions"] == ["1"]
    assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert {o["name"]: o["datatype"] for o in metadata["outputs"]}["rle"] == "BYTES"


@pytest.mark.parametrize("binary_out", [False, True, None])
@pytest.mark.parametrize("binary_in", [False, True])
@pytest.mark.parametrize("kind", ["files", "pixels"])
def test_inference(client: Any, kind: str, binary_in: bool, binary_out: bool | None) -> None:
    tensor = (
        files_input([FILE], binary=binary_in) if kind == "files" else pixels_input(binary=binary_in)
    )
    names = ("rle", "scores", "bbox", "category_ids", "image_index", "image_hw", "error")
    outputs = None  # then tritonclient asks for all of them, binary
    if binary_out is not None:
        outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in names]
    result = client.infer("blobs", [tensor], request_id="r7", outputs=outputs)
    assert result.get_response()["id"] == "r7"
    assert result.as_numpy("scores").dtype == np.float32
    assert result.as_numpy("category_ids").tolist() == [10, 30]
    assert result.as_numpy("bbox").tolist() == [list(box) for box in BOXES.values()]
    assert result.as_numpy("image_index").tolist() == [0, 0]
    ((height, width),) = result.as_numpy("image_hw").tolist()
    for counts, (x, y, w, h) in zip(result.as_numpy("rle"), BOXES.values(), strict=True):
        mask = coco_mask.decode({"size": [height, width], "counts": counts})
        assert mask.shape == (48, 64)
        assert mask[y : y + h, x : x + w].all()
        assert mask.sum() == w * h


def test_several_images_and_bounds(client: Any) -> None:
    tensor = files_input([FILE, b"no image", FILE], binary=True)
    parameters = {"max_instances": 1, "score_threshold": 0.2}
    result = client.infer("blobs", [tensor], model_version="1", parameters=parameters)
    assert result.as_numpy("image_index").tolist() == [0, 2]
    error = result.as_numpy("error").tolist()
    assert error[0] == error[2] == b""
    assert error[1].startswith(b"unsupported_format")


def test_nothing_found_has_shapes(client: Any) -> None:
    tensor = files_input([FILE], binary=True)
    result = client.infer("blobs", [tensor], parameters={"score_threshold": 1.0})
    assert result.as_numpy("bbox").shape == (0, 4)
    assert result.as_numpy("rle").shape == (0,)


def test_priority_and_timeout(client: Any) -> None:
    tensor = files_input([FILE], binary=True)
    result = client.infer("blobs", [tensor], priority=2, timeout=60_000_000)
    assert len(result.as_numpy("scores")) == 2
    with pytest.raises(triton.InferenceServerException, match="within 1 ms") as caught:
        client.infer("blobs", [tensor], timeout=1)
    assert caught.value.status() == "504"


@pytest.mark.parametrize(
    ("model", "tensors", "status", "text"),
    [
        ("cats", [files_input([FILE], binary=True)], "404", "there is no model 'cats'"),
        ("blobs", [files_input([b"no image"], binary=True)], "415", "not an image"),
        ("blobs", [files_input([FILE], binary=True)] * 2, "422", "inputs"),
    ],
)
def test_errors_arrive_as_texts(
    client: Any, model: str, tensors: list[Any], status: str, text: str
) -> None:
    with pytest.raises(triton.InferenceServerException, match=text) as caught:
        client.infer(model, tensors)
    assert caught.value.status() == status
    assert isinstance(caught.value.message(), str)


def test_compression_is_refused_with_a_reason(client: Any) -> None:
    tensor = files_input([FILE], binary=True)
    with pytest.raises(triton.InferenceServerException, match="Content-Encoding 'gzip'"):
        client.infer("blobs", [tensor], request_compression_algorithm="gzip")
    assert client.infer("blobs", [tensor], response_compression_algorithm="gzip")


def test_requests_at_once(client: Any, server: ServerProcess) -> None:
    address = server.url.removeprefix("http://")
    with triton.InferenceServerClient(address, concurrency=8) as several:
        tensor = files_input([FILE], binary=True)
        waiting = [several.async_infer("blobs", [tensor]) for _ in range(24)]
        results = [request.get_result() for request in waiting]
    expected = client.infer("blobs", [tensor])
    for result in results:
        assert (result.as_numpy("rle") == expected.as_numpy("rle")).all()
        assert (result.as_numpy("scores") == expected.as_numpy("scores")).all()
