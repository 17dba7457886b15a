"""CVAT's functions and the one of napari, without their servers and windows."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from integrations.cvat_nuclio import main
from integrations.napari_solo import segment_to_labels
from solo_client import Client
from tests.integrations.conftest import PICTURE, PIXELS
from tests.support.server import ROOT, ServerProcess

FOLDER = Path(ROOT) / "integrations"


def test_nuclio_answers_with_masks_in_their_boxes(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLO_URL", server.url)
    context: Any = SimpleNamespace(
        user_data=SimpleNamespace(),
        logger=SimpleNamespace(info=lambda text: None),
        Response=lambda **fields: SimpleNamespace(**fields),
    )
    main.init_context(context)
    content = {"image": base64.b64encode(PICTURE).decode(), "threshold": 0.5}
    for body in (content, json.dumps(content)):
        answer = main.handler(context, SimpleNamespace(body=body))
        assert (answer.status_code, answer.content_type) == (200, "application/json")
        red, blue = json.loads(answer.body)
        assert (red["label"], red["type"], red["points"]) == ("red", "mask", [4, 8, 15, 23])
        assert red["mask"] == [1] * 192 + [4, 8, 15, 23]
        assert 0.5 <= float(blue["confidence"]) <= 1


def test_the_description_for_nuclio_names_the_handler() -> None:
    content = yaml.safe_load((FOLDER / "cvat_nuclio" / "function.yaml").read_text())
    module, _, function = content["spec"]["handler"].partition(":")
    assert (FOLDER / "cvat_nuclio" / f"{module}.py").is_file() and hasattr(main, function)
    (label,) = json.loads(content["metadata"]["annotations"]["spec"])
    assert label["type"] == "mask"


@pytest.mark.parametrize("pixels", [PIXELS, PIXELS[..., 0], PIXELS[..., 0].astype(np.uint16)])
def test_napari_gets_a_label_image(server: ServerProcess, pixels: np.ndarray) -> None:
    labels = segment_to_labels(pixels, server.url)
    assert labels.shape == (48, 64) and labels.dtype == np.uint16
    assert labels[9, 5] > 0


def test_cvat_sdk_gets_masks(server: ServerProcess) -> None:
    pytest.importorskip("cvat_sdk", reason="cvat-sdk is not installed")
    from cvat_sdk.masks import decode_mask

    from integrations.cvat_auto import create

    function = create(server.url)
    assert [(label.id, label.name) for label in function.spec.labels] == [
        *((10, "red"), (20, "green"), (30, "blue")),
    ]
    context: Any = SimpleNamespace(conf_threshold=0.3, frame_name="a.png", conv_mask_to_poly=False)
    shapes = function.detect(context, Image.fromarray(PIXELS))
    with Client(server.url) as client:
        found = client.segment(PIXELS, score_threshold=0.3)
    assert [shape.label_id for shape in shapes] == found.category_ids.tolist()
    for shape, instance in zip(shapes, found.instances, strict=True):
        drawn = decode_mask(shape.points, image_width=64, image_height=48)
        np.testing.assert_array_equal(drawn, instance.mask)
