from __future__ import annotations

from pathlib import Path

from PIL import Image

from service.jobs.pictures import is_picture, mark_picture


def test_pictures_are_known_by_name_and_mark(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 200))
    for name in ("00001_a.png", "a.png", "1_a.png", "123456_\n.png"):
        image.save(tmp_path / name, pnginfo=mark_picture())
    image.save(tmp_path / "00002_b.png")
    (tmp_path / "00003_c.png").touch()
    (tmp_path / "00004_d.png").mkdir()
    drawn = {path.name for path in tmp_path.iterdir() if is_picture(str(path))}
    assert drawn == {"00001_a.png", "123456_\n.png"}
    assert not is_picture(str(tmp_path / "00005_gone.png"))
