"""python -m benchmarks.exits: graphs with early exits beside the plain ones, on the CPU.

The bundled model, float32 and int8, on all canvases of a folder's images, one by one and in
batches; and SOLO-512 R50 with random weights that find no candidate, about 100, or as many as
there are slots. Both graphs run on a batch one behind the other and must give the same candidates
bit for bit. Ratios are of CPU time, within a batch, so that whatever else the machine does falls
on both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.model import build_subject
from benchmarks.report import (
    describe_machine,
    markdown_table,
    ratio_quartiles,
    show_quartiles,
    this_command,
    write_report,
)
from benchmarks.worker import ROOT
from export.exit_graph import add_exits
from export.exits import PLAIN_FILES, compare_bits
from export.onnx_graph import build_onnx
from pipeline.decode import decode_image
from pipeline.model_config import ModelConfig
from pipeline.preprocess import prepare
from service.engines.base import collate, split_batch
from service.models.repository import read_config

NUCLEI = ROOT / "model_repo" / "nuclei"
IMAGES = ROOT / "tests" / "data" / "nuclei" / "images"
BIAS = "network.head.category_out.bias"
NAMES = ("scores", "labels", "mask_probs")
BIAS_CHANGES = {"no candidate": -30.0, "about 100 candidates": 0.0, "every slot filled": 3.0}
"""What is added to the category logits of a network that finds 100 candidates."""
Feeds = dict[str, NDArray[Any]]


class Pair:
    """A plain graph and its twin with exits, one thread each unless told otherwise."""

    def __init__(self, plain: bytes, exits: bytes, threads: int) -> None:
        model = onnx.load_from_string(exits)
        levels = sum(node.op_type == "If" for node in model.graph.node)
        self._needs = [f"exits/need{level}" for level in range(levels)]
        for name in self._needs:  # counted beside the run; they cost nothing
            output = helper.make_tensor_value_info(name, TensorProto.BOOL, None)
            model.graph.output.append(output)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._plain, self._exits = (
            ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            for graph in (plain, model.SerializeToString())
        )

    def run(self, feeds: Feeds) -> tuple[float, float, list[NDArray[np.bool_]]]:
        """CPU seconds of both, and of each level which canvases had a candidate there.

        Raises:
            ValueError: The candidates differ.
        """
        start = time.process_time()
        expected = self._plain.run(NAMES, feeds)
        middle = time.process_time()
        found = self._exits.run([*NAMES, *self._needs], feeds)
        end = time.process_time()
        pairs = zip(split_batch(*expected), split_batch(*found[:3]), strict=True)
        for one, other in pairs:
            if not all(compare_bits(one, other)):
                raise ValueError("the graph with early exits gives other candidates")
        return middle - start, end - middle, found[3:]


def measure(pair: Pair, batches: list[Feeds]) -> dict[str, Any]:
    """Both graphs on all batches in turns; the first batch runs once more before, to warm up."""
    pair.run(batches[0])
    laps = [pair.run(feeds) for feeds in batches]
    plain, exits = [lap[0] for lap in laps], [lap[1] for lap in laps]
    empty = [
        1 - float(np.concatenate(rows).mean())
        for rows in zip(*(lap[2] for lap in laps), strict=True)
    ]
    return {
        "batches": len(batches),
        "plain_cpu_s": plain,
        "exits_cpu_s": exits,
        "sum_ratio": sum(exits) / sum(plain),
        **ratio_quartiles(exits, plain),
        "empty_share": empty,
    }


def nuclei_batches(config: ModelConfig, folder: Path, batch: int) -> Iterator[Feeds]:
    """All canvases of a folder's images, at most `batch` together and of one image."""
    for path in sorted(folder.glob("*.jpg")):
        tiles = prepare(decode_image(path.read_bytes()), config.input).tiles
        for start in range(0, len(tiles), batch):
            images, valid_hw = collate(tiles[start : start + batch])
            yield {"images": images, "valid_hw": valid_hw}


def measure_nuclei(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The bundled graphs, which must be published with early exits."""
    config = read_config(NUCLEI)
    folder = NUCLEI / str(config.version)
    for name, exits in PLAIN_FILES.items():
        pair = Pair((folder / name).read_bytes(), (folder / exits).read_bytes(), options.threads)
        for batch in options.batches:
            batches = list(nuclei_batches(config, options.images, batch))
            yield f"nuclei, {name}, batches of {batch}", measure(pair, batches)


def measure_solo(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
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
        pair = Pair(plain, add_exits(plain, stride), options.threads)
        yield f"solo_512_r50, {title}", measure(pair, [feeds] * options.rounds)


def table_row(title: str, found: dict[str, Any]) -> dict[str, object]:
    """A row of the table."""
    plain, exits = (float(np.mean(found[key])) for key in ("plain_cpu_s", "exits_cpu_s"))
    return {
        "graph": title,
        "levels without candidates": ", ".join(f"{share:.0%}" for share in found["empty_share"]),
        "plain, CPU s a batch": plain,
        "with exits": exits,
        "ratio of the sums": found["sum_ratio"],
        "quartiles": show_quartiles(found),
    }


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=("nuclei", "solo_512_r50"))
    parser.add_argument("--images", type=Path, default=IMAGES, help="JPEG images for nuclei")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="for nuclei (1 8)")
    parser.add_argument("--rounds", type=int, default=3, help="for SOLO-512 (3)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write FILE.json and FILE.md")
    options = parser.parse_args()
    measures = {"nuclei": measure_nuclei, "solo_512_r50": measure_solo}
    found = {
        title: row for name in options.models or measures for title, row in measures[name](options)
    }
    table = markdown_table([table_row(title, row) for title, row in found.items()])
    print(table)
    if options.out:
        content = {
            "machine": describe_machine(),
            "threads": options.threads,
            "rows": found,
        }
        write_report(options.out.with_suffix(".json"), this_command("benchmarks.exits"), content)
        options.out.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
