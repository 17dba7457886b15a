"""What the zarr library is given of this project; imported only where the library is installed."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import imagecodecs
import numpy as np
import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.abc.store import (
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.registry import register_codec

from pipeline.errors import CorruptImage
from pipeline.formats.parts import USUAL_PART_BYTES
from pipeline.formats.zarr_array import CODEC, MAX_CHUNKS_IN_SHARD, ZarrArray
from pipeline.formats.zarr_zip import ZarrFiles

_BLOSC_BYTES = 16
"""Of the header of Blosc."""


def _decode_blosc(data: bytes, out: Any) -> Any:
    """The library reads as many bytes as the header says, whether they are there or not."""
    if len(data) < _BLOSC_BYTES or struct.unpack_from("<I4xI", data, 4) != (len(out), len(data)):
        raise ValueError(f"the header of Blosc is not that of {len(data)} bytes for {len(out)}")
    return imagecodecs.blosc_decode(data, out=out)


_DECODERS: dict[str, Callable[..., Any]] = {
    "blosc": _decode_blosc,
    "zlib": imagecodecs.zlib_decode,
    "gzip": imagecodecs.gzip_decode,
    "zstd": imagecodecs.zstd_decode,
    "lz4": lambda data, out: imagecodecs.lz4_decode(data, header=True, out=out),
}
"""Each writes into memory of a given size, and fails if that does not suffice."""
_METADATA = "zarr.json"
_INDEX_BYTES = 16 * MAX_CHUNKS_IN_SHARD + 4


@dataclass(frozen=True)
class BoundedCodec(BytesBytesCodec):
    """A compressor whose chunks have the size that the array states, or are refused."""

    compressor: str
    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """From an array's metadata."""
        return cls(data["configuration"]["compressor"])

    def to_dict(self) -> dict[str, Any]:
        """For an array's metadata."""
        return {"name": CODEC, "configuration": {"compressor": self.compressor}}

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return await asyncio.to_thread(self._decompress, chunk_bytes, chunk_spec)

    def _decompress(self, chunk: Any, spec: Any) -> Any:
        out = np.empty(int(np.prod(spec.shape)) * spec.dtype.to_native_dtype().itemsize, np.uint8)
        try:
            found = _DECODERS[self.compressor](chunk.to_bytes(), out=out)
        except Exception as error:  # of any kind
            raise CorruptImage(f"a chunk of the Zarr is damaged: {error}") from error
        if len(found) != out.size:
            raise CorruptImage(f"a chunk of the Zarr has {len(found)} bytes, not {out.size}")
        return spec.prototype.buffer.from_array_like(out)

    async def _encode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        raise NotImplementedError

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        """Unknown."""
        raise NotImplementedError


register_codec(CODEC, BoundedCodec)


class _ArrayStore(Store):
    """One array of a Zarr, which can be read.

    Args:
        files: Of the Zarr.
        path: Of the array.
        array: Its metadata.
    """

    supports_writes = supports_deletes = supports_listing = False

    def __init__(self, files: ZarrFiles, path: str, array: ZarrArray) -> None:
        super().__init__(read_only=True)
        self._files, self._path, self._metadata = files, path, array.metadata
        whole = min(array.chunk_bytes, USUAL_PART_BYTES)  # of a shard of few chunks
        self._most = 2 * max(array.part_bytes, whole) + _INDEX_BYTES

    def __eq__(self, other: object) -> bool:
        return self is other

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        if key == _METADATA:
            return prototype.buffer.from_bytes(self._metadata)
        part = _as_slice(byte_range)
        data = await asyncio.to_thread(self._files.read, f"{self._path}/{key}", part, self._most)
        return None if data is None else prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: Any, key_ranges: Iterable[tuple[str, Any]]
    ) -> list[Any]:
        return [await self.get(key, prototype, part) for key, part in key_ranges]

    async def exists(self, key: str) -> bool:
        return key == _METADATA or self._files.has(f"{self._path}/{key}")

    async def set(self, key: str, value: Any) -> None:
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        raise NotImplementedError

    def list(self) -> AsyncIterator[str]:
        raise NotImplementedError

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError


def _as_slice(part: Any) -> slice:
    match part:
        case None:
            return slice(None)
        case RangeByteRequest():
            return slice(part.start, part.end)
        case SuffixByteRequest():
            return slice(-part.suffix, None)
        case OffsetByteRequest():
            return slice(part.offset, None)
        case _:
            raise NotImplementedError


def open_array(files: ZarrFiles, path: str, array: ZarrArray) -> Any:
    """The array as the library reads it.

    Raises:
        Exception: The library's own, if the metadata contradict each other.
    """
    return zarr.open_array(_ArrayStore(files, path, array), mode="r", zarr_format=3)
