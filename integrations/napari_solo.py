"""A napari widget: segments the selected image layer through a running solo-serve.

In napari's console: `from integrations.napari_solo import add_widget; add_widget(viewer)`.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from solo_client import Client

if TYPE_CHECKING:
    from napari import Viewer


def segment_to_labels(
    pixels: NDArray[Any], url: str = "http://localhost:8000", *, model: str = ""
) -> NDArray[np.uint16]:
    """The label image [H, W] of an image; the value of a pixel is its instance.

    Args:
        pixels: [H, W] or [H, W, 3] uint8, or [H, W] uint16.
        url: Address of solo-serve.
        model: Name of a model; "" for the server's default.

    Raises:
        SoloError: The server cannot segment it.
        TypeError, ValueError: It cannot be sent.
    """
    with Client(url) as client:
        data = client.segment_to_file([np.asarray(pixels)], "labels", model=model or None).data
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image).astype(np.uint16)


def add_widget(viewer: Viewer) -> None:
    """Docks the widget; its button adds a layer of labels."""
    from magicgui import magicgui
    from napari.layers import Image as ImageLayer
    from napari.types import LayerDataTuple

    @magicgui(call_button="Segment")  # type: ignore[untyped-decorator, unused-ignore]
    def segment(
        layer: ImageLayer, url: str = "http://localhost:8000", model: str = ""
    ) -> LayerDataTuple:
        labels = segment_to_labels(layer.data, url, model=model)
        name = f"{layer.name} instances"
        # the last two axes, or those before the colours
        axes = slice(-3, -1) if layer.rgb else slice(-2, None)
        placed = {"name": name, "scale": layer.scale[axes], "translate": layer.translate[axes]}
        return LayerDataTuple((labels, placed, "labels"))

    viewer.window.add_dock_widget(segment, name="solo-serve")
