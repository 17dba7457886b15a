"""The command solo-data: checks labelled images, converts them to COCO JSON, joins data sets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from training.data.formats import FORMATS, add_format_options, open_dataset
from training.data.formats.convert import convert
from training.data.formats.join import join
from training.data.headers import read_sizes
from training.data.records import DatasetError
from training.data.validate import Checked, check_classes, check_content

SPLITS = ("train", "val")


def check(
    root: Path,
    splits: Sequence[str],
    format: str | None = None,
    val_fraction: float | None = None,
) -> bool:
    """Prints the report of each split; returns whether training would take them all."""
    checked: list[Checked] = []
    faults: list[str] = []
    for split in splits:
        try:
            found = check_content(open_dataset(root, split, format, val_fraction), read_sizes)
            print(f"{split}: {found.report.text()}")
            faults += [found.report.refusal] if found.report.refusal else []
            if checked:
                first = checked[0]
                check_classes(found, first.classes, first.report.source)
            checked.append(found)
        except (DatasetError, OSError) as error:
            if str(error) not in faults:  # one fault of the whole data set refuses every split
                print(f"{split}: {error}")
            faults.append(str(error))
    print("training refuses it" if faults else "training takes it")
    return not faults


def build_parser() -> argparse.ArgumentParser:
    """The command line of solo-data."""
    parser = argparse.ArgumentParser(prog="solo-data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checks = commands.add_parser(
        "check",
        help="check every image and every object",
        description="Checks every image and every object of a data set, and prints what is wrong, "
        "where, and what training does about it: refused, skipped or read all the same. The exit "
        "status is 1 if training would refuse the data set.",
    )
    checks.add_argument("data", type=Path, help="folder of labelled images")
    checks.add_argument(
        "--split", action="append", help="name of an annotation file; repeatable (train and val)"
    )
    add_format_options(checks)
    add_convert(commands)
    add_join(commands)
    return parser


def add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand `convert`."""
    parser = commands.add_parser(
        "convert",
        help="write a data set as COCO JSON",
        description=f"Writes a data set of any format ({', '.join(FORMATS)}) as COCO JSON.",
    )
    parser.add_argument("data", type=Path, help="folder of labelled images")
    parser.add_argument(
        "--to",
        type=Path,
        required=True,
        metavar="OUT.json|OUTDIR",
        help="a file for all images, which stay where they are; or a new folder, which gets "
        "annotations/SPLIT.json and copies of the images",
    )
    parser.add_argument("--split", action="append", default=[], help="split; repeatable (all)")
    parser.add_argument(
        "--extract-images",
        action="store_true",
        help="first write the images that are only embedded in LabelMe files beside these",
    )
    add_format_options(parser)


def add_join(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand `join`."""
    parser = commands.add_parser(
        "join",
        help="write several data sets as one",
        description="Writes several data sets, which may label different classes, as one in COCO "
        "JSON with copies of the images. Classes of the same name are one class. Classes that an "
        "image's own data set does not label are neither trained nor evaluated as absent there "
        "(LVIS's neg_category_ids).",
    )
    parser.add_argument("data", type=Path, nargs="+", help="folders of labelled images")
    parser.add_argument("--to", type=Path, required=True, metavar="OUTDIR", help="a new folder")
    add_format_options(parser)


def run_convert(options: argparse.Namespace) -> None:
    """Runs `convert`."""
    lines = convert(
        options.data,
        options.to,
        splits=options.split,
        format=options.format,
        val_fraction=options.val_fraction,
        extract_images=options.extract_images,
    )
    print("\n".join(lines))


def _join(options: argparse.Namespace) -> list[str]:
    return join(options.data, options.to, format=options.format, val_fraction=options.val_fraction)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(arguments)
    if options.command == "check":
        splits = options.split or SPLITS
        return 0 if check(options.data, splits, options.format, options.val_fraction) else 1
    try:
        if options.command == "join":
            print("\n".join(_join(options)))
        else:
            run_convert(options)
    except (ValueError, OSError) as error:
        print(f"solo-data: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
