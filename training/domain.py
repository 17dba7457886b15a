"""python -m training.domain: lets a model say which images are unlike those it was trained on.

Describes the training images by simple statistics and by how sure the model is of what it finds in
them (`pipeline.domain`), groups them, and takes as threshold the distance that 99% of training
images keep to the groups of the others. Prints how many images of other folders would get a
warning; with --write the groups are stored in config.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.decode import decode_image
from pipeline.domain import describe_image, measure_distance, measure_offsets
from pipeline.errors import DecodeError
from pipeline.model_config import STATISTICS, DomainSpec
from pipeline.types import UInt8
from service.models.repository import LoadedModel, edit_config, load_version
from training.data.coco import CocoDataset, open_split
from training.data.formats import add_format_options

CENTRES = 32
FOLDS = 5
USUAL = 0.99
"""Share of the training images that get no warning."""
LEAST_IMAGES = 20
LEAST_SPREAD, LEAST_THRESHOLD = 0.01, 0.1
"""Equal images must not make every other image unusual."""
_STEPS = 50
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Described:
    """What `pipeline.domain` needs to know of an image."""

    appearance: Float64
    confidence: float


def describe(image: UInt8, model: LoadedModel) -> Described | None:
    """Describes an image, [H, W, 3] RGB; None if it is too small or too uniform."""
    appearance = describe_image(image)
    if appearance is None:
        return None
    return Described(appearance, model.answer(image).confidence)


def read_split(data: CocoDataset) -> Iterator[UInt8]:
    """The images of a split, decoded."""
    return (data.image(index) for index in range(len(data)))


def read_folder(folder: Path) -> Iterator[UInt8]:
    """Every image below a folder, decoded, in the order of the names.

    Raises:
        ValueError: There is no image, or one that cannot be decoded.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(f"{folder} has no images")
    for path in paths:
        try:
            yield decode_image(path.read_bytes())
        except DecodeError as error:
            raise ValueError(f"{path}: {error}") from error


def fit_domain(described: Sequence[Described | None], centres: int = CENTRES) -> DomainSpec:
    """The groups of some images, and the threshold by cross-validation; always the same.

    Args:
        described: Of the training images; those that cannot be described are left out.
        centres: Number of groups, at most a quarter of the images.

    Raises:
        ValueError: There are fewer than `LEAST_IMAGES` to go by.
    """
    known = [np.append(d.appearance, d.confidence) for d in described if d is not None]
    if len(known) < LEAST_IMAGES:
        raise ValueError(
            f"{len(known)} images are neither too small nor too uniform, {LEAST_IMAGES} are needed"
        )
    values = np.stack(known)
    spreads = np.maximum(values.std(axis=0), LEAST_SPREAD)
    scaled = values / spreads
    count = max(1, min(centres, len(known) // 4))
    distances = []
    for held, rest in _fold(scaled):
        distances.append(_distances(held, _group(rest, count)).min(axis=1))
    threshold = float(np.quantile(np.concatenate(distances), USUAL))
    return DomainSpec(
        statistics=STATISTICS,
        spreads=tuple(float(f"{v:.4g}") for v in spreads),
        centres=tuple(
            tuple(float(f"{v:.4g}") for v in centre * spreads) for centre in _group(scaled, count)
        ),
        threshold=float(f"{max(threshold, LEAST_THRESHOLD):.4g}"),
    )


def _fold(values: Float64) -> Iterator[tuple[Float64, Float64]]:
    """Every fifth image, and the others."""
    for start in range(FOLDS):
        held = np.arange(len(values)) % FOLDS == start
        yield values[held], values[~held]


def _distances(values: Float64, centres: Float64) -> Float64:
    """[N, K]."""
    return measure_offsets(centres[None] - values[:, None])


def _group(values: Float64, count: int) -> Float64:
    """[K, S] centres by k-means, whose first centres are drawn far from each other."""
    random = np.random.default_rng(0)
    centres = values[[int(random.integers(len(values)))]]
    while len(centres) < count:
        weights = _distances(values, centres).min(axis=1) ** 2
        total = float(weights.sum())
        drawn = random.choice(len(values), p=weights / total if total else None)
        centres = np.vstack([centres, values[drawn]])
    for _ in range(_STEPS):
        nearest = _distances(values, centres).argmin(axis=1)
        moved = np.stack(
            [
                values[nearest == k].mean(axis=0) if (nearest == k).any() else centres[k]
                for k in range(count)
            ]
        )
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def describe_shares(name: str, described: Sequence[Described | None], spec: DomainSpec) -> str:
    """A line: how many of some images get a warning."""
    known = [d for d in described if d is not None]
    distances = [measure_distance(d.appearance, d.confidence, spec) for d in known]
    unusual = sum(distance > spec.threshold for distance in distances)
    share = f"{unusual / len(known):.1%}" if known else "-"
    return (
        f"{name}: {unusual} of {len(known)} images are unusual ({share}), "
        f"{len(described) - len(known)} cannot be judged"
    )


def write_domain(folder: Path, version: int, spec: DomainSpec) -> None:
    """Stores the groups in config.json of a model's folder.

    Raises:
        OSError, ValueError: It cannot be changed.
    """

    def change(content: dict[str, Any], _: object) -> None:
        content["versions"][str(version)]["domain"] = spec.model_dump(mode="json")

    edit_config(folder, change)


def build_parser() -> argparse.ArgumentParser:
    """The command line of training.domain."""
    parser = argparse.ArgumentParser(prog="python -m training.domain", description=__doc__)
    parser.add_argument("model", type=Path, help="model_repo/<model> folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled images")
    add_format_options(parser)
    parser.add_argument("--train-split", default="train", help="images to go by (default: train)")
    parser.add_argument("--split", default="val", help="images to check with (default: val)")
    parser.add_argument(
        "--other", type=Path, nargs="+", default=[], help="folders with images of other kinds"
    )
    parser.add_argument("--version", type=int, help="version of the folder (default: last)")
    parser.add_argument("--write", action="store_true", help="store the groups in config.json")
    return parser


def run(options: argparse.Namespace) -> None:
    """Fits and prints, and with `--write` stores.

    Raises:
        OSError, ValueError: It is not possible; the message says why.
    """
    model = load_version(options.model, options.version)

    def describe_all(images: Iterable[UInt8]) -> list[Described | None]:
        return [describe(image, model) for image in images]

    described = describe_all(read_split(open_split(options, options.train_split)))
    spec = fit_domain(described)
    print(f"{len(spec.centres)} groups, threshold {spec.threshold:g}")
    print(describe_shares(options.train_split, described, spec))
    if options.split:
        checked = describe_all(read_split(open_split(options, options.split)))
        print(describe_shares(options.split, checked, spec))
    for folder in options.other:
        print(describe_shares(str(folder), describe_all(read_folder(folder)), spec))
    if options.write:
        write_domain(options.model, model.version, spec)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"domain: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
