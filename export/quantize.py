"""int8 for the CPU: QDQ graphs by ONNX Runtime's static quantisation.

Convolutions alone are quantised: activations uint8 for the tensor, weights int8 for each channel
and of 7 bits (`reduce_range`), because CPUs with AVX2 but no VNNI add two products in 16 bits and
saturate with 8. The convolutions that make the category logits stay float32, as in
`export.precision`: they are small, and all ranking rests on them.

The ranges come from images of a training split, prepared as the server prepares them, as the
smallest and largest value seen: the histogram methods keep every activation of every image in
memory, and did not give a better AP (docs/precision.md).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from export.errors import ExportError
from export.onnx_graph import check_graph
from export.parity import Case
from export.precision import choose_low_values, find_opset
from pipeline.model_config import InputSpec
from pipeline.preprocess import prepare
from training.data.coco import CocoDataset

CALIBRATION_IMAGES = 64


def draw_calibration(
    data: CocoDataset, spec: InputSpec, count: int = CALIBRATION_IMAGES, *, seed: int = 0
) -> list[Case]:
    """One random canvas of each of `count` random images, or of all if there are fewer."""
    rng = np.random.default_rng(seed)
    cases = []
    for index in rng.permutation(len(data))[:count]:
        tiles = prepare(data.image(int(index)), spec).tiles
        tile = tiles[int(rng.integers(len(tiles)))]
        cases.append(Case("data", tile.image[None], np.array([tile.valid_hw], np.int64)))
    return cases


def require_apart(calibration: CocoDataset, evaluation: CocoDataset) -> None:
    """Refuses a calibration with images that are evaluated afterwards.

    Raises:
        ExportError: Says how many and names one.
    """
    files = {record.file_name for record in calibration.records}
    shared = sorted(files & {record.file_name for record in evaluation.records})
    if shared:
        raise ExportError(
            f"{len(shared)} images of {evaluation.annotation_file.name} are also in "
            f"{calibration.annotation_file.name}, for example {shared[0]}; int8 must not be "
            "calibrated on what it is evaluated on"
        )


def quantize(graph: bytes, cases: Sequence[Case]) -> bytes:
    """The int8 graph of a float32 graph; inputs and outputs stay as they are.

    Args:
        graph: Of `build_onnx`.
        cases: Canvases for the calibration.

    Raises:
        ExportError: There are no canvases, or the quantisation fails.
        GraphError: The result is not valid.
    """
    if not cases:
        raise ExportError("int8 needs images for its calibration, there are none")
    source = onnx.load_from_string(graph)
    low = choose_low_values(source)
    convs = [n for n in source.graph.node if n.op_type == "Conv"]
    with tempfile.TemporaryDirectory() as name:
        given, made = Path(name) / "fp32.onnx", Path(name) / "int8.onnx"
        given.write_bytes(graph)
        logging.disable(logging.WARNING)  # it advises a preparation that our graphs do not need
        try:
            quantize_static(
                given,
                made,
                _Reader(cases),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=[n.name for n in convs if n.output[0] in low],
                calibrate_method=CalibrationMethod.MinMax,
            )
        except Exception as error:  # the library's exceptions have no common base
            raise ExportError(f"the quantisation failed: {error}") from error
        finally:
            logging.disable(logging.NOTSET)
        model = onnx.load(made)
    model.producer_name = source.producer_name
    model.ClearField("producer_version")
    model.graph.ClearField("value_info")
    check_graph(model, find_opset(source))
    return bytes(model.SerializeToString(deterministic=True))


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Canvases in the form that the library asks for."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._cases: Iterator[Case] = iter(cases)

    def get_next(self) -> dict[str, Any] | None:
        """The next batch; None after the last."""
        case = next(self._cases, None)
        return None if case is None else {"images": case.images, "valid_hw": case.valid_hw}
