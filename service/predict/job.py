"""Processes the images of a run and stores what was found."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import orjson

from pipeline.decode import open_image
from pipeline.draw import draw_instances
from pipeline.encode import instance_from_coco
from pipeline.errors import DecodeError
from service.files import replacing
from service.jobs.errors import ImageUnusable, RunFailed, blame_image, describe
from service.jobs.files import ImageFile, LocalFile, as_line, as_text
from service.jobs.journal import Journal
from service.jobs.listing import Listing
from service.predict.outputs import START, encode_picture, write_picture
from service.predict.predictors import Prediction, Predictor
from service.predict.slide_journal import read_all_results
from service.predict.slides import SlideJob

MOST_BYTES = 2**30
"""Size of an image file; the largest that can be decoded is far smaller."""
_MOST_NAME_BYTES = 120
"""Of an image's name in the name of its picture; file systems allow 143 or 255 in all."""


@dataclass(frozen=True, slots=True)
class Item:
    """An image of a run.

    Attributes:
        file: The image.
        name: Its path in the results.
        image_id: COCO image id of its results.
        overlay: File name of the picture with its masks; None if none is drawn.
    """

    file: ImageFile
    name: str
    image_id: int
    overlay: str | None


def build_items(
    listing: Listing, ids: Sequence[int | ImageUnusable], *, overlays: bool
) -> list[Item]:
    """The items of the files that have an id, in the order of the files."""
    return [
        Item(file, listing.name_of(file), image_id, _name_overlay(number, file, overlays))
        for number, (file, image_id) in enumerate(zip(listing.files, ids, strict=True), 1)
        if isinstance(image_id, int)
    ]


def _name_overlay(number: int, file: ImageFile, overlays: bool) -> str | None:
    stem = as_line(file.stem).encode()[:_MOST_NAME_BYTES].decode(errors="ignore")
    return f"{number:05d}_{stem}.png" if overlays else None


class Run(Protocol):
    """A way to process images."""

    def run(self, items: Sequence[Item]) -> Generator[tuple[Item, ImageUnusable | None]]:
        """Processes the images; yields each one when it is in the journal or has failed.

        Closing the generator stops the run: an image in progress is completed or discarded.

        Raises:
            RunFailed: The remaining images would fail too, or the journal cannot be written.
            JournalDiffers: Another model or version found the images that are in the journal.
        """
        ...


@dataclass(frozen=True)
class Found:
    """What is stored for an image.

    Attributes:
        served: Model and version that were used, "name:version".
        results: COCO results without their image_id.
        truncated: Whether max_instances cut the results.
        picture: PNG with the masks, or None.
        warnings: `code` and `message` of each.
    """

    served: str
    results: list[dict[str, Any]]
    truncated: bool
    picture: bytes | None
    warnings: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True)
class Notes:
    """Stores what was found, and knows which images are complete.

    Attributes:
        journal: Stores the results.
        overlays: Folder for pictures, or None.
    """

    journal: Journal
    overlays: Path | None

    def find_open(self, items: Sequence[Item]) -> list[Item]:
        """The images that are not complete, e.g. because their file has changed."""
        return [item for item in items if not self._is_done(item)]

    def _is_done(self, item: Item) -> bool:
        entry = self.journal.find(item.file.key)
        try:
            if entry is None or entry["stamp"] != item.file.read_stamp():
                return False
            if self.overlays is None or item.overlay is None:
                return True
            return entry["overlay"] == item.overlay and (self.overlays / item.overlay).is_file()
        except OSError:
            return False

    def note(self, item: Item, stamp: list[int], found: Found) -> None:
        """Writes the picture, then the results: the picture of an image in the journal exists.

        Args:
            item: The image.
            stamp: Of its file when it was read.
            found: What was found in it.

        Raises:
            ImageUnusable: The picture or the results cannot be written.
            JournalDiffers: Another model or version found the images that are in the journal.
            RunFailed: The disk is full, or the journal cannot be written.
        """
        if self.overlays is not None and item.overlay is not None and found.picture is not None:
            write_picture(self.overlays / item.overlay, found.picture)
        properties = {
            "stamp": stamp,
            "overlay": item.overlay,
            "truncated": found.truncated,
            "warnings": [*found.warnings],
        }
        with blame_image():
            self.journal.append(
                item.file.key, found.results, served=found.served, properties=properties
            )

    def count_truncated(self, items: Sequence[Item]) -> int:
        """How many of these images, all of them complete, have results cut by max_instances."""
        entries = (self.journal.find(item.file.key) for item in items)
        return sum(entry is not None and entry["truncated"] for entry in entries)

    def collect_warnings(self, items: Sequence[Item]) -> dict[str, list[tuple[Item, str]]]:
        """The images of each warning's code, with the message."""
        found: dict[str, list[tuple[Item, str]]] = {}
        for item in items:
            entry = self.journal.find(item.file.key) or {}
            for warning in entry.get("warnings", ()):
                found.setdefault(warning["code"], []).append((item, warning["message"]))
        return found


