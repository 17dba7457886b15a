"""Finds the image files of a run, and assigns their ids."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from service.errors import StartupError
from service.predict.errors import ImageUnusable
from service.predict.files import SUFFIXES, ImageFile, is_uri, list_store


def find_files(inputs: Sequence[str]) -> list[ImageFile]:
    """Files, images in folders (recursively) and matches of globs; each file once.

    Raises:
        StartupError: An input gives no file.
        OSError: An object store cannot be read.
    """
    files: dict[ImageFile, None] = {}
    for given in inputs:
        path = Path(given)
        found: Sequence[ImageFile]
        if is_uri(given):
            found = list_store(given)
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(given, recursive=True) if Path(p).is_file())
        if not found:
            raise StartupError(
                f"{given!r} is not an image or a folder with images, and matches none"
            )
        files.update(dict.fromkeys(found))
    return list(files)


def read_image_ids(annotations: Path) -> dict[str, int]:
    """Image ids by file name, from a COCO file.

    Raises:
        StartupError: It cannot be read or has no list of images.
    """
    try:
        content = json.loads(annotations.read_bytes())
        return {str(image["file_name"]): int(image["id"]) for image in content["images"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartupError(f"{annotations}: not a COCO file with images: {error!r}") from error


def find_image_id(file: ImageFile, ids: Mapping[str, int]) -> int:
    """The id of a file: of the longest end of its path that is a file name in `ids`.

    Raises:
        ImageUnusable: No end of its path is.
    """
    parts = str(file).split("/")
    for start in range(len(parts)):
        name = "/".join(parts[start:])
        if name in ids:
            return ids[name]
    raise ImageUnusable("it is not in the annotations")


def assign_ids(
    files: Sequence[ImageFile], annotations: Path | None
) -> tuple[dict[ImageFile, int], dict[ImageFile, ImageUnusable]]:
    """Each file's image id, and the files that have none.

    Args:
        files: The images.
        annotations: COCO file with the ids; None: the ids are 1, 2, 3 ...

    Raises:
        StartupError: The annotations cannot be read.
    """
    if annotations is None:
        return {file: number for number, file in enumerate(files, 1)}, {}
    named = read_image_ids(annotations)
    ids, missing = {}, {}
    for file in files:
        try:
            ids[file] = find_image_id(file, named)
        except ImageUnusable as error:
            missing[file] = error
    return ids, missing
