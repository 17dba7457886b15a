"""Slides: images too large to be decoded at once, processed by rows of tiles in constant memory.

Every row of tiles is in the journal when it is complete, together with the instances that may go on
in the next row, so that an interrupted run continues at the row where it stopped. Tiles lie where
they would if the slide were processed as a whole: the results are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import solo_client
from pipeline.calibration import to_reported
from pipeline.decode import MAX_PIXELS
from pipeline.encode import instance_from_coco, instance_to_coco
from pipeline.errors import DecodeError
from pipeline.formats.picture import PlanePicture, PlaneStack, open_picture
from pipeline.formats.stacks import open_stack
from pipeline.formats.zarr_stack import ZarrStack
from pipeline.merge import TileInstance, intersect
from pipeline.merge_stream import StreamMerger, StreamResolver
from pipeline.model_config import ModelConfig, TileResize
from pipeline.overview import draw_overview
from pipeline.postprocess import Collector
from pipeline.preprocess import prepare_regions, windows_of
from pipeline.runs import MAX_MASK_PIXELS, is_long
from pipeline.survey import Survey, survey
from pipeline.types import Detection, Prepared, UInt8, Window
from service.jobs.errors import ImageUnusable, blame_image
from service.jobs.files import ImageFile, LocalFile
from service.jobs.journal import Journal
from service.jobs.zarr_folder import FolderFiles
from service.models.repository import LoadedModel
from service.predict.outputs import encode_picture, write_picture
from service.predict.slide_journal import (
    SlideState,
    name_part,
    name_state,
    read_parts,
    read_state,
    read_survey,
    write_state,
    write_survey,
)
from service.work.request import RequestOptions

_SUFFIX_NDPI = ".ndpi"


@contextmanager
def open_planes(file: LocalFile) -> Iterator[PlaneStack | None]:
    """The planes of a local file that may have several, read as they are needed; else None.

    Raises:
        OSError, DecodeError: It cannot be read.
    """
    if file.is_zarr:
        yield ZarrStack(FolderFiles(file.path))
        return
    with open(file.path, "rb") as opened:
        size = opened.seek(0, 2)
        yield open_stack(opened, size, is_ndpi=file.path.lower().endswith(_SUFFIX_NDPI))


def read_stack_hw(file: ImageFile) -> tuple[int, int] | None:
    """Height and width of the upright planes of a local file that may have several; else None.

    Raises:
        OSError, DecodeError: It cannot be read.
    """
    if not isinstance(file, LocalFile):
        return None
    with open_planes(file) as stack:
        if stack is None:
            return None
        hw = stack.height, stack.width
        return hw[::-1] if stack.orientation > 4 else hw


@dataclass(frozen=True)
class SlideOptions:
    """How slides are processed.

    Attributes:
        region: Instances whose boxes have their centres in it are wanted; None: all.
        find_tissue: Tiles that show only background are left out.
        takes_long_runs: The results are not written as run lengths, which may exceed 32 bits.
    """

    region: Window | None = None
    find_tissue: bool = True
    takes_long_runs: bool = False


@dataclass(frozen=True)
class _Plan:
    """The tiles of a slide.

    Attributes:
        image_hw: Height and width of the slide.
        rows, columns: First rows and columns of the tiles, px.
        tile_hw: Height and width of a tile, px.
        region: As in `SlideOptions`.
        seen: The survey of the slide.
    """

    image_hw: tuple[int, int]
    rows: Sequence[int]
    columns: Sequence[int]
    tile_hw: tuple[int, int]
    region: Window | None
    seen: Survey

    def takes(self, window: Window) -> bool:
        """Whether a tile is processed: those of the region and their neighbours, with tissue."""
        if self.region is not None and not _touches(_grow(self.region, self.tile_hw), window):
            return False
        return self.seen.shows_tissue(window)

    def window(self, row: int, column: int) -> Window:
        """The region of the slide that a tile shows."""
        return Window(self.rows[row], self.columns[column], *self.tile_hw)

    def list_rows(self) -> list[tuple[int, list[int]]]:
        """Rows of tiles, each with the columns that are processed; rows without any are absent."""
        found = []
        for row in range(len(self.rows)):
            columns = [c for c in range(len(self.columns)) if self.takes(self.window(row, c))]
            if columns:
                found.append((row, columns))
        return found

    def owns(self, instance: Detection) -> bool:
        """Whether an instance's centre is in the region."""
        if self.region is None:
            return True
        x, y, width, height = instance.bbox_xywh
        centre = Window(2 * y + height, 2 * x + width, 1, 1)
        region = self.region
        doubled = Window(2 * region.y, 2 * region.x, 2 * region.height, 2 * region.width)
        return _touches(doubled, centre)


