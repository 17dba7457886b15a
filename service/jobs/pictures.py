"""Pictures with masks that solo-predict draws: how they are told from images."""

from __future__ import annotations

import os
import re

from PIL.PngImagePlugin import PngInfo

_SOFTWARE = ("Software", "solo-predict")
_MARK_END = 100
_PICTURE_NAME = re.compile(r"\d{5,}_.*\.png", re.DOTALL)


def mark_picture() -> PngInfo:
    """What tells a picture with masks from an image."""
    info = PngInfo()
    info.add_text(*_SOFTWARE)
    return info


def is_picture(path: str) -> bool:
    """Whether a file is a picture that an earlier run has drawn; False if it cannot be read."""
    if not _PICTURE_NAME.fullmatch(os.path.basename(path)):
        return False
    try:
        with open(path, "rb") as file:
            return "\0".join(_SOFTWARE).encode() in file.read(_MARK_END)
    except OSError:
        return False
