"""Which files are a split of a COCO data set: the annotation file, and the images that it names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from training.data.content import CocoContent
from training.data.formats.files import read_start
from training.data.formats.source import NAMES, split_name
from training.data.records import DatasetError

ROBOFLOW = "_annotations.coco.json"
_YEAR = re.compile(r"20[0-9]{2}$")
_YEARS = ("", "2014", "2017")
_INSPECTED = 20  # images that are looked for in each folder


def list_files(root: Path) -> list[Path]:
    """The annotation files in `annotations/`, and those in the folder that look like COCO JSON."""
    return [*sorted((root / "annotations").glob("*.json")), *list_loose_files(root)]


def list_loose_files(root: Path) -> list[Path]:
    """Files in the folder itself that look like COCO JSON."""
    keys = (b'"categories"', b'"file_name"', b'"coco_url"')
    files = []
    for path in sorted(root.glob("*.json")):
        start = read_start(path)
        if b'"annotations"' in start or (b'"images"' in start and any(k in start for k in keys)):
            files.append(path)
    return files


def split_of_stem(stem: str) -> str:
    """The split in a file's name, as in `instances_val2017` and `lvis_v1_val`; "" if unclear."""
    words = re.split(r"[^A-Za-z0-9]+", stem)
    found = {split_name(_YEAR.sub("", word)) for word in words} - {""}
    return found.pop() if len(found) == 1 else ""


def find_single_file(root: Path) -> Path | None:
    """The only annotation file, if it is not called as a split."""
    files = list_files(root)
    if len(files) != 1 or list(root.glob(f"*/{ROBOFLOW}")):
        return None
    name = files[0].stem.removeprefix("instances_").removesuffix("2017")
    return None if split_name(name) else files[0]


def find_split(root: Path, split: str) -> Path | None:
    """The annotation file of a split; None: the only file is to be divided.

    Raises:
        DatasetError: There is no such file, or several; lists those that were searched or found.
    """
    found = list_split_files(root, split)
    if len(found) > 1:
        names = ", ".join(str(file.relative_to(root)) for file in found)
        raise DatasetError(f"{root} has several files of split {split!r}: {names}; name one")
    if found:
        return found[0]
    if split_name(split) in ("train", "val") and find_single_file(root) is not None:
        return None
    tried = ", ".join(str(root / "annotations" / f"{stem}.json") for stem in _stems(split))
    raise DatasetError(f"no annotations of split {split!r}: looked for {tried}")


def list_split_files(root: Path, split: str) -> list[Path]:
    """The annotation files that may be those of a split; a name of COCO 2017 comes before others.

    The only file of a data set is of no split unless its name is that of one.
    """
    kind = split_name(split)
    aliases = NAMES.get(kind, ())
    exact = [root / alias / ROBOFLOW for alias in (split, *aliases)]
    exact += [root / "annotations" / f"{stem}.json" for stem in (*_stems(split), *aliases)]
    found = [file for file in exact if file.is_file()]
    if found:
        return found[:1]
    files = list_files(root)
    found = [file for file in files if file.stem == split]
    if found or not kind or find_single_file(root) is not None:
        return found
    return [file for file in files if split_of_stem(file.stem) == kind]


def _stems(split: str) -> list[str]:
    name = split.removeprefix("instances_").removeprefix("image_info_")
    prefixes = ("", "instances_", "image_info_")
    stems = [split] + [prefix + name + year for prefix in prefixes for year in _YEARS]
    return list(dict.fromkeys(stems))


def find_images(content: CocoContent, root: Path, split: str) -> CocoContent:
    """The content of an annotation file with the folder in which its images lie.

    Images without `file_name`, as those of LVIS, are called as in their `coco_url`. The folder is
    that in which most of some images are.

    Raises:
        DatasetError: There is no folder for images, and none of them is elsewhere; lists the
            folders that were searched.
    """
    listed: Any = content.images  # not checked yet
    if not isinstance(listed, list):
        return content
    file = Path(content.source)
    usual = [file.parent] if file.name == ROBOFLOW else _image_folders(root, split, file.stem)
    folders = [folder for folder in dict.fromkeys((*usual, file.parent, root)) if folder.is_dir()]
    best, most = (folders[0], listed), -1
    for images, folder in product(_named(listed), folders):
        count = _count_files(folder, images)
        if count > most:
            best, most = (folder, images), count
    if not most and not any(folder.is_dir() for folder in usual):
        looked = ", ".join(str(folder.relative_to(root)) for folder in usual)
        raise DatasetError(
            f"{root} has no image folder: looked for {looked}, and for the images of {file.name} "
            "in the folder itself"
        )
    return replace(content, image_folder=best[0], images=best[1])


def _image_folders(root: Path, split: str, stem: str) -> list[Path]:
    """The folders in which a split's images may be, the usual ones first."""
    plain = split.removeprefix("instances_").removeprefix("image_info_")
    plain = _YEAR.sub("", plain).removesuffix("-dev")  # test-dev is a part of test
    kinds = [plain, *NAMES.get(split_name(plain) or split_of_stem(stem), ())]
    names = [kind + year for kind in dict.fromkeys(kinds) if kind for year in _YEARS]
    images = root / "images"
    return [images, *(root / name for name in names), *(images / name for name in names)]


def _named(images: list[Any]) -> Iterator[list[Any]]:
    """The images as they are and, if some have only a URL or backslashes, with other names."""
    seen = []
    for parts, windows in product((2, 1), (False, True)):
        named = [_with_name(image, parts, windows) for image in images]
        if named not in seen:
            seen.append(named)
            yield named


def _with_name(image: Any, parts: int, windows: bool) -> Any:
    if not isinstance(image, dict):
        return image
    name = image.get("file_name")
    if name is None and "coco_url" in image:
        name = _end_of_url(image["coco_url"], parts)
    if windows and isinstance(name, str):
        name = name.replace("\\", "/")
    return image if name is None or name == image.get("file_name") else {**image, "file_name": name}


def _end_of_url(url: Any, parts: int) -> str | None:
    """The last parts of a URL's path; None if it has none."""
    try:
        path = unquote(urlsplit(url).path) if isinstance(url, str) else ""
    except ValueError:
        return None
    names = [name for name in path.split("/") if name not in ("", ".", "..")]
    return "/".join(names[-parts:]) or None


def _count_files(folder: Path, images: Sequence[Any]) -> int:
    """How many of some images, spread over the list, are in a folder."""
    places = np.unique(np.linspace(0, len(images) - 1, min(len(images), _INSPECTED)).astype(int))
    count = 0
    for place in places:
        name = images[place].get("file_name") if isinstance(images[place], dict) else None
        with suppress(OSError, ValueError):  # too long, or a NUL
            count += isinstance(name, str) and name != "" and (folder / name).is_file()
    return count
