"""The command solo-import: converts a published SOLO checkpoint, or one of the published code."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pipeline.model_config import ClassSpec
from training.configs import list_configs
from training.configs.coco_classes import COCO_CLASSES
from training.configs.io import apply_overrides
from training.configs.schema import Config
from training.configs.toml_files import load_config
from training.model.solo import Solo
from training.weights.convert import (
    Shapes,
    convert_names,
    convert_state_dict,
    count_classes,
    infer_config,
)
from training.weights.formats import (
    CheckpointError,
    read_weights,
    save_checkpoint,
)
from training.weights.sources import (
    PublishedModel,
    WeightsSource,
    find_source,
    list_models,
)

CLASSIFIER = ("fc.weight", "fc.bias")
COUNTER = ".num_batches_tracked"


def import_source(
    source: WeightsSource, options: argparse.Namespace, given: tuple[ClassSpec, ...] | None
) -> tuple[Config, dict[str, Tensor], list[str]]:
    """Reads a file, determines its network and classes, and checks that every weight fits.

    Args:
        source: The file.
        options: Of solo-import.
        given: The classes in the order of the outputs; None: the file's or COCO's.

    Returns:
        The configuration with its classes; the weights under our names; and what was done and
        what in the file is not used, one line each.

    Raises:
        CheckpointError: The file cannot be read; a weight is unknown, missing, unexpected or of
            another shape; or the classes are not known.
        ValueError: The name of the configuration or an override is wrong.
    """
    name = source.path.name
    weights = read_weights(source.path, allow_pickle=options.allow_pickle)
    tensors, notes = without_classifier(weights.tensors, "backbone.")
    tensors, averaged = _without_ema_copies(tensors)
    notes += averaged
    if "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        raise CheckpointError(
            f"{name} is a plain ResNet, not a SOLO model; solo-train --init takes it"
        )
    names = convert_names(tensors, name)
    shapes = {ours: tuple(tensors[theirs].shape) for ours, theirs in names.items()}
    config, origin, changes = choose_config(shapes, source.published, options)
    count = count_classes(shapes)
    classes, named_by = choose_classes(
        count, weights.class_names, given, options, published=source.published is not None
    )
    config = replace(config, num_classes=count, classes=classes)
    expected = Solo(config.model, count).state_dict()
    counters = [key for key in expected if key.endswith(COUNTER) and key not in shapes]
    if counters:
        tensors |= {key: torch.zeros((), dtype=torch.int64) for key in counters}
        notes.append(f"it has no {len(counters)} counters {COUNTER[1:]}, which are not used")
    try:
        state = convert_state_dict(tensors, expected, name)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. The configuration is {config.name} ({origin})") from error
    report = [
        f"{len(state)} tensors of {name}, all of them used",
        *(f"not as in the file: {note}" for note in weights.notes + notes),
        f"configuration {config.name} ({origin})",
        *(f"  {change}" for change in changes),
        f"{count} classes ({named_by})",
    ]
    return config, state, report


def without_classifier(
    tensors: dict[str, Tensor], prefix: str = ""
) -> tuple[dict[str, Tensor], list[str]]:
    """Leaves out the ImageNet classifier, which SOLO does not have, and says so."""
    dropped = [prefix + key for key in CLASSIFIER if prefix + key in tensors]
    kept = {key: value for key, value in tensors.items() if key not in dropped}
    return kept, [f"{', '.join(dropped)} left out: the ImageNet classifier"] if dropped else []


def _without_ema_copies(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Leaves out the second set of weights that mmdetection 2 stores with a moving average.

    Its hook registers a buffer `ema_backbone_conv1_weight` for `backbone.conv1.weight`, and
    exchanges the two at the end of an epoch, before evaluation and the checkpoint: the average is
    under the plain name.
    """
    copies = {f"ema_{key.replace('.', '_')}" for key in tensors} & tensors.keys()
    if not copies:
        return tensors, []
    kept = {key: value for key, value in tensors.items() if key not in copies}
    return kept, [
        f"{len(copies)} tensors ema_* left out: the weights before averaging; mmdetection 2 stores "
        "the moving average, which is taken, under the plain names"
    ]


def choose_config(
    shapes: Shapes, published: PublishedModel | None, options: argparse.Namespace
) -> tuple[Config, str, list[str]]:
    """The network's configuration, where it comes from, and how it differs from the zoo's.

    Raises:
        ValueError: No such configuration, no such field, or it cannot be inferred.
    """
    changes: list[str] = []
    if options.config:
        config, origin = load_config(options.config), "from --config"
    elif published is not None:
        config, origin = published.config(), f"published as {published.name}"
    else:
        config, changes = infer_config(shapes)
        origin = "inferred from the weights; --config selects another"
    return apply_overrides(config, options.set), origin, changes


