"""CVAT's auto-annotation function: `cvat-cli task auto-annotate` and CVAT's agents run it.

cvat-cli task auto-annotate TASK --function-file integrations/cvat_auto.py -p url=str:http://localhost:8000
"""

from __future__ import annotations

from typing import Any

import cvat_sdk.auto_annotation as cvataa
import PIL.Image
from cvat_sdk import models
from cvat_sdk.masks import encode_mask

from solo_client import Client


class SoloFunction:
    """Segments the frames of a task; the classes of the model are the labels.

    Args:
        url: Address of solo-serve.
        model: Name of a model; "" for the server's default.
        api_key: Key of solo-serve; "" for none.
    """

    def __init__(self, url: str, model: str = "", api_key: str = "") -> None:
        self._client = Client(url, api_key=api_key or None)
        self._model = model or None
        name = model or self._only_model()
        labels = self._client.describe_model(name)["classes"]
        self._spec = cvataa.DetectionFunctionSpec(
            labels=[
                cvataa.label_spec(spec["name"], spec["category_id"], type="mask") for spec in labels
            ]
        )

    def _only_model(self) -> str:
        ready = [m["name"] for m in self._client.list_models() if m["state"] == "READY"]
        if len(ready) != 1:
            raise ValueError(
                f"the server has the models {ready}; choose one with -p model=str:NAME"
            )
        return str(ready[0])

    @property
    def spec(self) -> cvataa.DetectionFunctionSpec:
        """The labels."""
        return self._spec

    def detect(
        self, context: cvataa.DetectionFunctionContext, image: PIL.Image.Image
    ) -> list[models.LabeledShapeRequest]:
        """The masks of a frame."""
        options: dict[str, Any] = {"model": self._model, "score_threshold": context.conf_threshold}
        found = self._client.segment(image, **options)
        return [
            cvataa.mask(instance.category_id, encode_mask(instance.mask))
            for instance in found.instances
        ]


create = SoloFunction
