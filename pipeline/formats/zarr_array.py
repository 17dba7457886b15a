"""The array of an OME-Zarr; the zarr library finds and joins its chunks.

Whatever its version, the library is shown an array of version 3 whose compressor is `BoundedCodec`:
of what a file names, nothing else is loaded, and no chunk becomes larger than the array says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import CorruptImage, UnsupportedFormat

CODEC = "solo.bounded"
"""Name of `pipeline.formats.zarr_library.BoundedCodec`."""
COMPRESSORS = ("blosc", "zlib", "gzip", "zstd", "lz4")
MAX_CHUNKS_IN_SHARD = 1 << 16
_TYPES = ("bool", *(f"{sign}int{bits}" for bits in (8, 16, 32, 64) for sign in ("", "u")))
_TYPES += ("float16", "float32", "float64")
_MOST_AXES = 5
_MOST_PX = 1 << 40
_TYPE_OF_V2 = re.compile(r"[<>|][biuf][1248]")
_PREFIX = "numcodecs."
_SPECIAL_FILLS = ("NaN", "Infinity", "-Infinity")


@dataclass(frozen=True)
class ZarrArray:
    """An array.

    Attributes:
        shape: Of the array.
        chunk: Shape of what has a file: a chunk or shard.
        part: Shape of what is compressed by itself: the chunk, or the chunks in a shard.
        dtype: Of the numbers.
        fill: Of chunks that are left out.
        metadata: JSON of version 3, for the library.
    """

    shape: Sequence[int]
    chunk: Sequence[int]
    part: Sequence[int]
    dtype: np.dtype[Any]
    fill: Any
    metadata: bytes

    @property
    def part_bytes(self) -> int:
        """Of what is compressed by itself."""
        return math.prod(self.part) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Of what has a file."""
        return math.prod(self.chunk) * self.dtype.itemsize


def read_array(found: dict[str, Any]) -> ZarrArray:
    """The content of an array's `.zarray` (version 2) or `zarr.json` (version 3).

    Raises:
        CorruptImage: It is damaged.
        UnsupportedFormat: The array is of a kind that is not read.
    """
    try:
        read = {2: _read_v2, 3: _read_v3}.get(found.get("zarr_format", 0))
        if read is None:
            raise UnsupportedFormat(f"Zarr of version {found.get('zarr_format')!r} is not read")
        return read(found)
    except (CorruptImage, UnsupportedFormat):
        raise
    except (TypeError, LookupError, ValueError, OverflowError, AttributeError) as error:
        raise CorruptImage(f"the metadata of the Zarr's array are damaged: {error!r}") from error


def _read_v2(found: dict[str, Any]) -> ZarrArray:
    kind = found["dtype"]
    if not isinstance(kind, str) or not _TYPE_OF_V2.fullmatch(kind):
        raise UnsupportedFormat(f"a Zarr with numbers of type {kind!r} is not read")
    if found.get("filters"):
        names = ", ".join(str(entry.get("id")) for entry in found["filters"])
        raise UnsupportedFormat(f"a Zarr with the filters {names} is not read")
    dtype = np.dtype(kind)
    endian = "big" if kind[0] == ">" else "little"
    shape, chunks = _read_shape(found["shape"]), _read_shape(found["chunks"])
    codecs: list[dict[str, Any]] = []
    if found.get("order", "C") == "F":
        order = list(range(len(shape)))[::-1]
        codecs.append({"name": "transpose", "configuration": {"order": order}})
    codecs.append({"name": "bytes", "configuration": {"endian": endian}})
    if found.get("compressor") is not None:
        codecs.append(_bound(found["compressor"]["id"]))
    separator = found.get("dimension_separator", ".")
    fill = found.get("fill_value")
    return _build(
        shape,
        chunks,
        chunks,
        dtype,
        0 if fill is None else fill,
        codecs,
        {"name": "v2", "configuration": {"separator": separator}},
    )