def choose_classes(
    count: int,
    names: Sequence[str],
    given: tuple[ClassSpec, ...] | None,
    options: argparse.Namespace,
    *,
    published: bool,
) -> tuple[tuple[ClassSpec, ...], str]:
    """The classes in the order of the outputs, and where they come from.

    Args:
        count: C, outputs of the category branch.
        names: Names in the file, possibly none.
        given: The caller's classes, which take precedence.
        options: Of solo-import.
        published: The file is one of those trained on COCO.

    Raises:
        CheckpointError: The classes are not known, or their number is wrong.
    """
    if given is not None:
        if len(given) != count:
            raise CheckpointError(f"{len(given)} classes are given, but the network has {count}")
        return given, "from --classes"
    if options.placeholder_classes:
        return _number([f"class_{i}" for i in range(1, count + 1)]), "placeholder names"
    coco = tuple(c.name for c in COCO_CLASSES)
    known = len(names) == count
    # Early versions of mmdetection write 'traffic_light'.
    is_coco = tuple(name.replace("_", " ") for name in names) == coco
    if count == len(coco) and (published or is_coco or not known):
        return COCO_CLASSES, "COCO's" if published or is_coco else "COCO's, assumed from the number"
    if known:
        return _number(names), "names in the file, ids from 1; --classes replaces them"
    raise CheckpointError(
        f"the network has {count} classes and the file does not name them; name them with "
        "--classes FILE or use --placeholder-classes"
    )


def _number(names: Sequence[str]) -> tuple[ClassSpec, ...]:
    return tuple(ClassSpec(category_id=i, name=name) for i, name in enumerate(names, 1))


def read_classes(file: Path) -> tuple[ClassSpec, ...]:
    """Classes of a JSON list of {id, name}, or of a COCO annotation file sorted by id.

    Raises:
        CheckpointError: The file is missing or is neither, has no classes, or an id twice.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            content = sorted(content["categories"], key=lambda row: int(row["id"]))
        classes = tuple(ClassSpec(category_id=row["id"], name=row["name"]) for row in content)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} is neither a JSON list of {{id, name}} nor a COCO annotation file: {error!r}"
        ) from error
    ids = [c.category_id for c in classes]
    if len(set(ids)) != len(ids) or not ids:
        raise CheckpointError(f"{file} names {len(ids)} classes with {len(set(ids))} ids")
    return classes


def build_parser() -> argparse.ArgumentParser:
    """The command line of solo-import."""
    parser = argparse.ArgumentParser(
        prog="solo-import",
        description="Converts a SOLO v1 checkpoint of the authors' code or of mmdetection into "
        "one that solo-eval, solo-export and solo-train --init read. A published checkpoint is "
        "given by name and downloaded into the cache ($SOLO_CACHE, else solo-serve in the user's "
        "cache folder); $SOLO_MIRROR is the URL of another server that has the files.",
        epilog="Example: solo-import decoupled_solo_r50_fpn_3x_coco --out coco.pt. "
        f"Published: {', '.join(list_models())}.",
    )
    parser.add_argument(
        "source", metavar="FILE_OR_NAME", help="a file or the name of a published checkpoint"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="CKPT", help="file to write")
    parser.add_argument("--force", action="store_true", help="replace CKPT if it exists")
    parser.add_argument(
        "--config",
        help="configuration of the network, a TOML file or a name (default: that of the published "
        f"checkpoint, else inferred from the weights): {', '.join(list_configs())}",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change one field of the configuration, e.g. model.head.norm_groups=16; repeatable",
    )
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="the classes, if they are not COCO's: a JSON list of {id, name} in the order of the "
        "network's outputs, or a COCO annotation file (its categories sorted by id)",
    )
    classes.add_argument(
        "--placeholder-classes", action="store_true", help="name the classes class_1, class_2, ..."
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="load a file that holds more than plain weights; this runs any code in the file, so "
        "use it only for files whose author you trust",
    )
    parser.add_argument(
        "--sha256",
        metavar="HEX",
        help="SHA-256 of the file or its first digits (default: those in the published name)",
    )
    return parser


def run(options: argparse.Namespace) -> list[str]:
    """Imports as the options say and writes the checkpoint; returns what was done, line by line."""
    if options.out.exists() and not options.force:
        raise CheckpointError(f"{options.out} exists already; --force replaces it")
    given = read_classes(options.classes) if options.classes else None
    source = find_source(options.source, options.sha256)
    config, state, report = import_source(source, options, given)
    provenance = {"imported_from": source.provenance}
    save_checkpoint(options.out, config, {"model": state, "ema": {}, "provenance": provenance})
    if "published_mask_ap" in source.provenance:
        report.append(f"published mask AP {source.provenance['published_mask_ap']}")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        report = run(options)
    except (ValueError, OSError) as error:
        print(f"solo-import: {error}", file=sys.stderr)
        return 1
    for line in report:
        print(f"solo-import: {line}")
    print(f"checkpoint: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
