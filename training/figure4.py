"""python -m training.figure4: the mask of every grid cell, as in figure 4 of the paper.

Above, the instances that the model finds; below, one small map per cell of a level, in the order of
the grid: the probabilities of the cell's mask. Frames mark the cells whose category score is a
candidate's. Reads a checkpoint, or the weights.pt of a folder in model_repo.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.decode import decode_image
from pipeline.draw import draw_instances
from pipeline.errors import DecodeError
from pipeline.postprocess import postprocess_tile
from pipeline.preprocess import prepare
from pipeline.types import Candidates, Prepared, UInt8
from training.configs.schema import Config
from training.model.head import LevelOutput
from training.model.solo import Solo
from training.pictures import stack
from training.weights.formats import CheckpointError, load_model
from training.weights.initial import find_weights

WIDTH_PX = 1440
"""Width of the maps of a level, about."""
MAP_PX = (24, 120)
"""Bounds of the longer side of one map."""
GAP = np.array([255, 255, 255], np.uint8)
FRAME = np.array([255, 64, 64], np.uint8)


def best_level(outputs: list[LevelOutput]) -> int:
    """The level of the highest category score of the first image."""
    return int(np.argmax([o.category_logits[0].max().item() for o in outputs]))


def cell_probs(model: Solo, output: LevelOutput, level: int) -> NDArray[np.float32]:
    """Mask probabilities of all cells of a level of the first image: [S, S, h, w]."""
    grid = model.config.head.num_grids[level]
    rows = []
    for row in range(grid):  # the masks of a whole level at once would take gigabytes
        cells = torch.arange(row * grid, (row + 1) * grid, device=model.pixel_mean.device)
        first, *others = model.head.cell_logits(output, level, 0, cells)
        probs = first.sigmoid()
        for logits in others:
            probs = probs * logits.sigmoid()
        rows.append(probs.cpu().numpy())
    return np.stack(rows)


def draw_maps(probs: NDArray[np.float32], candidates: NDArray[np.bool_]) -> UInt8:
    """The maps of a level side by side, one pixel apart.

    Args:
        probs: [S, S, h, w] in 0..1.
        candidates: [S, S], cells with a frame.
    """
    grid, _, height, width = probs.shape
    long_side = min(max(WIDTH_PX // grid, MAP_PX[0]), MAP_PX[1])
    scale = long_side / max(height, width)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    picture = np.full((grid * (h + 1) - 1, grid * (w + 1) - 1, 3), GAP, np.uint8)
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    for i in range(grid):
        for j in range(grid):
            grey = (cv2.resize(probs[i, j], (w, h), interpolation=method) * 255).astype(np.uint8)
            tile = picture[i * (h + 1) : i * (h + 1) + h, j * (w + 1) : j * (w + 1) + w]
            tile[:] = cv2.applyColorMap(grey, cv2.COLORMAP_VIRIDIS)[..., ::-1]
            if candidates[i, j]:
                tile[[0, -1]] = FRAME
                tile[:, [0, -1]] = FRAME
    return picture


@torch.inference_mode()
def draw_figure(
    model: Solo, config: Config, image: UInt8, level: int | None = None, tile: int = 0
) -> tuple[UInt8, int]:
    """The figure of an image, and the level that it shows.

    Args:
        model: In evaluation mode.
        config: Its configuration, with classes.
        image: [H, W, 3] RGB.
        level: Index of the level, the finest is 0; None: that of the highest category score.
        tile: Index of the tile, for models with tiles.

    Raises:
        ValueError: There is no such level or tile.
    """
    prepared = prepare(image, config.input)
    levels = len(config.model.head.num_grids)
    if level is not None and not 0 <= level < levels:
        raise ValueError(f"level is {level}, the model has levels 0 to {levels - 1}")
    if not 0 <= tile < len(prepared.tiles):
        raise ValueError(f"tile is {tile}, the image has tiles 0 to {len(prepared.tiles) - 1}")
    seen, device = prepared.tiles[tile], model.pixel_mean.device
    canvas = torch.from_numpy(seen.image)[None].to(device)
    valid_hw = torch.tensor([seen.valid_hw], device=device)
    outputs = model(model.normalise(canvas, valid_hw))
    shown = best_level(outputs) if level is None else level
    stride = config.model.head.mask_strides[shown]
    rows, columns = (-(-side // stride) for side in seen.valid_hw)  # without the padding
    probs = cell_probs(model, outputs[shown], shown)[:, :, :rows, :columns]
    scores = outputs[shown].category_logits[0].sigmoid().amax(0).cpu().numpy()
    found = Candidates(*(part[0].cpu().numpy() for part in model.rank(outputs)))
    picture = _result(image, prepared, tile, found, config)
    maps = draw_maps(probs, scores > config.model.candidate_threshold)
    return stack([_fit(picture, maps.shape[1]), maps]), shown


def _result(
    image: UInt8, prepared: Prepared, tile: int, candidates: Candidates, config: Config
) -> UInt8:
    """The part of the image that a tile shows, with its instances."""
    seen = prepared.tiles[tile]
    found = postprocess_tile(seen, candidates, prepared.image_hw, config.postprocess)
    drawn = draw_instances(image, found.instances, config.task)
    window = seen.window
    part = np.s_[window.y : window.y + window.height, window.x : window.x + window.width]
    return np.ascontiguousarray(drawn[part])


def _fit(picture: UInt8, width: int) -> UInt8:
    """A picture scaled to half of a width."""
    scale = width / 2 / picture.shape[1]
    size = (max(1, width // 2), max(1, round(picture.shape[0] * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(picture, size, interpolation=method), np.uint8)


def build_parser() -> argparse.ArgumentParser:
    """The command line of training.figure4."""
    parser = argparse.ArgumentParser(prog="python -m training.figure4", description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint, or model_repo/<model> folder")
    parser.add_argument("--image", type=Path, required=True, help="image file")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument(
        "--level", type=int, help="level, 0 is the finest (that of the highest category score)"
    )
    parser.add_argument("--tile", type=int, default=0, help="tile, for models with tiles (0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (cpu)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        path = find_weights(options.model) if options.model.is_dir() else options.model
        config, model = load_model(path)
        image = decode_image(options.image.read_bytes())
        picture, level = draw_figure(
            model.to(options.device), config, image, options.level, options.tile
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(options.out, "PNG", optimize=True)
    except (CheckpointError, DecodeError, ValueError, OSError) as error:
        print(f"figure4: {error}", file=sys.stderr)
        return 1
    grid = config.model.head.num_grids[level]
    print(f"{options.out}: level {level}, {grid}x{grid} cells")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