def _grow(region: Window, by_hw: tuple[int, int]) -> Window:
    height, width = by_hw
    return Window(
        region.y - height, region.x - width, region.height + 2 * height, region.width + 2 * width
    )


def _touches(a: Window, b: Window) -> bool:
    return (
        a.y < b.y + b.height
        and b.y < a.y + a.height
        and a.x < b.x + b.width
        and b.x < a.x + a.width
    )


@dataclass(frozen=True)
class SlideJob:
    """Processes slides with a model in this process.

    Attributes:
        model: The model.
        asked: Limits of the results, planes and scale.
        options: Region and tissue.
        on_progress: Called after every batch of tiles.
    """

    model: LoadedModel
    asked: RequestOptions
    options: SlideOptions
    on_progress: Callable[[solo_client.Progress], None]

    def takes(self, file: ImageFile) -> bool:
        """Whether a file is a slide: a TIFF, Zarr or DICOM of more pixels than are decoded at once.

        Raises:
            ImageUnusable: A region is wanted of another file.
        """
        if isinstance(file, LocalFile):
            try:
                with open_planes(file) as stack:
                    if stack is not None:
                        is_large = stack.height * stack.width > MAX_PIXELS
                        return is_large or self.options.region is not None
            except (OSError, DecodeError):  # reading it as an image gives the reason
                return False
        if self.options.region is not None:
            raise ImageUnusable("--region is for local TIFF, OME-Zarr and DICOM files")
        return False

    def run(self, file: LocalFile, picture: Path | None, journal: Journal) -> None:
        """Processes a slide, or what is left of it.

        Args:
            file: The slide.
            picture: Where its picture with the masks is written, reduced; None: nowhere.
            journal: Has the rows that are complete.

        Raises:
            ImageUnusable: The slide cannot be processed.
            RunFailed: The journal cannot be written.
        """
        with blame_image():
            stamp = file.read_stamp()
            try:
                with open_planes(file) as stack:
                    assert stack is not None
                    slide = open_picture(b"", stack, self.asked.planes)
                    self._process(slide, file.key, stamp, picture, journal)
            except DecodeError as error:
                raise ImageUnusable(f"{error.code}: {error}") from error

    def _process(
        self,
        slide: PlanePicture,
        key: str,
        stamp: list[int],
        picture: Path | None,
        journal: Journal,
    ) -> None:
        config = self._adapt(slide)
        image_hw = slide.height, slide.width
        seen = self._survey(slide, key, stamp, journal)
        rows, columns, tile_hw = windows_of(image_hw, config.input)
        plan = _Plan(image_hw, rows, columns, tile_hw, self.options.region, seen)
        prepared = prepare_regions(
            lambda window: _read(slide, window, seen), image_hw, config.input, seen.table
        )
        taken = plan.list_rows()
        state = read_state(key, stamp, journal)
        merger = StreamMerger(config.postprocess.compare, state.waiting)
        resolver = StreamResolver(self.asked.overlaps, state.merged)
        clock = _Clock(taken, state.done, self.on_progress)
        for number in range(state.done, len(taken)):
            row, kept = taken[number]
            found, is_cut = self._search(plan, prepared, row, kept, clock)
            next_y = rows[taken[number + 1][0]] if number + 1 < len(taken) else None
            complete = resolver.add(merger.add(found, next_y), merger.first_open(next_y))
            complete = [instance for instance in complete if plan.owns(instance)]
            is_cut |= state.truncated
            state = SlideState(number + 1, is_cut, merger.waiting, resolver.waiting)
            journal.append(
                name_part(key, number), self._encode(complete), served=self._served, properties={}
            )
            properties = {"stamp": stamp, **write_state(state)}
            journal.append(name_state(key), [], served=self._served, properties=properties)
        if picture is not None:
            self._draw(slide, seen, picture, read_parts(journal, key, len(taken)))
        overlay = None if picture is None else picture.name
        properties = {"stamp": stamp, "overlay": overlay, "truncated": state.truncated}
        properties["parts"] = len(taken)
        journal.append(key, [], served=self._served, properties=properties)

    def _draw(
        self, slide: PlanePicture, seen: Survey, path: Path, results: Iterable[dict[str, Any]]
    ) -> None:
        ordered = sorted(results, key=lambda result: -result["score"])
        whole = Window(0, 0, slide.height, slide.width)
        region = self.options.region
        drawn = draw_overview(
            lambda window: _read(slide, window, seen),
            whole if region is None else intersect(region, whole),
            (instance_from_coco(result, 0) for result in ordered),
            self.model.config.task,
        )
        write_picture(path, encode_picture(drawn))

    @property
    def _served(self) -> str:
        return f"{self.model.config.name}:{self.model.version}"

    def _adapt(self, slide: PlanePicture) -> ModelConfig:
        """The model's configuration for a slide.

        Raises:
            ImageUnusable: The slide cannot be processed by tiles.
        """
        config = self.asked.adapt(self.model.config)
        config = self.asked.adapt_to(config, slide.um_per_px)
        if not isinstance(config.input.resize, TileResize):
            raise ImageUnusable("a slide needs a model with tiles; this one resizes every image")
        if any(len(planes) > 1 for planes in slide.picture.planes):
            raise ImageUnusable("--z max is not possible for a slide")
        if slide.orientation != 1:
            raise ImageUnusable(f"a slide of orientation {slide.orientation} is not read")
        self._check_size(slide)
        region = self.options.region
        if region is not None and not _touches(region, Window(0, 0, slide.height, slide.width)):
            raise ImageUnusable(
                f"the region {region} is outside the slide of {slide.width}x{slide.height} px"
            )
        return config

    def _check_size(self, slide: PlanePicture) -> None:
        size = f"the slide has {slide.width}x{slide.height} px"
        if slide.height * slide.width > MAX_MASK_PIXELS:
            raise ImageUnusable(f"{size}, more than {MAX_MASK_PIXELS}")
        if not is_long(slide.height, slide.width):
            return
        if not self.options.takes_long_runs:
            raise ImageUnusable(
                f"{size}: run lengths of 2^32 px and more cannot be read by pycocotools; use "
                "--format geojson, ome-tiff, ome-zarr or another without them"
            )
        if self.model.backend.device != "cpu":
            raise ImageUnusable(f"{size}: slides of 2^32 px and more need --device cpu")

    def _survey(self, slide: PlanePicture, key: str, stamp: list[int], journal: Journal) -> Survey:
        """The survey of a slide, which is made once."""
        name = f"survey//{key}"
        entry = journal.find(name)
        if entry is None or entry["stamp"] != stamp:
            contrast = self.model.config.input.contrast
            made = survey(slide, contrast, find_tissue=self.options.find_tissue)
            entry = {"stamp": stamp, **write_survey(made)}
            journal.append(name, [], served=self._served, properties=entry)
        return read_survey(entry)

    def _search(
        self, plan: _Plan, prepared: Prepared, row: int, kept: Sequence[int], clock: _Clock
    ) -> tuple[list[TileInstance], bool]:
        """Instances of a row of tiles, and whether max_instances cut those of any tile."""
        config = self.model.config
        collector = Collector(
            plan.image_hw,
            len(prepared.tiles),
            config.postprocess,
            score_threshold=self.asked.score_threshold,
            max_instances=self.asked.max_instances,
            calibration=config.calibration,
        )
        found: list[TileInstance] = []
        is_cut = False
        for start in range(0, len(kept), config.limits.max_batch):
            columns = kept[start : start + config.limits.max_batch]
            tiles = [prepared.tiles[row * len(plan.columns) + column] for column in columns]
            for tile, candidates in zip(tiles, self.model.backend.infer(tiles), strict=True):
                searched = collector.search(tile, candidates)
                found += [_keep_own(entry, plan) for entry in searched.entries]
                is_cut |= searched.found > len(searched.entries)
            clock.advance(len(columns))
        return found, is_cut

    def _encode(self, instances: Sequence[Detection]) -> list[dict[str, Any]]:
        config = self.model.config
        if config.calibration is not None:
            instances = [
                replace(i, score=to_reported(config.calibration, i.score)) for i in instances
            ]
        return [instance_to_coco(instance, config) for instance in instances]


def _keep_own(entry: TileInstance, plan: _Plan) -> TileInstance:
    """An instance that is not left to a tile that is not processed."""
    if entry.elsewhere is None or plan.takes(entry.elsewhere):
        return entry
    return replace(entry, elsewhere=None)


def _read(slide: PlanePicture, window: Window, seen: Survey) -> UInt8:
    return slide.convert(slide.read(window), seen.limits)


class _Clock:
    """Reports progress in tiles."""

    def __init__(
        self,
        taken: Sequence[tuple[int, Sequence[int]]],
        done: int,
        report: Callable[[solo_client.Progress], None],
    ) -> None:
        self._total = sum(len(columns) for _, columns in taken)
        self._before = self._done = sum(len(columns) for _, columns in taken[:done])
        self._began_s = time.monotonic()
        self._report = report

    def advance(self, tiles: int) -> None:
        self._done += tiles
        elapsed_s = time.monotonic() - self._began_s
        rest_s = elapsed_s / (self._done - self._before) * (self._total - self._done)
        self._report(solo_client.Progress(self._done, self._total, elapsed_s, rest_s))
