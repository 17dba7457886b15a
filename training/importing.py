"""solo-import: a published SOLO checkpoint, or one of the published code, becomes one of ours."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.model_config import ClassSpec
from training.architecture import count_classes, infer_config
from training.catalogue import PublishedModel, find_model_of_file, get_model, list_models
from training.checkpoint import CheckpointError, save_checkpoint
from training.configs import get_config, list_configs
from training.configs.coco_classes import COCO_CLASSES
from training.configs.schema import Config
from training.convert import convert_names, convert_state_dict
from training.download import fetch, hash_file
from training.model.solo import Solo
from training.overrides import apply_overrides
from training.torch_files import read_weights

CLASSIFIER = "backbone.fc."
COUNTER = ".num_batches_tracked"


def build_parser() -> argparse.ArgumentParser:
    """The command line of solo-import."""
    parser = argparse.ArgumentParser(
        prog="solo-import",
        description="Turns a SOLO v1 checkpoint of the authors' code or of mmdetection into one "
        "of ours, which solo-eval and solo-export take. A published one is named and downloaded "
        "into the cache ($SOLO_CACHE, else solo-serve in the user's cache folder); $SOLO_MIRROR "
        "names another place that has the files.",
        epilog="Example: solo-import decoupled_solo_r50_fpn_3x_coco --out coco.pt. "
        f"Published: {', '.join(list_models())}.",
    )
    parser.add_argument("source", metavar="FILE_OR_NAME", help="a file or a published checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="CKPT", help="file to write")
    parser.add_argument("--force", action="store_true", help="replace CKPT if it is there")
    parser.add_argument(
        "--config",
        help="configuration of the network (default: the published one's, else inferred from the "
        f"weights): {', '.join(list_configs())}",
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
        help="the classes, where they are not COCO's: a JSON list of {id, name} in the order of "
        "the network's outputs, or a COCO annotation file (its categories by id)",
    )
    classes.add_argument(
        "--placeholder-classes", action="store_true", help="call the classes class_1, class_2, ..."
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="load a file that holds more than plain weights; this runs any code which the file "
        "contains, so only for files whose author you trust",
    )
    parser.add_argument(
        "--sha256",
        metavar="HEX",
        help="SHA-256 of the file or its first digits (default: what the published name carries)",
    )
    return parser


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file to import.

    Attributes:
        path: Where it lies.
        published: What the catalogue knows of it; None for an unknown file.
        provenance: What is known of its origin; JSON types.
    """

    path: Path
    published: PublishedModel | None
    provenance: dict[str, Any]


def find_source(file_or_name: str, sha256: str | None = None) -> Source:
    """The file to import, downloaded if need be, its hash checked.

    Args:
        file_or_name: Path of a file or name of a published checkpoint.
        sha256: Expected hash or its first digits; None takes what the catalogue has.

    Raises:
        ValueError: Neither a file nor a published name.
        CheckpointError: A file with another hash.
        DownloadError: It cannot be fetched.
    """
    path = Path(file_or_name)
    local = path.is_file()
    published = find_model_of_file(path) if local else get_model(file_or_name)
    if sha256 is None:
        sha256 = published.sha256 if published else ""
    if published is not None and not local:
        path = fetch(published.location(), published.file_name, sha256=sha256)
    found = hash_file(path)
    if not found.startswith(sha256.lower()):
        raise CheckpointError(
            f"{path} has the SHA-256 {found}, expected {sha256}: it is damaged or another file"
        )
    provenance: dict[str, Any] = {"file": path.name, "sha256": found}
    if published is not None:
        provenance |= {"name": published.name, "publisher": published.publisher}
        if found.startswith(published.sha256):  # not another file that --sha256 admits
            provenance |= {
                "url": published.url,
                "schedule": published.schedule,
                "published_mask_ap": published.mask_ap,
            }
    return Source(path=path, published=published, provenance=provenance)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the caller knows better than the file.

    Attributes:
        config_name: Configuration of the network; None takes the published one's or infers it.
        overrides: Changes of the configuration, FIELD=VALUE.
        classes: In the order of the outputs; None takes the file's or COCO's.
        placeholder_classes: Invents names for the classes.
        allow_pickle: Runs the file's code where it has some.
    """

    config_name: str | None = None
    overrides: Sequence[str] = ()
    classes: tuple[ClassSpec, ...] | None = None
    placeholder_classes: bool = False
    allow_pickle: bool = False


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A checkpoint under our names.

    Attributes:
        config: Of the network, with its classes.
        state: The weights.
        report: What was done and what of the file is not used, one line each.
        provenance: What is known of the file's origin; JSON types.
    """

    config: Config
    state: dict[str, Tensor]
    report: list[str]
    provenance: dict[str, Any]