def _read_v3(found: dict[str, Any]) -> ZarrArray:
    if found.get("node_type") != "array":
        raise CorruptImage("the OME-Zarr names a group where its array should be")
    kind = found["data_type"]
    if kind not in _TYPES:
        raise UnsupportedFormat(f"a Zarr with numbers of type {kind!r} is not read")
    if found["chunk_grid"]["name"] != "regular" or found.get("storage_transformers"):
        raise UnsupportedFormat("a Zarr with an irregular grid or storage transformers is not read")
    chunks = _read_shape(found["chunk_grid"]["configuration"]["chunk_shape"])
    codecs = found["codecs"]
    part = chunks
    if len(codecs) == 1 and codecs[0]["name"] == "sharding_indexed":
        shard = codecs[0]["configuration"]
        part = _read_shape(shard["chunk_shape"])
        _check_shard(shard, chunks, part)
        inner = {**shard, "codecs": _read_codecs(shard["codecs"])}
        taken = [{"name": "sharding_indexed", "configuration": inner}]
    else:
        taken = _read_codecs(codecs)
    encoding = found["chunk_key_encoding"]
    if encoding["name"] not in ("default", "v2"):
        raise UnsupportedFormat(f"a Zarr with chunks named by {encoding['name']!r} is not read")
    shape = _read_shape(found["shape"])
    return _build(shape, chunks, part, np.dtype(kind), found["fill_value"], taken, encoding)


def _check_shard(shard: dict[str, Any], chunks: Sequence[int], part: Sequence[int]) -> None:
    """Bounds the index of a shard, which is read with each of its chunks."""
    names = [codec["name"] for codec in shard.get("index_codecs", ())]
    if names not in (["bytes", "crc32c"], ["bytes"]):
        raise UnsupportedFormat(f"a Zarr with shards indexed by {', '.join(names)} is not read")
    counts = [outer // inner for outer, inner in zip(chunks, part, strict=True)]
    if math.prod(counts) > MAX_CHUNKS_IN_SHARD:
        raise CorruptImage(f"the Zarr has {math.prod(counts)} chunks in a shard")


def _read_codecs(codecs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The codecs of a chunk, with one compressor at most.

    Raises:
        UnsupportedFormat: Names others.
    """
    taken: list[dict[str, Any]] = []
    for codec in codecs:
        name = codec["name"]
        if name in ("transpose", "bytes", "crc32c"):
            taken.append(codec)
        else:
            taken.append(_bound(name.removeprefix(_PREFIX)))
    names = [codec["name"] for codec in taken]
    if names.count(CODEC) > 1 or names.count("bytes") != 1 or names.count("transpose") > 1:
        raise UnsupportedFormat(
            f"a Zarr with the codecs {', '.join(str(codec['name']) for codec in codecs)} is not "
            "read: one compressor is"
        )
    return taken


def _bound(compressor: Any) -> dict[str, Any]:
    if compressor not in COMPRESSORS:
        raise UnsupportedFormat(
            f"a Zarr compressed by {compressor!r} is not read; {', '.join(COMPRESSORS)} are"
        )
    return {"name": CODEC, "configuration": {"compressor": compressor}}


def _read_shape(sides: Any) -> list[int]:
    if not isinstance(sides, list) or not 2 <= len(sides) <= _MOST_AXES:
        raise UnsupportedFormat(f"a Zarr of the shape {sides!r:.99} is not read: 2 to 5 axes are")
    if not all(type(side) is int and 0 < side <= _MOST_PX for side in sides):
        raise CorruptImage(f"the Zarr has the shape {sides!r:.99}")
    return sides


def _build(
    shape: list[int],
    chunks: list[int],
    part: list[int],
    dtype: np.dtype[Any],
    fill: Any,
    codecs: list[dict[str, Any]],
    encoding: dict[str, Any],
) -> ZarrArray:
    if not len(shape) == len(chunks) == len(part):
        raise CorruptImage(f"the Zarr has the shape {shape}, but chunks of {part} in {chunks}")
    if fill not in _SPECIAL_FILLS and not isinstance(fill, (bool, int, float)):
        raise UnsupportedFormat(f"a Zarr with the fill value {fill!r:.99} is not read")
    native = dtype.newbyteorder("=")
    value = np.array(float(fill) if isinstance(fill, str) else fill).astype(native)[()]
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": native.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "chunk_key_encoding": encoding,
        "fill_value": fill,
        "codecs": codecs,
        "attributes": {},
    }
    return ZarrArray(shape, chunks, part, native, value, json.dumps(metadata).encode())
