"""Writes results in an output format: a document, or a folder with a file for each image."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.decode import open_image
from pipeline.encode import instance_from_coco
from pipeline.errors import DecodeError, WriteError
from pipeline.writers import Classes, OutputFormat, Page, name_files
from service.errors import StartupError
from service.files import replacing
from service.jobs.errors import ImageUnusable, RunFailed, describe
from service.jobs.files import as_line, as_text
from service.jobs.journal import Journal
from service.predict.job import Item, read_data
from service.predict.outputs import REPLACED, UNFINISHED
from service.predict.slide_journal import read_all_results
from service.predict.slides import read_stack_hw

MARK = ".solo-predict"
"""A file in each folder that is written here, so that a later run may replace it."""
_IMAGES = "images"


@dataclass(frozen=True, kw_only=True)
class DocumentPlan:
    """How results are written.

    Attributes:
        format: The output format.
        simplify_px: Outlines may be off so far.
        um_per_px: Size of a pixel, if it is known.
        copy_images: Whether a folder also gets the images, so that it is a data set.
    """

    format: OutputFormat
    simplify_px: float = 0.0
    um_per_px: float | None = None
    copy_images: bool = False

    @property
    def is_folder(self) -> bool:
        """Whether each image has a file of its own."""
        return self.format.join is None

    @property
    def start(self) -> bytes:
        """What every document of the format begins with."""
        assert self.format.join is not None
        return next(iter(self.format.join((), ())))

    def check_folder(self, out: Path) -> None:
        """Checks that a folder can be written.

        Raises:
            StartupError: It is a file, or a folder that another program has filled.
        """
        if out.exists() and not out.is_dir():
            raise StartupError(
                f"--out {out} is a file; --format {self.format.name} writes a folder"
            )
        if out.is_dir() and not (out / MARK).is_file() and any(out.iterdir()):
            raise StartupError(
                f"--out {out} is not empty and was not written by this command; name another folder"
            )

    def write(self, out: Path, items: Sequence[Item], journal: Journal, classes: Classes) -> int:
        """Writes the file or folder, which takes the place of `out` when it is complete.

        Args:
            out: The file or folder.
            items: Images that are in the journal.
            journal: Has their results.
            classes: The model's.

        Returns:
            The number of instances.

        Raises:
            RunFailed: It cannot be written; the message names the image if it is one's fault.
        """
        pages = _Pages(self, items, journal, classes)
        try:
            if self.is_folder:
                with replace_folder(out) as folder:
                    self._fill(folder, pages)
            else:
                assert self.format.join is not None
                encode = self.format.encode
                parts = ((item.image_id, encode(page)) for item, _, page in pages)
                with replacing(out) as partial, partial.open("xb") as file:
                    file.writelines(self.format.join(classes, parts))
        except (WriteError, ImageUnusable, DecodeError) as error:
            raise RunFailed(f"{as_line(pages.current)}: {error}") from error
        except OSError as error:
            raise RunFailed(f"cannot write {as_line(out)}: {describe(error)}") from error
        return pages.instances

    def _fill(self, folder: Path, pages: _Pages) -> None:
        (folder / MARK).write_text(f"{self.format.name}\n")
        for name, data in self.format.add_files(pages.classes).items():
            (folder / name).write_bytes(data)
        for item, stem, page in pages:
            path = folder / self.format.folder / f"{stem}{self.format.suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                self.format.write(page, file)
            if self.copy_images:
                copied = folder / _IMAGES / f"{stem}{_suffix_of(item)}"
                copied.parent.mkdir(parents=True, exist_ok=True)
                copied.write_bytes(read_data(item.file))


@dataclass
class _Pages:
    """The pages of a run, read from the journal while they are written.

    Attributes:
        instances: Of the pages so far.
        current: Name of the image of the last page.
    """

    plan: DocumentPlan
    items: Sequence[Item]
    journal: Journal
    classes: Classes
    instances: int = 0
    current: str = ""

    def __iter__(self) -> Iterator[tuple[Item, str, Page]]:
        """Each image, the path of its files without suffix, and its page.

        Raises:
            ImageUnusable, DecodeError: The size of an image cannot be read.
        """
        stems = name_files((as_text(i.name) for i in self.items), self.plan.format.suffix)
        for item, stem in zip(self.items, stems, strict=True):
            self.current = item.name
            page = self._build(item, stem)
            self.instances += len(page.instances)
            yield item, stem, page

    def _build(self, item: Item, stem: str) -> Page:
        results = list(read_all_results(self.journal, item.file.key))
        results.sort(key=lambda result: -result["score"])  # those of a slide are by rows of tiles
        labels = {spec.category_id: label for label, spec in enumerate(self.classes)}
        copied = f"{stem}{_suffix_of(item)}"
        return Page(
            name=copied if self.plan.copy_images else as_text(item.name),
            image_hw=_read_hw(item, results),
            instances=[instance_from_coco(r, labels[r["category_id"]]) for r in results],
            classes=self.classes,
            simplify_px=self.plan.simplify_px,
            um_per_px=self.plan.um_per_px,
        )


def _read_hw(item: Item, results: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Height and width of the upright image; without masks from its file."""
    if results:
        height, width = results[0]["segmentation"]["size"]
        return height, width
    stack_hw = read_stack_hw(item.file)
    return stack_hw or open_image(read_data(item.file)).upright_hw


def _suffix_of(item: Item) -> str:
    return PurePosixPath(as_line(item.name)).suffix.lower()


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` at the end of the block.

    After an exception `path` is as before.

    Raises:
        OSError: It cannot be written.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir()
    try:
        yield unfinished
        before = path.with_name(path.name + REPLACED)
        shutil.rmtree(before, ignore_errors=True)
        if path.exists():
            path.rename(before)
        unfinished.rename(path)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
