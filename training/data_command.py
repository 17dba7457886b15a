"""The command solo-data: checks labelled data before it is trained on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from training.data.coco_json import open_coco
from training.data.headers import read_sizes
from training.data.records import DatasetError
from training.data.validate import Checked, check_classes, check_content

SPLITS = ("train", "val")


def check(root: Path, splits: Sequence[str]) -> bool:
    """Prints the report of each split; returns whether training would take them all."""
    checked: list[Checked] = []
    usable = True
    for split in splits:
        try:
            found = check_content(open_coco(root, split), read_sizes)
            print(f"{split}: {found.report.text()}")
            usable &= found.report.refusal is None
            if checked:
                first = checked[0]
                check_classes(found, first.classes, first.report.source)
            checked.append(found)
        except (DatasetError, OSError) as error:
            print(f"{split}: {error}")
            usable = False
    print("training takes it" if usable else "training refuses it")
    return usable


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
    checks.add_argument("data", type=Path, help="folder in COCO format")
    checks.add_argument(
        "--split", action="append", help="name of an annotation file; repeatable (train and val)"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(arguments)
    return 0 if check(options.data, options.split or SPLITS) else 1


if __name__ == "__main__":
    sys.exit(main())
