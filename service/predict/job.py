"""A run over many images, several at a time."""

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
from pipeline.types import Instance
from service.predict.errors import ImageFailed
from service.predict.files import ImageFile, as_text, read_file, stamp_of
from service.predict.journal import Journal
from service.predict.predictors import Answer, Predictor


@dataclass(frozen=True)
class Item:
    """An image of a run.

    Attributes:
        file: The image.
        image_id: Of its results.
        overlay: Name of its picture, or None.
    """

    file: ImageFile
    image_id: int
    overlay: str | None


def build_items(
    files: Sequence[ImageFile], ids: Mapping[ImageFile, int], *, overlays: bool
) -> list[Item]:
    """The images that have an id, in their order."""
    return [
        Item(file, ids[file], f"{number:05d}_{file.stem}.png" if overlays else None)
        for number, file in enumerate(files, 1)
        if file in ids
    ]


class Run(Protocol):
    """How images are done."""

    def run(self, items: Sequence[Item]) -> Generator[tuple[Item, ImageFailed | None]]:
        """Does the images; tells of each when it is in the journal or has failed.

        What has begun when this is closed is finished or forgotten, never half in the journal.

        Raises:
            RunFailed: It is useless to go on.
            OSError: The journal cannot be written.
        """
        ...


@dataclass(frozen=True)
class Found:
    """What is kept of an image.

    Attributes:
        served: Model and version that found it, "name:version".
        results: COCO results without their image_id.
        picture: PNG with the masks, or None.
    """

    served: str
    results: list[dict[str, Any]]
    picture: bytes | None


@dataclass(frozen=True)
class Notes:
    """Where what is done goes.

    Attributes:
        journal: Has the results.
        overlays: Folder for pictures, or None.
    """

    journal: Journal
    overlays: Path | None

    def find_open(self, items: Sequence[Item]) -> list[Item]:
        """Those that are not done yet."""
        return [item for item in items if not self._is_done(item)]

    def _is_done(self, item: Item) -> bool:
        entry = self.journal.find(item.file)
        try:
            if entry is None or entry.stamp != stamp_of(item.file):
                return False
        except OSError:
            return False
        if self.overlays is None or item.overlay is None:
            return True
        return entry.overlay == item.overlay and (self.overlays / item.overlay).is_file()

    def note(self, item: Item, stamp: list[int], found: Found) -> None:
        """Writes the picture, then the results: an image in the journal is done.

        Raises:
            RunFailed: It was found by another model or version than the others.
            OSError: It cannot be written.
        """
        if self.overlays is not None and item.overlay is not None and found.picture is not None:
            (self.overlays / item.overlay).write_bytes(found.picture)
        self.journal.append(item.file, stamp, found.served, found.results, item.overlay)


def find(predictor: Predictor, data: bytes, *, draw: bool) -> Found:
    """Segments an encoded image and, if asked, draws what was found.

    Raises:
        ImageFailed, RunFailed: As the predictor does.
    """
    answer = predictor.predict(data)
    return Found(answer.served, answer.results, draw_overlay(data, answer) if draw else None)


@dataclass(frozen=True)
class Job:
    """A run in this process's threads.

    Attributes:
        predictor: Who finds the instances.
        notes: Where they go.
        jobs: Images at once.
    """

    predictor: Predictor
    notes: Notes
    jobs: int

    def run(self, items: Sequence[Item]) -> Generator[tuple[Item, ImageFailed | None]]:
        """See `Run`; what has begun when this is closed is finished."""
        waiting = iter(items)
        pool = ThreadPoolExecutor(self.jobs)
        try:
            running: dict[Future[ImageFailed | None], Item] = {}
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

    def _do(self, item: Item) -> ImageFailed | None:
        try:
            stamp = stamp_of(item.file)
            data = read_file(item.file)
        except OSError as error:
            return ImageFailed(str(error))
        try:
            found = find(self.predictor, data, draw=item.overlay is not None)
        except ImageFailed as error:
            return error
        self.notes.note(item, stamp, found)
        return None


def draw_overlay(data: bytes, answer: Answer) -> bytes:
    """COCO results drawn on their image.

    Returns:
        A PNG.

    Raises:
        ImageFailed: It cannot be decoded here, e.g. because the server takes larger ones.
    """
    instances = [
        Instance(
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
        raise ImageFailed(f"no overlay: {error}") from error
    file = io.BytesIO()
    Image.fromarray(draw_instances(picture, instances, answer.task)).save(file, "PNG")
    return file.getvalue()


def write_results(out: Path, items: Sequence[Item], journal: Journal) -> int:
    """Writes COCO results; `out` is there whole or not at all.

    Args:
        out: The file.
        items: Images that are in the journal.
        journal: Has their results.

    Returns:
        How many instances.
    """
    count = 0
    unfinished = out.with_name(out.name + ".tmp")
    with open(unfinished, "wb") as file:
        file.write(b"[")
        for item in items:
            for result in journal.read_results(item.file):
                named = {"image_id": item.image_id, "file_name": as_text(item.file.name)}
                file.write((b",\n" if count else b"\n") + orjson.dumps({**named, **result}))
                count += 1
        file.write(b"\n]\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(out)
    return count
