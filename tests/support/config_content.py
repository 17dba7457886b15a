"""The content of a config.json, of one model with one version."""

from __future__ import annotations

from typing import Any

FILES = {"model.onnx": {"sha256": "a" * 64, "bytes": 10}}


def config_content(**changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "schema_version": 1,
        "name": "nuclei",
        "input": {"resize": {"rule": "keep_ratio", "short_side": 800, "long_side": 1333}},
        "classes": [{"category_id": 1, "name": "nucleus"}],
        "candidates": 500,
        "mask_stride": 4,
        "postprocess": {"nms": {"kind": "mask", "iou_threshold": 0.5}},
        "versions": {"1": {"files": FILES}},
    }
    return {**content, **changes}
