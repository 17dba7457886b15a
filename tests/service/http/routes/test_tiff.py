"""TIFF, DICOM, OME-Zarr and JPEG 2000 over HTTP: planes, size of a pixel, pictures for browsers."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.http.app import create_app
from service.models.repository import load_repository
from service.settings import Settings
from tests.service.conftest import OPTIONS, OpenClient
from tests.support import zarr_files
from tests.support.blob_model import draw_picture, encode_picture, publish
from tests.support.dicom_files import build, build_slide, save

tifffile = pytest.importorskip("tifffile", reason="needs the extra science")

RED = draw_picture(48, 64, {"red": (4, 8, 12, 16)})
STACK = np.stack([np.zeros((48, 64), np.uint16), 4 * RED[..., 0].astype(np.uint16)])


def write(pixels: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


OME = write(STACK, ome=True, metadata={"axes": "CYX", "Channel": {"Name": ["empty", "cells"]}})


def sized(um_per_px: float) -> bytes:
    metadata = {"PhysicalSizeX": um_per_px, "PhysicalSizeY": um_per_px}
    return write(RED, photometric="rgb", ome=True, metadata=metadata)


@pytest.fixture
async def blobs(
    settings: Settings, open_client: OpenClient, tmp_path: Path
) -> AsyncIterator[httpx.AsyncClient]:
    root = tmp_path / "sized"
    publish(root, "blobs", card={"um_per_px": 0.5, "object_size_px": 16})
    publish(root, "unsized")
    given = settings.model_copy(update={"model_repo": root, "default_model": "blobs"})
    async with open_client(create_app(given, load_repository(root, OPTIONS))) as client:
        yield client


async def ask(client: httpx.AsyncClient, data: bytes, query: str = "") -> dict[str, Any]:
    answer = await client.post(f"/segment?{query}", content=data)
    assert answer.status_code == 200, answer.text
    (result,) = answer.json()["results"]
    return dict(result)


async def test_a_tiff_is_answered_as_the_same_png(blobs: httpx.AsyncClient) -> None:
    expected = await ask(blobs, encode_picture(RED))
    assert len(expected["instances"]) == 1
    assert await ask(blobs, write(RED, photometric="rgb", compression="zlib")) == expected


async def test_a_dicom_is_answered_as_the_same_png(blobs: httpx.AsyncClient) -> None:
    expected = await ask(blobs, encode_picture(RED))
    assert await ask(blobs, save(build(RED), rle=True)) == expected
    expected |= {"um_per_px": 0.5}
    assert await ask(blobs, save(build_slide(RED, (16, 32), um_per_px=0.5))) == expected


async def test_a_jpeg_2000_is_answered_as_the_same_png(blobs: httpx.AsyncClient) -> None:
    buffer = io.BytesIO()
    Image.fromarray(RED).save(buffer, "JPEG2000")
    assert await ask(blobs, buffer.getvalue()) == await ask(blobs, encode_picture(RED))


async def test_a_zip_of_an_ome_zarr_is_answered_as_the_same_png(
    blobs: httpx.AsyncClient, tmp_path: Path
) -> None:
    pixels = np.moveaxis(RED, -1, 0)
    folder = zarr_files.write(tmp_path / "a.zarr", pixels, "cyx", version="0.5", um_per_px=0.5)
    expected = await ask(blobs, encode_picture(RED)) | {"um_per_px": 0.5}
    assert await ask(blobs, zarr_files.pack(zarr_files.read_files(folder))) == expected
    answer = await blobs.post("/segment", content=zarr_files.pack({"a.txt": b"a"}))
    assert answer.status_code == 415 and "OME-Zarr" in answer.json()["error"]["message"]
    sized = await ask(blobs, save(build(RED, PixelSpacing=[0.0005, 0.0005])))
    assert sized["um_per_px"] == pytest.approx(0.5)
    frames = save(build(STACK, frames=2))
    assert len((await ask(blobs, frames, "z=1"))["instances"]) == 3
    answer = await blobs.post("/segment", content=frames)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_plane")
    answer = await blobs.post("/segment", content=save(build(RED, SamplesPerPixel=4)))
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_format")


async def test_planes_are_parameters(blobs: httpx.AsyncClient) -> None:
    found = await ask(blobs, OME, "channel=cells")
    assert [i["bbox"] for i in found["instances"]] == [[4, 8, 12, 16]] * 3  # grey: three colours
    assert (await ask(blobs, OME, "channel=0&z=max"))["instances"] == []
    form = await blobs.post("/segment", files={"images": OME}, data={"channel": "1", "z": "0"})
    assert len(form.json()["results"][0]["instances"]) == 3
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
    body = {
        "inputs": [{**tensor, "data": [base64.b64encode(OME).decode()]}],
        "parameters": {"channel": "cells"},
    }
    answer = await blobs.post("/v2/models/blobs/infer", json=body)
    (scores,) = [o for o in answer.json()["outputs"] if o["name"] == "scores"]
    assert scores["shape"] == [3]


@pytest.mark.parametrize(
    ("query", "code", "message"),
    [
        ("", "invalid_plane", "has 2 channels (choose one with channel=: 0: 'empty', 1: 'cells')"),
        ("channel=dapi", "invalid_plane", "channel='dapi': the image has 2 channels"),
        ("channel=1&z=3", "invalid_plane", "z=3: the image has 1 planes"),
        ("z=-1", "invalid_parameter", "z"),
        ("z=top", "invalid_parameter", "z"),
        ("t=1.5", "invalid_parameter", "t"),
    ],
)
async def test_what_is_missing_or_wrong_is_named(
    blobs: httpx.AsyncClient, query: str, code: str, message: str
) -> None:
    answer = await blobs.post(f"/segment?{query}", content=OME)
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == code and message in answer.json()["error"]["message"]


async def test_the_files_size_of_a_pixel_scales_the_image(blobs: httpx.AsyncClient) -> None:
    found = await ask(blobs, sized(0.25))
    given = await ask(blobs, encode_picture(RED), "um_per_px=0.25")
    assert (found.pop("um_per_px"), found["scale"]) == (0.25, 0.5)
    assert found == given
    assert (await ask(blobs, sized(0.25), "um_per_px=0.5"))["scale"] == 1
    assert (await ask(blobs, sized(0.25), "object_size_px=8"))["scale"] == 2
    plain = await ask(blobs, sized(0.25), "model=unsized")
    assert (plain["scale"], plain["um_per_px"]) == (1, 0.25)
    answer = await blobs.post("/segment", content=sized(0.01))
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "pixel_size"
    assert "0.01 is not in 0.125 to 2" in answer.json()["error"]["message"]
    assert (await ask(blobs, sized(0.01), "um_per_px=0.5"))["scale"] == 1


async def test_the_decoded_picture_can_be_asked_for(blobs: httpx.AsyncClient) -> None:
    found = await ask(blobs, OME, "channel=cells&picture=true")
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["picture_png"]))))
    np.testing.assert_array_equal(picture[..., 1], RED[..., 0])
    assert "picture_png" not in await ask(blobs, OME, "channel=cells")
    answer = await blobs.post(
        "/segment?channel=cells", content=OME, headers={"accept": "image/png"}
    )
    assert Image.open(io.BytesIO(answer.content)).size == (64, 48)


async def test_a_bad_tiff_among_others_has_its_own_error(blobs: httpx.AsyncClient) -> None:
    files = [("images", OME), ("images", encode_picture(RED)), ("images", OME[:200])]
    results = (await blobs.post("/segment?channel=1", files=files)).json()["results"]
    assert len(results[0]["instances"]) == 3
    assert results[1]["error"]["code"] == "invalid_plane"
    assert results[2]["error"]["code"] == "corrupt_image"
