"""One image: its size and cost, opening, canvases, the answer."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import BinaryIO, NoReturn

import numpy as np
import orjson
import pytest
from PIL import Image

from pipeline.errors import CorruptImage, ImageTooLarge, UnsupportedFormat, WriteError
from pipeline.model_config import ModelConfig
from pipeline.repository_config import parse_model_config
from pipeline.types import Candidates, Tile, UInt8
from pipeline.writers import FORMATS, Page
from service.errors import EngineError, InvalidParameter, TooManyCanvases
from service.work.image import Dropped, ImageWork, count_cost, fail, peek_size, read_image_header
from service.work.request import ImageFile, Outcome, RequestOptions
from tests.support.blob_model import (
    CLASSES,
    KEEP_RATIO_INPUT,
    STRIDE,
    build_graph,
    draw_picture,
    encode_picture,
    model_config,
)
from tests.support.canvases import CONFIG, build_config


def read_config(**changes: object) -> ModelConfig:
    content = {**model_config(build_graph()), **changes}
    return parse_model_config(json.dumps(content)).for_version(1)


TILES, WHOLE = read_config(), read_config(input=KEEP_RATIO_INPUT)


def find_colours(tile: Tile) -> Candidates:
    """What the graph of the blob model answers, in numpy."""
    height, width = (size // STRIDE for size in tile.image.shape[:2])
    blocks = tile.image.reshape(height, STRIDE, width, STRIDE, 3).mean((1, 3)) / 255
    probs = blocks.transpose(2, 0, 1).astype(np.float32)
    scores = (probs > 0.5).any((1, 2)).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    return Candidates(scores[order], np.arange(len(CLASSES))[order], probs[order])


def build(data: bytes | UInt8, config: ModelConfig = TILES, **options: object) -> ImageWork:
    size = peek_size(data) or read_image_header(data, 10_000_000).hw
    canvases = count_cost(size, config.input, 1000)
    scaled = bool(options.pop("scaled", False))
    return ImageWork(
        ImageFile("a.png", data),
        size,
        canvases,
        config,
        RequestOptions(**options),  # type: ignore[arg-type]
        scaled=scaled,
    )


def run(work: ImageWork, order: list[int] | None = None) -> Outcome:
    """Takes an image through all of its steps."""
    work.open()
    for index in order or range(work.canvases):
        tile, _ = work.make_canvas(index)
        work.search(index, tile, find_colours(tile), (1.0, 2.0), 0.5)
    return work.finish(0.0)


def build_photo() -> bytes:
    y, x = np.mgrid[:900, :1200] / 90
    pixels = np.uint8(127 + 120 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=2))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


class TestSize:
    def test_sizes_are_read_without_decoding(self) -> None:
        picture = draw_picture(30, 40)
        assert peek_size(encode_picture(picture)) == peek_size(picture) == (30, 40)
        header = read_image_header(encode_picture(picture), 1200)
        assert header == read_image_header(picture, 1) and header.hw == (30, 40)
        assert peek_size(b"no image") is None
        with pytest.raises(UnsupportedFormat):
            read_image_header(b"no image", 1200)
        with pytest.raises(ImageTooLarge, match="40x30"):
            read_image_header(encode_picture(picture), 1199)

    def test_the_cost_is_the_number_of_canvases(self) -> None:
        assert count_cost((64, 64), CONFIG.input, 256) == 256
        assert count_cost((6400, 6400), WHOLE.input, 1) == 1
        with pytest.raises(TooManyCanvases) as caught:
            count_cost((4, 1028), CONFIG.input, 256)
        assert "1028x4 px needs 257 canvases, the server allows 256" in str(caught.value)

    def test_the_cost_covers_both_orientations(self) -> None:
        spec = build_config(4, 8).input
        assert count_cost((4, 64), spec, 99) == count_cost((64, 4), spec, 99) == 16


class TestOpen:
    def test_pixels_and_their_file_become_the_same_canvases(self) -> None:
        picture = draw_picture(70, 100)
        works = [build(encode_picture(picture)), build(picture)]
        for work in works:
            work.open()
        assert works[0].canvases == works[1].canvases > 1
        for index in range(works[0].canvases):
            (a, _), (b, _) = (work.make_canvas(index) for work in works)
            assert (a.image == b.image).all() and a.window == b.window

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    def test_the_answer_says_how_the_image_was_turned(self, kind: str) -> None:
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[0x0112] = 6
        Image.fromarray(draw_picture(30, 40)).save(buffer, kind, exif=exif)
        for data, size, orientation in (
            (buffer.getvalue(), (30, 40), 6),
            (encode_picture(draw_picture(30, 40)), (40, 30), 1),
            (draw_picture(30, 40), (40, 30), 1),
        ):
            entry = orjson.loads(run(build(data)).payload)
            assert (entry["width"], entry["height"]) == size
            assert entry["orientation"] == orientation

    def test_scaled_decoding_gives_nearly_the_same_canvas(self) -> None:
        data = build_photo()
        tiles = []
        for scaled in (False, True):
            work = build(data, WHOLE, scaled=scaled)
            work.open()
            tiles.append(work.make_canvas(0)[0])
        a, b = tiles
        assert (a.window, a.valid_hw, a.image.shape) == (b.window, b.valid_hw, b.image.shape)
        assert (a.window.height, a.window.width) == (900, 1200)
        difference = np.abs(a.image.astype(int) - b.image)
        assert difference.max() > 0 and difference.mean() < 2

    def test_an_image_is_decoded_whole_unless_told_otherwise(self) -> None:
        data = build_photo()
        works = [
            ImageWork(ImageFile(None, data), (900, 1200), 1, WHOLE, RequestOptions()),
            build(data, WHOLE, scaled=False),
        ]
        for work in works:
            work.open()
        a, b = (work.make_canvas(0)[0].image for work in works)
        assert (a == b).all()

    def test_an_image_larger_than_admitted_is_refused(self) -> None:
        data = encode_picture(draw_picture(30, 40))
        small = ImageWork(ImageFile(None, data), (30, 39), 9, TILES, RequestOptions())
        with pytest.raises(ImageTooLarge, match="40x30"):
            small.open()
        few = ImageWork(ImageFile(None, draw_picture(4, 8)), (4, 8), 1, CONFIG, RequestOptions())
        with pytest.raises(CorruptImage, match="larger than its header says"):
            few.open()

    def test_the_number_of_canvases_is_corrected(self) -> None:
        work = ImageWork(ImageFile(None, draw_picture(4, 8)), (4, 8), 7, CONFIG, RequestOptions())
        work.open()
        assert work.canvases == 2


class TestAnswer:
    def test_the_answer_does_not_depend_on_the_order_of_the_canvases(self) -> None:
        boxes = {"red": (4, 4, 20, 20), "blue": (40, 30, 150, 8)}
        data = encode_picture(draw_picture(150, 200, boxes))
        straight = run(build(data))
        canvases = straight.canvases
        back = run(build(data), list(range(canvases))[::-1])
        assert straight.payload == back.payload
        entry = orjson.loads(straight.payload)
        assert (entry["width"], entry["height"], entry["canvases"]) == (200, 150, canvases)
        assert entry["instances_found"] == len(entry["instances"]) == straight.instances == 2
        assert entry["truncated"] is False

    def test_a_cut_answer_says_how_many_there_were(self) -> None:
        boxes = {"red": (4, 4, 20, 20), "blue": (30, 30, 14, 10)}
        whole = orjson.loads(run(build(draw_picture(48, 48, boxes))).payload)
        assert (whole["instances_found"], whole["truncated"]) == (2, False)
        cut = orjson.loads(run(build(draw_picture(48, 48, boxes), max_instances=1)).payload)
        assert (cut["instances_found"], cut["truncated"], len(cut["instances"])) == (2, True, 1)
        assert cut["instances"] == whole["instances"][:1]

    def test_engine_time_is_the_canvases_share(self) -> None:
        outcome = run(build(draw_picture(150, 200)))
        assert outcome.engine_s == pytest.approx(0.5 * outcome.canvases)
        assert outcome.timing is not None and outcome.timing.infer == pytest.approx(1.0)
        assert outcome.whole[0] == 0.0
        assert set(outcome.stages) == {"decode", "infer", "postprocess", "encode"}
        assert len(outcome.stages["decode"]) == outcome.canvases + 1
        assert len(outcome.stages["postprocess"]) == outcome.canvases + 1

    def test_engine_calls_are_told_of_once_each_and_in_order(self) -> None:
        work = build(draw_picture(70, 100))
        work.open()
        calls = [(5.0, 6.0), (3.0, 4.0), (5.0, 6.0), (1.0, 2.0), (3.0, 4.0), (1.0, 2.0)]
        assert work.canvases >= 4
        for index in range(work.canvases):
            tile, _ = work.make_canvas(index)
            work.search(index, tile, find_colours(tile), calls[index % 6], 1.0)
        assert work.finish(0.0).stages["infer"] == sorted(set(calls[: work.canvases]))

    @pytest.mark.parametrize("masks", ["rle", "polygon", "png", "none"])
    def test_only_masks_as_one_image_are_one_image(self, masks: str) -> None:
        picture = draw_picture(48, 48, {"red": (4, 4, 20, 20)})
        entry = orjson.loads(run(build(picture, masks=masks)).payload)
        assert ("index_png" in entry) is (masks == "png")
        assert ("segmentation" in entry["instances"][0]) is (masks in ("rle", "polygon"))

    def test_an_overlay_is_drawn_on_the_decoded_image(self) -> None:
        picture = draw_picture(70, 100, {"red": (4, 4, 20, 20)})
        work = build(encode_picture(picture), overlay=True)
        drawn = np.asarray(Image.open(io.BytesIO(run(work).payload)))
        assert drawn.shape == (70, 100, 3)
        assert (drawn != picture).any() and (drawn[40:] == picture[40:]).all()

    def test_the_decoded_image_is_dropped_unless_it_is_drawn_on(self) -> None:
        for overlay in (False, True):
            work = build(draw_picture(70, 100), overlay=overlay)
            work.open()
            tiles, freed = zip(*map(work.make_canvas, range(work.canvases)), strict=True)
            assert freed == (*[False] * (work.canvases - 1), not overlay)
            with pytest.raises(IndexError):
                work.make_canvas(0)
            for index, tile in enumerate(tiles):
                work.search(index, tile, find_colours(tile), (0.0, 1.0), 1.0)
            assert work.finish(0.0).error is None


class TestFailures:
    def test_a_format_that_cannot_hold_the_instances_is_an_invalid_parameter(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        picture = draw_picture(48, 64, {"red": (4, 8, 12, 16)})
        assert run(build(picture, format="labels")).payload.startswith(b"\x89PNG")

        def refuse(page: Page, file: BinaryIO) -> NoReturn:
            raise WriteError(f"{len(page.instances)} instances of {page.name} do not fit")

        chosen = dataclasses.replace(FORMATS["labels"], write=refuse)
        monkeypatch.setitem(FORMATS, "labels", chosen)
        with pytest.raises(InvalidParameter, match=r"format: 1 instances of a\.png do not fit"):
            run(build(picture, format="labels"))

    def test_an_image_that_failed_has_an_error_as_its_answer(self) -> None:
        outcome = build(draw_picture(30, 40)).fail(EngineError("the engine failed"))
        assert orjson.loads(outcome.payload) == {
            "file_name": "a.png",
            "error": {"code": "engine_error", "message": "the engine failed"},
        }
        assert isinstance(outcome.error, EngineError) and outcome.timing is None
        assert fail("b", ValueError("secret")).payload.count(b"secret") == 0

    @pytest.mark.parametrize(
        ("error", "keeps"), [(ValueError("of a library"), True), (CorruptImage("cut"), False)]
    )
    def test_only_errors_that_nobody_has_foreseen_keep_their_frames(
        self, error: Exception, keeps: bool
    ) -> None:
        with pytest.raises(type(error)):
            raise error
        outcome = fail("a.png", error)
        assert outcome.error is error
        assert (error.__traceback__ is not None) is keeps

    def test_a_dropped_image_holds_nothing_and_cannot_go_on(self) -> None:
        work = build(draw_picture(70, 100))
        work.open()
        tile, _ = work.make_canvas(0)
        work.drop()
        with pytest.raises(Dropped):
            work.make_canvas(1)
        work.search(0, tile, find_colours(tile), (0.0, 1.0), 1.0)
        with pytest.raises(Dropped):
            work.finish(0.0)
