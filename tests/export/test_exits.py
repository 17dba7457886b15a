from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export.config_json import describe_file
from export.errors import ParityError
from export.exits import PLAIN_FILES, build_exits, require_identical
from export.parity import Case, build_cases
from pipeline.decode import decode_image
from pipeline.model_config import ModelConfig
from pipeline.preprocess import prepare
from service.models.repository import read_config
from tests.support.tiny_graph import exported

ROOT = Path(__file__).resolve().parents[2]
NUCLEI = ROOT / "model_repo" / "nuclei"
IMAGES = ROOT / "tests" / "data" / "nuclei" / "images"


@pytest.fixture(scope="module")
def plain() -> bytes:
    return exported("decoupled", "paper", 20)[1]


def cases() -> list[Case]:
    return list(build_cases([(64, 96)], (1, 3)))


def bundled() -> ModelConfig:
    return read_config(NUCLEI, None)


def test_a_graph_and_its_report_are_built(plain: bytes) -> None:
    (made,) = build_exits(bundled(), {"model.onnx": plain}, cases(), {"commit": "abc"})
    assert (made.name, made.parity_name) == ("model.exits.onnx", "parity.exits.json")
    assert made.parity["graph"] == describe_file(made.data) != describe_file(plain)
    assert made.parity["reference"] == describe_file(plain)
    assert made.parity["commit"] == "abc"
    found = made.parity["comparison"]
    assert found["identical"] and found["canvases"] == 8 and found["candidates"] > 100


def test_any_different_bit_is_rejected(plain: bytes) -> None:
    model = onnx.load_from_string(plain)
    name = "network.head.mask_out_x.0.weight"
    weight = next(w for w in model.graph.initializer if w.name == name)
    values = np.nextafter(numpy_helper.to_array(weight), np.float32(1))
    weight.CopyFrom(numpy_helper.from_array(values, name))
    with pytest.raises(ParityError, match=r"batch 0 \(noise\) has different candidates: "):
        require_identical(plain, model.SerializeToString(), cases())


def test_no_candidates_is_an_error(plain: bytes) -> None:
    with pytest.raises(ParityError, match="no candidate was found on the test images"):
        require_identical(plain, plain, [])


@pytest.mark.parametrize("file", PLAIN_FILES)
def test_the_bundled_graphs_give_the_same_bits_on_images_with_and_without_nuclei(
    file: str,
) -> None:
    config = bundled()
    version = NUCLEI / str(config.version)
    plain, exits = ((version / name).read_bytes() for name in (file, PLAIN_FILES[file]))
    assert describe_file(exits) == config.files[PLAIN_FILES[file]].model_dump()
    content = (IMAGES / "b7a86f4968071e0f.jpg").read_bytes()
    tiles = list(prepare(decode_image(content), config.input).tiles[:2])
    crowded = (IMAGES / "9bb6e39d5f4415bc.jpg").read_bytes()
    tiles += prepare(decode_image(crowded), config.input).tiles[4:5]
    images = np.stack([np.full_like(tiles[0].image, 20), *(tile.image for tile in tiles)])
    valid_hw = np.array([images.shape[1:3], *(tile.valid_hw for tile in tiles)], np.int64)
    batches = [Case("data", images[:1], valid_hw[:1]), Case("data", images, valid_hw)]
    found = require_identical(plain, exits, batches)
    assert found["candidates"] > 100
    with pytest.raises(ParityError, match="no candidate was found"):
        require_identical(plain, exits, batches[:1])
