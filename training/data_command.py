"""The command solo-data: converts labelled images to COCO JSON."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.data.formats import FORMATS, add_format_options
from training.data.formats.convert import convert


def build_parser() -> argparse.ArgumentParser:
    """The command line of solo-data."""
    parser = argparse.ArgumentParser(prog="solo-data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_convert(commands)
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


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        run_convert(options)
    except (ValueError, OSError) as error:
        print(f"solo-data: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
