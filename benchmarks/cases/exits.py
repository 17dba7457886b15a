"""Graphs with early exits beside the plain ones, on the CPU.

The bundled model, float32 and int8, on all canvases of a folder's images, one by one and in
batches; and SOLO-512 R50 with random weights that find no candidate, about 100, or as many as there
are slots. Both graphs run on each batch and must give the same candidates bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.cases.model import build_subject
from benchmarks.harness import BenchmarkError
from benchmarks.harness.report import Report, Row
from benchmarks.harness.rounds import Samples, time_once
from benchmarks.inputs import IMAGES, NUCLEI
from benchmarks.ours import open_session, read_model
from export.exit_graph import add_exits
from export.exits import PLAIN_FILES, compare_bits
from export.onnx_graph import build_onnx
from pipeline.decode import decode_image
from pipeline.model_config import ModelConfig
from pipeline.preprocess import prepare
from service.engines.base import collate, split_batch

PLAIN, EXITS = "plain", "exits"
BIAS = "network.head.category_out.bias"
NAMES = ("scores", "labels", "mask_probs")
BIAS_CHANGES = {"no candidate": -30.0, "about 100 candidates": 0.0, "every slot filled": 3.0}
"""What is added to the category logits of a network that finds 100 candidates."""
Feeds = dict[str, NDArray[Any]]
Found = tuple[Samples, list[float]]
ModelName = Literal["nuclei", "solo_512_r50"]


def exits(
    *,
    models: Annotated[tuple[ModelName, ...], "what is run"] = ("nuclei", "solo_512_r50"),
    images: Annotated[Path, "folder of JPEG images for nuclei"] = IMAGES,
    batches: Annotated[tuple[int, ...], "for nuclei"] = (1, 8),
    rounds: Annotated[int, "for SOLO-512"] = 3,
    threads: Annotated[int, "of an engine call"] = 1,
) -> Report:
    found: dict[str, Found] = {}
    if "nuclei" in models:
        found |= dict(measure_nuclei(images, batches, threads))
    if "solo_512_r50" in models:
        found |= dict(measure_solo(rounds, threads))
    rows = {title: summarise(*one) for title, one in found.items()}
    data = {
        "threads": threads,
        "rows": {
            title: {
                **{f"{side}_cpu_s": values["cpu_s"] for side, values in samples.values.items()},
                "empty_share": empty,
            }
            for title, (samples, empty) in found.items()
        },
    }
    return Report(data=data, tables={"": [{"graph": t, **row} for t, row in rows.items()]})


class Pair:
    """A plain graph and the same one with exits."""

    def __init__(self, plain: bytes, exits: bytes, threads: int) -> None:
        model = onnx.load_from_string(exits)
        levels = sum(node.op_type == "If" for node in model.graph.node)
        self._needs = [f"exits/need{level}" for level in range(levels)]
        for name in self._needs:  # counted beside the run; they cost nothing
            output = helper.make_tensor_value_info(name, TensorProto.BOOL, None)
            model.graph.output.append(output)
        self._plain = open_session(plain, threads)
        self._exits = open_session(model.SerializeToString(), threads)

    def run(self, feeds: Feeds) -> tuple[dict[str, dict[str, float]], list[NDArray[np.bool_]]]:
        """Costs of both, and for each level which canvases had a candidate there.

        Raises:
            BenchmarkError: The candidates differ.
        """
        outputs: dict[str, Any] = {}

        def run_plain() -> None:
            outputs[PLAIN] = self._plain.run(NAMES, feeds)

        def run_exits() -> None:
            outputs[EXITS] = self._exits.run([*NAMES, *self._needs], feeds)

        costs = {PLAIN: time_once(run_plain), EXITS: time_once(run_exits)}
        pairs = zip(split_batch(*outputs[PLAIN]), split_batch(*outputs[EXITS][:3]), strict=True)
        if not all(all(compare_bits(one, other)) for one, other in pairs):
            raise BenchmarkError("the graph with early exits gives other candidates")
        return costs, outputs[EXITS][3:]


def measure(pair: Pair, batches: list[Feeds]) -> Found:
    """Both graphs on all batches, and each level's share of canvases without a candidate."""
    pair.run(batches[0])  # warms up
    samples, needs = Samples(), []
    for feeds in batches:
        costs, needed = pair.run(feeds)
        needs.append(needed)
        for side, of_side in costs.items():
            samples.add(side, of_side)
    return samples, [
        1 - float(np.concatenate(of_level).mean()) for of_level in zip(*needs, strict=True)
    ]


def measure_nuclei(
    images: Path, batches: tuple[int, ...], threads: int
) -> Iterator[tuple[str, Found]]:
    """The bundled graphs, which must be published with early exits."""
    config, folder = read_model(NUCLEI)
    for name, exits in PLAIN_FILES.items():
        pair = Pair((folder / name).read_bytes(), (folder / exits).read_bytes(), threads)
        for batch in batches:
            feeds = list(nuclei_batches(config, images, batch))
            yield f"nuclei, {name}, batches of {batch}", measure(pair, feeds)


def nuclei_batches(config: ModelConfig, folder: Path, batch: int) -> Iterator[Feeds]:
    """All canvases of a folder's images; a batch has canvases of one image."""
    for path in sorted(folder.glob("*.jpg")):
        tiles = prepare(decode_image(path.read_bytes()), config.input).tiles
        for start in range(0, len(tiles), batch):
            canvases, valid_hw = collate(tiles[start : start + batch])
            yield {"images": canvases, "valid_hw": valid_hw}


def measure_solo(rounds: int, threads: int) -> Iterator[tuple[str, Found]]:
    """SOLO-512 R50, batch 1."""
    subject = build_subject("solo_512_r50")
    model = onnx.load_from_string(build_onnx(subject.network))
    bias = next(weight for weight in model.graph.initializer if weight.name == BIAS)
    values = numpy_helper.to_array(bias)
    stride = min(subject.config.model.head.mask_strides)
    feeds = {"images": subject.images.numpy(), "valid_hw": subject.valid_hw.numpy()}
    for title, change in BIAS_CHANGES.items():
        bias.CopyFrom(numpy_helper.from_array(values + np.float32(change), BIAS))
        plain = model.SerializeToString()
        pair = Pair(plain, add_exits(plain, stride), threads)
        yield f"solo_512_r50, {title}", measure(pair, [feeds] * rounds)


def summarise(samples: Samples, empty: list[float]) -> Row:
    """A row of the table."""
    sums = {side: sum(values["cpu_s"]) for side, values in samples.values.items()}
    return {
        "levels without candidates": ", ".join(f"{share:.0%}" for share in empty),
        "plain, CPU s a batch": sums[PLAIN] / len(samples.values[PLAIN]["cpu_s"]),
        "with exits": sums[EXITS] / len(samples.values[EXITS]["cpu_s"]),
        "ratio of the sums": sums[EXITS] / sums[PLAIN],
        "ratio (range)": str(samples.ratio(EXITS, PLAIN, "cpu_s")),
    }
