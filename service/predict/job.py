"""A run over many images, several at a time."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import orjson
from PIL import Image

from service.pipeline.decode import decode_image
from service.pipeline.draw import draw_instances
from service.pipeline.errors import DecodeError
from service.pipeline.types import Instance
from service.predict.errors import ImageFailed
from service.predict.inputs import as_text
from service.predict.journal import Journal, stamp_of
from service.predict.predictors import Answer, Predictor


@dataclass(frozen=True)
class Item:
    """An image of a run.

    Attributes:
        file: The image.
        image_id: Of its results.
        overlay: Name of its picture, or None.
    """

    file: Path
    image_id: int
    overlay: str | None


def build_items(files: Sequence[Path], ids: Mapping[Path, int], *, overlays: bool) -> list[Item]:
    """The images that have an id, in their order."""
    return [
        Item(file, ids[file], f"{number:05d}_{file.stem}.png" if overlays else None)
        for number, file in enumerate(files, 1)
        if file in ids
    ]


@dataclass(frozen=True)
class Job:
    """All that one run needs.

    Attributes:
        predictor: Who finds the instances.
        journal: Where results go.
        overlays: Folder for pictures, or None.
        jobs: Images at once.
    """

    predictor: Predictor
    journal: Journal
    overlays: Path | None
    jobs: int

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

    def run(self, items: Sequence[Item]) -> Generator[tuple[Item, ImageFailed | None]]:
        """Does the images; tells of each when it is in the journal or has failed.

        What has begun when this is closed is finished.

        Raises:
            RunFailed: It is useless to go on.
            OSError: The journal cannot be written.
        """
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
            data = item.file.read_bytes()
        except OSError as error:
            return ImageFailed(str(error))
        try:
            answer = self.predictor.predict(data)
            if self.overlays is not None and item.overlay is not None:
                write_overlay(data, answer, self.overlays / item.overlay)
        except ImageFailed as error:
            return error
        self.journal.append(item.file, stamp, answer.served, answer.results, item.overlay)
        return None


def write_overlay(data: bytes, answer: Answer, file: Path) -> None:
    """Draws COCO results on their image.

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
    Image.fromarray(draw_instances(picture, instances, answer.task)).save(file)


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
                named = {"image_id": item.image_id, "file_name": as_text(Path(item.file.name))}
                file.write((b",\n" if count else b"\n") + orjson.dumps({**named, **result}))
                count += 1
        file.write(b"\n]\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(out)
    return count
