from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.tiny import disc
from tests.support.tiny_solo import tiny_config, tiny_network
from training.configs.schema import HeadKind
from training.figure4 import FRAME, best_level, cell_probs, draw_figure, draw_maps, main
from training.model.head import LevelOutput
from training.weights.formats import save_checkpoint

KINDS: tuple[HeadKind, ...] = ("vanilla", "decoupled", "decoupled_light")


def write_model(path: Path, kind: HeadKind = "vanilla") -> Path:
    config = tiny_config(kind)
    state = {"model": tiny_network(config).state_dict(), "ema": {}}
    save_checkpoint(path, config, state)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_the_maps_are_those_of_the_candidates(kind: HeadKind) -> None:
    config = tiny_config(kind)
    network = tiny_network(config)
    images = torch.randint(0, 256, (1, 128, 128, 3), dtype=torch.uint8)
    with torch.inference_mode():
        outputs = network(network.normalise(images, torch.tensor([[128, 128]])))
        finest = 0  # its masks are not resized for the candidates
        maps = cell_probs(network, outputs[finest], finest)
        cells = torch.arange(64)[None]
        wanted = network._candidate_probs(outputs, cells)[0].numpy()
    assert maps.shape == (8, 8, 32, 32)
    np.testing.assert_allclose(maps.reshape(64, 32, 32), wanted, rtol=0, atol=1e-5)


def test_each_map_is_at_the_place_of_its_cell() -> None:
    probs = np.zeros((3, 3, 40, 60), np.float32)
    probs[1, 2] = 1
    candidates = np.zeros((3, 3), np.bool_)
    candidates[2, 0] = True
    picture = draw_maps(probs, candidates)
    height, width = 80, 120  # the longer side has its upper bound
    assert picture.shape == (3 * height + 2, 3 * width + 2, 3)
    dark, bright = picture[5, 5], picture[height + 1 + 5, 2 * (width + 1) + 5]
    assert int(bright.sum()) > 2 * int(dark.sum())
    assert (picture[height] == 255).all() and (picture[:, width] == 255).all()
    framed = (picture == FRAME).all(axis=2)
    rows, columns = np.nonzero(framed)
    assert (rows.min(), rows.max()) == (2 * (height + 1), 3 * height + 1)
    assert (columns.min(), columns.max()) == (0, width - 1)


def test_small_maps_of_a_large_grid_are_not_empty() -> None:
    picture = draw_maps(np.ones((80, 80, 2, 300), np.float32), np.zeros((80, 80), np.bool_))
    assert picture.shape == (80 * 2 - 1, 80 * 25 - 1, 3)


def test_the_level_of_the_highest_score_is_shown() -> None:
    low, high = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 2, 2)
    high[0, 1, 1, 0] = 1
    assert best_level([LevelOutput(low, ()), LevelOutput(high, ())]) == 1


def test_the_padding_is_not_shown() -> None:
    config = tiny_config("vanilla")
    image = np.full((64, 32, 3), 90, np.uint8)
    network = tiny_network(config)
    picture, level = draw_figure(network, config, image, level=1)
    assert level == 1
    # 5 x 5 maps, twice as high as wide: the longer side has its upper bound of 120.
    assert picture.shape[1] == 5 * 61 - 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_draws_a_checkpoint(tmp_path: Path, capsys: Any, kind: HeadKind) -> None:
    model = write_model(tmp_path / "a.pt", kind)
    canvas = np.full((90, 100, 3), 20, np.uint8)
    canvas[disc(90, 100, 40, 40, 15) > 0] = 200
    cv2.imwrite(str(tmp_path / "a.png"), canvas)
    out = tmp_path / "new" / "figure.png"
    arguments = [str(model), "--image", str(tmp_path / "a.png"), "--out", str(out)]
    assert main([*arguments, "--level", "0", "--tile", "1"]) == 0
    assert "level 0, 8x8 cells" in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.width == 8 * 121 - 1 and picture.height > 8 * 121


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--level", "2"], "level is 2, the model has levels 0 to 1"),
        (["--level", "-1"], "level is -1"),
        (["--tile", "9"], "tile is 9, the image has tiles 0 to"),
        (["--image", "DIR/none.png"], "none.png"),
        (["--image", "DIR/a.pt"], "figure4: "),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, capsys: Any, more: list[str], message: str) -> None:
    model = write_model(tmp_path / "a.pt")
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((90, 100, 3), np.uint8))
    arguments = [str(model), "--image", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png")]
    filled = [part.replace("DIR", str(tmp_path)) for part in more]
    assert main([*arguments, *filled]) == 1
    error = capsys.readouterr().err
    assert error.startswith("figure4: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "b.png").exists()


def test_a_folder_without_weights_is_one_line(tmp_path: Path, capsys: Any) -> None:
    assert main([str(tmp_path), "--image", "x", "--out", str(tmp_path / "b.png")]) == 1
    assert capsys.readouterr().err.startswith("figure4: ")