def read_stamp(file: ImageFile) -> list[int]:
    """Size and modification time of an image file that can be read into memory.

    Raises:
        ImageUnusable: It does not exist, or is too large.
    """
    with blame_image():
        stamp = file.read_stamp()
    if stamp[0] > MOST_BYTES:
        raise ImageUnusable(f"the file has {stamp[0]} bytes, more than {MOST_BYTES}")
    return stamp


def read_data(file: ImageFile) -> bytes:
    """The content of an image file.

    Raises:
        ImageUnusable: It cannot be read, or is empty.
    """
    with blame_image():
        data = file.read()
    if not data:
        raise ImageUnusable("empty_image: the file is empty")
    return data


def find(predictor: Predictor, data: bytes, *, draw: bool) -> Found:
    """Segments an encoded image and, if `draw`, draws the masks.

    Raises:
        ImageUnusable: Any exception but RunFailed.
        RunFailed: From the predictor.
    """
    with blame_image():
        answer = predictor.predict(data)
        picture = draw_overlay(data, answer) if draw else None
        return Found(answer.served, answer.results, answer.truncated, picture, answer.warnings)


@dataclass(frozen=True)
class PredictJob:
    """A run in threads of this process.

    Attributes:
        predictor: Segments the images.
        notes: Stores the results.
        jobs: Number of threads: images in progress at once.
        slides: Processes images that are too large to be decoded at once; None: they fail.
    """

    predictor: Predictor
    notes: Notes
    jobs: int
    slides: SlideJob | None = None

    def run(self, items: Sequence[Item]) -> Generator[tuple[Item, ImageUnusable | None]]:
        """Processes the images in threads; images in progress are completed on closing."""
        waiting = iter(items)
        pool = ThreadPoolExecutor(self.jobs)
        try:
            running: dict[Future[ImageUnusable | None], Item] = {}
            while True:
                for item in islice(waiting, self.jobs - len(running)):
                    running[pool.submit(self._do, item)] = item
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    item = running.pop(future)
                    yield item, future.result()
        finally:
            pool.shutdown()

    def _do(self, item: Item) -> ImageUnusable | None:
        try:
            if self.slides is not None and self.slides.takes(item.file):
                assert isinstance(item.file, LocalFile)
                folder, name = self.notes.overlays, item.overlay
                picture = None if folder is None or name is None else folder / name
                self.slides.run(item.file, picture, self.notes.journal)
                return None
            stamp = read_stamp(item.file)
            data = read_data(item.file)
            self.notes.note(item, stamp, find(self.predictor, data, draw=item.overlay is not None))
        except ImageUnusable as error:
            return error
        return None


def draw_overlay(data: bytes, answer: Prediction) -> bytes:
    """Draws an image's COCO results on it.

    Returns:
        A PNG.

    Raises:
        ImageUnusable: It cannot be decoded here, e.g. because the server accepts larger images.
    """
    instances = [instance_from_coco(result, 0) for result in answer.results]
    try:
        picture = open_image(data, choice=answer.planes).decode()
    except DecodeError as error:
        raise ImageUnusable(f"no overlay: {error}") from error
    return encode_picture(draw_instances(picture, instances, answer.task))


def write_results(out: Path, items: Sequence[Item], journal: Journal) -> int:
    """Writes COCO results; the file is replaced only when the new one is complete.

    Args:
        out: The file.
        items: Images that are in the journal.
        journal: Has their results.

    Returns:
        The number of instances.

    Raises:
        KeyError: An image is not in the journal.
        RunFailed: The file cannot be written.
    """
    count = 0
    try:
        with replacing(out) as partial, partial.open("xb") as file:
            file.write(START)
            for item in items:
                for result in read_all_results(journal, item.file.key):
                    named = {"image_id": item.image_id, "file_name": as_text(item.name)}
                    file.write((b",\n" if count else b"") + orjson.dumps({**named, **result}))
                    count += 1
            file.write(b"\n]\n" if count else b"]\n")
    except OSError as error:
        raise RunFailed(f"cannot write {as_line(out)}: {describe(error)}") from error
    return count
