from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from training.data.formats import open_dataset
from training.data.formats.convert import convert
from training.data.formats.splits import divide, list_divided, scene_of
from training.data.records import DatasetError

HEIGHT, WIDTH = 40, 60


def write_picture(path: Path, orientation: int = 1) -> None:
    """A JPEG of stored size WIDTH x HEIGHT."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (WIDTH, HEIGHT)).save(path, exif=exif)


def masks_in(root: Path, name: str | None = None) -> list[NDArray[np.uint8]]:
    content = open_dataset(root, "", name)
    assert content.annotations is not None
    image = content.images[0]
    masks = []
    for row in content.annotations:
        rle: Any = row["segmentation"]
        if isinstance(rle, list):
            rle = coco_mask.merge(coco_mask.frPyObjects(rle, image["height"], image["width"]))
        masks.append(np.asarray(coco_mask.decode(rle)))
    return masks


def write_labelme(root: Path, shapes: list[dict[str, Any]], **more: Any) -> None:
    content = {"shapes": shapes, "imagePath": "a.jpg", "imageHeight": HEIGHT, "imageWidth": WIDTH}
    (root / "a.json").write_text(json.dumps(content | more))


def square(x: float, y: float, side: float = 8) -> list[list[float]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]


def test_labelme_shapes_and_groups(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_picture(tmp_path / "a.jpg")
    file = io.BytesIO()
    Image.new("1", (5, 4), 1).save(file, "PNG")
    crop = base64.b64encode(file.getvalue()).decode()
    write_labelme(
        tmp_path,
        [
            {"label": "x", "points": square(2, 2), "group_id": 1},
            {"label": "x", "points": [[20, 2], [28, 10]], "shape_type": "rectangle", "group_id": 1},
            {"label": "y", "points": square(2, 20), "group_id": 1},
            {"label": "x", "points": [[40, 20], [40, 30]], "shape_type": "circle"},
            {"label": "x", "points": [[3, 5], [7, 8]], "shape_type": "mask", "mask": crop},
            {"label": "z", "points": [[3, 5]], "shape_type": "point"},
            {"label": "x", "points": [[3, 5], [4, 5]], "shape_type": "polygon"},
        ],
    )
    masks = masks_in(tmp_path)
    assert [int(mask.sum()) for mask in masks[:2]] == [128, 64]
    assert masks[0][2:10, 2:10].all() and masks[0][2:10, 20:28].all()
    assert abs(int(masks[2].sum()) - np.pi * 100) < 10 and masks[2][20, 40]
    assert masks[3][5:9, 3:8].all() and masks[3].sum() == 20 and len(masks) == 4
    assert "'point', without area, left out: 1" in caplog.text
    assert "fewer than 3 points left out: 1" in caplog.text
    assert [c["name"] for c in open_dataset(tmp_path, "").categories] == ["x", "y"]


def test_a_group_of_a_mask_and_a_polygon_is_one_mask(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.jpg")
    file = io.BytesIO()
    Image.new("L", (5, 4), 255).save(file, "PNG")
    crop = base64.b64encode(file.getvalue()).decode()
    mask = {"label": "x", "points": [[30, 5], [34, 8]], "shape_type": "mask", "mask": crop}
    write_labelme(
        tmp_path, [mask | {"group_id": 2}, {"label": "x", "points": square(2, 2), "group_id": 2}]
    )
    (found,) = masks_in(tmp_path)
    assert found.sum() == 84 and found[5:9, 30:35].all() and found[2:10, 2:10].all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_labels_follow_the_orientation_of_their_picture(
    tmp_path: Path, orientation: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The labels state which size they were drawn on; that of a half turn does not tell."""
    write_picture(tmp_path / "a.jpg", orientation)
    stored = np.zeros((HEIGHT, WIDTH), np.uint8)
    stored[2:10, 4:20] = 1
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(np.repeat(stored[..., None] * 255, 3, 2)).save(file, "PNG", exif=exif)
    with Image.open(file) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))[..., 0] > 0
    box = {"label": "x", "points": [[4, 2], [20, 10]], "shape_type": "rectangle"}
    write_labelme(tmp_path, [box])
    (found,) = masks_in(tmp_path)
    sideways = orientation in (5, 6, 7, 8)
    np.testing.assert_array_equal(found, upright if sideways else stored)
    assert ("turned with their picture" in caplog.text) == sideways
    assert ("as its EXIF orientation turns it" in caplog.text) == (orientation in (2, 3, 4))
    if sideways:
        (tmp_path / "masks").mkdir()
        (tmp_path / "a.json").unlink()
        Image.fromarray(stored).save(tmp_path / "masks" / "a.png")
        (from_mask,) = masks_in(tmp_path)
        np.testing.assert_array_equal(from_mask, upright)