def import_source(source: Source, choices: Choices = Choices()) -> Imported:
    """Reads a file, finds its network and classes, and checks that every weight has its place.

    Raises:
        CheckpointError: The file cannot be read; a weight is unknown, missing, left over or of
            another shape; or nobody says what the classes are.
        ValueError: The configuration's name or a change of it is wrong.
    """
    name = source.path.name
    weights = read_weights(source.path, allow_pickle=choices.allow_pickle)
    tensors, notes = set_aside(weights.tensors)
    if "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        raise CheckpointError(
            f"{name} is a plain ResNet, not a SOLO model; solo-train --init takes it"
        )
    shapes = {
        ours: tuple(tensors[theirs].shape) for ours, theirs in convert_names(tensors, name).items()
    }
    config, origin, changes = choose_config(shapes, source.published, choices)
    count = count_classes(shapes)
    classes, named_by = choose_classes(
        count, weights.class_names, choices, published=source.published is not None
    )
    config = replace(config, num_classes=count, classes=classes)
    expected = Solo(config.model, count).state_dict()
    counters = [key for key in expected if key.endswith(COUNTER) and key not in shapes]
    if counters:
        tensors |= {key: torch.zeros((), dtype=torch.int64) for key in counters}
        notes.append(f"{len(counters)} counters {COUNTER[1:]} are not in it; nothing reads them")
    try:
        state = convert_state_dict(tensors, expected, name)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. The configuration is {config.name} ({origin})") from error
    report = [
        f"{len(state)} tensors of {name}, every one used",
        *(f"not as in the file: {note}" for note in weights.notes + notes),
        f"configuration {config.name} ({origin})",
        *(f"  {change}" for change in changes),
        f"{count} classes ({named_by})",
    ]
    return Imported(config=config, state=state, report=report, provenance=source.provenance)


def set_aside(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Leaves out what a SOLO checkpoint may hold and SOLO does not use; says what and why."""
    kept = {key: value for key, value in tensors.items() if not key.startswith(CLASSIFIER)}
    dropped = sorted(tensors.keys() - kept.keys())
    notes = [f"{', '.join(dropped)} left out: the ImageNet classifier"] if dropped else []
    return kept, notes


def choose_config(
    shapes: dict[str, tuple[int, ...]], published: PublishedModel | None, choices: Choices
) -> tuple[Config, str, list[str]]:
    """The network's configuration, who says so, and how it differs from the zoo's.

    Raises:
        ValueError: No such configuration, no such field, or none can be inferred.
    """
    changes: list[str] = []
    if choices.config_name:
        config, origin = get_config(choices.config_name), "as asked"
    elif published is not None:
        config, origin = published.config(), f"published as {published.name}"
    else:
        config, changes = infer_config(shapes)
        origin = "inferred from the weights; --config names another"
    return apply_overrides(config, choices.overrides), origin, changes


def choose_classes(
    count: int, names: Sequence[str], choices: Choices, *, published: bool
) -> tuple[tuple[ClassSpec, ...], str]:
    """The classes in the order of the outputs, and who says so.

    Args:
        count: C, outputs of the category branch.
        names: What the file says, possibly nothing.
        choices: Of the caller; they come first.
        published: The file is one of those trained on COCO.

    Raises:
        CheckpointError: Nobody says what the classes are, or names another number of them.
    """
    if choices.classes is not None:
        if len(choices.classes) != count:
            raise CheckpointError(
                f"{len(choices.classes)} classes are named, but the network has {count}"
            )
        return choices.classes, "as given"
    if choices.placeholder_classes:
        return _number([f"class_{i}" for i in range(1, count + 1)]), "placeholder names"
    coco = tuple(c.name for c in COCO_CLASSES)
    known = len(names) == count
    # Early versions of mmdetection write 'traffic_light'.
    is_coco = tuple(name.replace("_", " ") for name in names) == coco
    if count == len(coco) and (published or is_coco or not known):
        return COCO_CLASSES, "COCO's" if published or is_coco else "COCO's, as their number says"
    if known:
        return _number(names), "names of the file, ids from 1; --classes names others"
    raise CheckpointError(
        f"the network has {count} classes and the file does not name them; --classes FILE does, "
        "or --placeholder-classes invents names"
    )


def _number(names: Sequence[str]) -> tuple[ClassSpec, ...]:
    return tuple(ClassSpec(category_id=i, name=name) for i, name in enumerate(names, 1))


def read_classes(file: Path) -> tuple[ClassSpec, ...]:
    """Classes of a JSON list of {id, name}, or of a COCO annotation file by id.

    Raises:
        CheckpointError: The file is missing or is neither, or an id stands there twice.
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


def run(options: argparse.Namespace) -> Imported:
    """Imports as the options say and writes the checkpoint."""
    if options.out.exists() and not options.force:
        raise CheckpointError(f"{options.out} is there already; --force replaces it")
    choices = Choices(
        config_name=options.config,
        overrides=options.set,
        classes=read_classes(options.classes) if options.classes else None,
        placeholder_classes=options.placeholder_classes,
        allow_pickle=options.allow_pickle,
    )
    source = find_source(options.source, options.sha256)
    imported = import_source(source, choices)
    provenance = {"imported_from": imported.provenance}
    content = {"model": imported.state, "ema": {}, "provenance": provenance}
    save_checkpoint(options.out, imported.config, content)
    return imported


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        imported = run(options)
    except (ValueError, OSError) as error:
        print(f"solo-import: {error}", file=sys.stderr)
        return 1
    for line in imported.report:
        print(f"solo-import: {line}")
    if "published_mask_ap" in imported.provenance:
        print(f"solo-import: published mask AP {imported.provenance['published_mask_ap']}")
    print(f"checkpoint: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
