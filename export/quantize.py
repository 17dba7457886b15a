"""int8 graphs for the CPU in QDQ format, by ONNX Runtime's static quantisation.

Only convolutions are quantised: activations to uint8 per tensor, weights to int8 per channel with
7 bits (`reduce_range`), because on CPUs with AVX2 but without VNNI the sum of two 8-bit products
saturates in 16 bits. The convolutions of the category logits stay float32, as in
`export.precision`: they are small, and the ranking depends on them.

Calibration uses the minimum and maximum of each activation over images of a training split,
preprocessed as by the server. The histogram methods keep all activations of all images in memory
and did not improve the AP (docs/precision.md).
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


def sample_calibration(
    data: CocoDataset, spec: InputSpec, count: int = CALIBRATION_IMAGES
) -> list[Case]:
    """One random canvas from each of up to `count` random images."""
    rng = np.random.default_rng(0)
    cases = []
    for index in rng.permutation(len(data))[:count]:
        tiles = prepare(data.image(int(index)), spec).tiles
        tile = tiles[int(rng.integers(len(tiles)))]
        cases.append(Case("data", tile.image[None], np.array([tile.valid_hw], np.int64)))
    return cases


def require_disjoint(calibration: CocoDataset, evaluation: CocoDataset) -> None:
    """Checks that calibration and evaluation have no images in common.

    Raises:
        ExportError: They do; the message has their number and an example.
    """
    files = {record.file_name for record in calibration.records}
    shared = sorted(files & {record.file_name for record in evaluation.records})
    if shared:
        raise ExportError(
            f"{len(shared)} images of {evaluation.annotation_file.name} are also in "
            f"{calibration.annotation_file.name}, for example {shared[0]}; int8 must not be "
            "calibrated on evaluation images"
        )


def quantize(graph: bytes, cases: Sequence[Case]) -> bytes:
    """Quantises a float32 graph; inputs and outputs keep their types.

    Args:
        graph: From `build_onnx`.
        cases: Calibration canvases.

    Raises:
        ExportError: `cases` is empty, or the quantisation fails.
        GraphError: The result is invalid.
    """
    if not cases:
        raise ExportError("int8 requires calibration images, there are none")
    source = onnx.load_from_string(graph)
    low = choose_low_values(source)
    convs = [n for n in source.graph.node if n.op_type == "Conv"]
    with tempfile.TemporaryDirectory() as name:
        given, made = Path(name) / "fp32.onnx", Path(name) / "int8.onnx"
        given.write_bytes(graph)
        logging.disable(logging.WARNING)  # it recommends preprocessing that our graphs do not need
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
    """Feeds cases to `quantize_static`."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._cases: Iterator[Case] = iter(cases)

    def get_next(self) -> dict[str, Any] | None:
        """The next batch by input name; None after the last."""
        case = next(self._cases, None)
        return None if case is None else {"images": case.images, "valid_hw": case.valid_hw}