def test_embedded_images_are_written_on_request(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").unlink()
    shapes = [{"label": "x", "points": square(2, 2)}]
    write_labelme(
        tmp_path, shapes, imageData=base64.b64encode(data).decode(), imagePath="..\\a.jpg"
    )
    with pytest.raises(DatasetError, match="embedded: solo-data convert --extract-images"):
        open_dataset(tmp_path, "")
    convert(tmp_path, tmp_path / "out" / "all.json", extract_images=True)
    assert (tmp_path / "a.jpg").read_bytes() == data
    with pytest.raises(DatasetError, match=r"all\.json exists"):
        convert(tmp_path, tmp_path / "out" / "all.json")


def write_cvat(root: Path, shapes: str) -> None:
    (root / "annotations.xml").write_text(
        f'<annotations><image id="0" name="a.jpg" width="{WIDTH}" height="{HEIGHT}">{shapes}'
        "</image></annotations>"
    )


def test_cvat_shapes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_picture(tmp_path / "a.jpg")
    write_cvat(
        tmp_path,
        '<box label="b" xtl="20" ytl="10" xbr="40" ybr="14" rotation="90"/>'
        '<ellipse label="a" cx="30" cy="20" rx="12" ry="6"/>'
        '<polygon label="a" points="2,2;10,2;10,10;2,10" group_id="3"/>'
        '<polygon label="a" points="20,2;28,2;28,10;20,10" group_id="3"/>'
        '<polyline label="a" points="1,1;2,2"/><tag label="a"/>',
    )
    masks = masks_in(tmp_path)
    assert masks[0][2:22, 28:32].all() and masks[0].sum() == 80
    assert abs(int(masks[1].sum()) - np.pi * 72) < 8 and masks[1][20, 19] and not masks[1][27, 30]
    assert masks[2].sum() == 128 and len(masks) == 3
    assert "<polyline> without area left out: 1" in caplog.text
    assert [c["name"] for c in open_dataset(tmp_path, "").categories] == ["a", "b"]


def test_an_entity_bomb_is_refused(tmp_path: Path) -> None:
    entities = '<!ENTITY e0 "lol">' + "".join(
        f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12)
    )
    (tmp_path / "annotations.xml").write_text(
        f"<!DOCTYPE annotations [{entities}]><annotations>&e11;</annotations>"
    )
    with pytest.raises(DatasetError, match=r"annotations\.xml is not XML"):
        open_dataset(tmp_path, "", "cvat")


@pytest.mark.parametrize(
    ("stem", "scene"),
    [
        ("street_0012", "street"),
        ("field3_t0", "field3"),
        ("a (2)", "a"),
        ("0012", "0012"),
        ("cat_7_jpg.rf.0a1b2c", "cat"),
        ("7_jpg.rf.0a1b2c", "7"),
    ],
)
def test_the_scene_of_a_name(stem: str, scene: str) -> None:
    assert scene_of(stem) == scene


def test_a_division_keeps_scenes_together_and_is_always_the_same() -> None:
    stems = [f"scene{i:02}_{j}" for i in range(20) for j in range(5)]
    train, val, how = divide(stems, str, 0.2)
    assert len(val) == 20 and sorted(train + val) == sorted(stems)
    assert not {scene_of(s) for s in train} & {scene_of(s) for s in val}
    assert "stay together" in how
    again = divide(stems[::-1], str, 0.2)
    assert sorted(again[1]) == sorted(val)
    copies = [f"{i:03}_jpg.rf.{j}abc" for i in range(10) for j in range(3)]
    train, val, _ = divide(copies, str, 0.2)
    assert not {scene_of(s) for s in train} & {scene_of(s) for s in val}


def test_names_without_scenes_are_divided_one_by_one() -> None:
    train, val, how = divide([f"IMG_{i}" for i in range(50)], str, 0.1)
    assert (len(train), len(val)) == (45, 5) and "by itself" in how
    assert [len(part) for part in divide(["a", "b"], str, 0.2)[:2]] == [1, 1]


@pytest.mark.parametrize(
    ("stems", "fraction", "message"),
    [
        (["a"], 0.2, r"^1 images cannot be divided .*--val-split ''"),
        ([], None, "^0 images cannot be divided"),
        (["a", "b"], -0.1, "fraction -0.1 is not between 0 and 1"),
        (["a", "b"], 1.0, "fraction 1 is not between 0 and 1"),
        (["a", "b"], float("nan"), "fraction nan is not between 0 and 1"),
    ],
)
def test_a_division_that_is_not_possible(
    stems: list[str], fraction: float | None, message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        divide(stems, str, fraction)


@pytest.mark.parametrize(
    ("images", "fraction", "expected"),
    [
        *[(2, None, 1), (3, None, 1), (5, None, 1), (6, None, 2), (9, None, 3), (15, None, 5)],
        *[(20, None, 5), (25, None, 5), (30, None, 6), (60, None, 12), (1000, None, 200)],
        *[(20, 0.2, 4), (20, 0.05, 1), (3, 0.01, 1), (20, 0.0, 0), (1, 0.0, 0)],
    ],
)
def test_the_images_for_validation(images: int, fraction: float | None, expected: int) -> None:
    stems = [chr(ord("a") + i % 26) * (i // 26 + 1) for i in range(images)]
    train, val, _ = divide(stems, str, fraction)
    assert len(val) == expected and sorted(train + val) == sorted(stems)


@pytest.mark.parametrize(
    ("given", "fraction", "expected"),
    [
        ([""], None, ["train", "val"]),
        ([""], 0.3, ["train", "val"]),
        ([""], 0.0, ["train"]),
        (["train"], None, ["train"]),
        (["train"], 0.0, ["train"]),
        (["train", "test"], 0.3, ["train", "val", "test"]),
        (["train", "val", "test"], 0.3, ["train", "val", "test"]),
        (["test"], 0.3, ["test"]),
    ],
)
def test_the_splits_after_a_division(
    given: list[str], fraction: float | None, expected: list[str]
) -> None:
    assert list_divided(given, fraction) == expected
