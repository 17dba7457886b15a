"""Names of files that are not read, for messages."""

from __future__ import annotations

import re

_STARTS = (
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"....ftyp(avif|avis)", re.DOTALL), "AVIF"),
    (re.compile(rb"....ftyp(hei[cxms]|hev[cxms])", re.DOTALL), "HEIC"),
    (re.compile(rb"....ftyp(mif1|msf1|miaf)", re.DOTALL), "HEIF or AVIF"),
    (re.compile(rb"....ftyp", re.DOTALL), "MP4"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "JPEG XL"),
    (re.compile(rb"\0\0[\1\2]\0"), "Windows icon"),
    (re.compile(rb"8BPS"), "Photoshop"),
    (re.compile(rb"%PDF"), "PDF"),
    (re.compile(rb"\x8aMNG|\x8bJNG"), "MNG"),
    (re.compile(rb"P[1-7fF]\s"), "PNM"),
    (re.compile(rb"v/1\x01"), "OpenEXR"),
    (re.compile(rb"qoif"), "QOI"),
    (re.compile(rb"DDS "), "DDS"),
    (re.compile(rb"\x1f\x8b"), "gzip"),
    (re.compile(rb"(\xef\xbb\xbf)?\s{0,99}<(!doctype html|html)", re.IGNORECASE), "HTML"),
    (re.compile(rb"(\xef\xbb\xbf)?\s{0,99}<(\?xml|svg)"), "SVG or XML"),
)


def name_format(data: bytes) -> str | None:
    """The format of a file by its first bytes; None if it is not a known one."""
    head = data[:256]
    return next((name for start, name in _STARTS if start.match(head)), None)
