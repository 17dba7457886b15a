"""Processes the images of a run and stores what was found."""

from __future__ import annotations

import io
import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import orjson
from PIL import Image

from pipeline.decode import decode_image
from pipeline.draw import draw_instances
from pipeline.errors import DecodeError
from pipeline.types import Detection
from service.predict.errors import ImageUnusable
from service.predict.files import ImageFile, as_text, key_of, read_file, stamp_of
from service.predict.journal import Journal
from service.predict.predictors import Prediction, Predictor


@dataclass(frozen=True)
class Item:
    """An image of a run.

    Attributes:
        file: The image.
        image_id: COCO image id of its results.
        overlay: File name of the picture with its masks; None if none is drawn.
    """

    file: ImageFile
    image_id: int
    overlay: str | None


def build_items(
    files: Sequence[ImageFile], ids: Mapping[ImageFile, int], *, overlays: bool
) -> list[Item]:
    """The items of the files that have an id, in the order of the files."""
    return [
        Item(file, ids[file], f"{number:05d}_{file.stem}.png" if overlays else None)
        for number, file in enumerate(files, 1)
        if file in ids
    ]


class Run(Protocol):
    """A way to process images."""

    def run(self, items: Sequence[Item]) -> Generator[tuple[Item, ImageUnusable | None]]:
        """Processes the images; yields each one when it is in the journal or has failed.

        Closing the generator stops the run: an image in progress is completed or discarded.

        Raises:
            RunFailed: The remaining images would fail too.
            JournalDiffers: Another model or version found the images that are in the journal.
            OSError: The journal or a picture cannot be written.
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
    """

    served: str
    results: list[dict[str, Any]]
    truncated: bool
    picture: bytes | None


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
        entry = self.journal.find(key_of(item.file))
        try:
            if entry is None or entry["stamp"] != stamp_of(item.file):
                return False
        except OSError:
            return False
        if self.overlays is None or item.overlay is None:
            return True
        return entry["overlay"] == item.overlay and (self.overlays / item.overlay).is_file()

    def note(self, item: Item, stamp: list[int], found: Found) -> None:
        """Writes the picture, then the results: the picture of an image in the journal exists.

        Args:
            item: The image.
            stamp: Of its file when it was read.
            found: What was found in it.

        Raises:
            JournalDiffers: Another model or version found the images that are in the journal.
            OSError: A file cannot be written.
        """
        if self.overlays is not None and item.overlay is not None and found.picture is not None:
            (self.overlays / item.overlay).write_bytes(found.picture)
        properties = {"stamp": stamp, "overlay": item.overlay, "truncated": found.truncated}
        self.journal.append(
            key_of(item.file), found.results, served=found.served, properties=properties
        )

    def count_truncated(self, items: Sequence[Item]) -> int:
        """How many of these images, all of them complete, have results cut by max_instances."""
        entries = (self.journal.find(key_of(item.file)) for item in items)
        return sum(entry is not None and entry["truncated"] for entry in entries)


def find(predictor: Predictor, data: bytes, *, draw: bool) -> Found:
    """Segments an encoded image and, if `draw`, draws the masks.

    Raises:
        ImageUnusable, RunFailed: From the predictor.
    """
    answer = predictor.predict(data)
    picture = draw_overlay(data, answer) if draw else None
    return Found(answer.served, answer.results, answer.truncated, picture)


@dataclass(frozen=True)
class PredictJob:
    """A run in threads of this process.

    Attributes:
        predictor: Segments the images.
        notes: Stores the results.
        jobs: Number of threads: images in progress at once.
    """

    predictor: Predictor
    notes: Notes
    jobs: int

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
            stamp = stamp_of(item.file)
            data = read_file(item.file)
        except OSError as error:
            return ImageUnusable(str(error))
        try:
            found = find(self.predictor, data, draw=item.overlay is not None)
        except ImageUnusable as error:
            return error
        self.notes.note(item, stamp, found)
        return None


def draw_overlay(data: bytes, answer: Prediction) -> bytes:
    """Draws an image's COCO results on it.

    Returns:
        A PNG.

    Raises:
        ImageUnusable: It cannot be decoded here, e.g. because the server accepts larger images.
    """
    instances = [
        Detection(
            label=0,
            score=result["score"],
            rle={**result["segmentation"], "counts": result["segmentation"]["counts"].encode()},
            bbox_xywh=tuple(result["bbox"]),
            area=result["area"],
        )
        for result in answer.results
    ]
    try:
        picture = decode_image(data)
    except DecodeError as error:
        raise ImageUnusable(f"no overlay: {error}") from error
    file = io.BytesIO()
    Image.fromarray(draw_instances(picture, instances, answer.task)).save(file, "PNG")
    return file.getvalue()


def write_results(out: Path, items: Sequence[Item], journal: Journal) -> int:
    """Writes COCO results; `out` is replaced only when the new file is complete.

    Args:
        out: The file.
        items: Images that are in the journal.
        journal: Has their results.

    Returns:
        The number of instances.

    Raises:
        KeyError: An image is not in the journal.
        OSError: The file cannot be written.
    """
    count = 0
    unfinished = out.with_name(out.name + ".tmp")
    with open(unfinished, "wb") as file:
        file.write(b"[")
        for item in items:
            for result in journal.read_results(key_of(item.file)):
                named = {"image_id": item.image_id, "file_name": as_text(item.file.name)}
                file.write((b",\n" if count else b"\n") + orjson.dumps({**named, **result}))
                count += 1
        file.write(b"\n]\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(out)
    return count
