"""API keys: who may ask, and how much at once.

    {"keys": [{"name": "shop", "sha256": "<hex>", "max_images": 32, "images_per_minute": 600}]}

The file holds the keys' SHA-256, never the keys; these are random and long, so a plain hash cannot
be guessed back. `python -m service.http.keys NAME --file keys.json` makes a key and shows it once.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import QuotaExceeded, StartupError, TooManyImages

logger = logging.getLogger(__name__)

CHECK_EVERY_S = 1.0
"""How often the file is looked at for changes, at most."""


class KeySpec(BaseModel):
    """A key's entry in the file.

    Attributes:
        name: Who has it; for logs.
        sha256: Of the key.
        max_images: Images in work at once; None: as many as the server takes.
        images_per_minute: Mean rate; a minute's worth may come at once. None: no bound.
        admin: Whether models may be loaded and unloaded with it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    max_images: Annotated[int | None, Field(gt=0)] = None
    images_per_minute: Annotated[float | None, Field(gt=0)] = None
    admin: bool = False


class KeyFile(BaseModel):
    """The file's content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[KeySpec, ...]


class Quota:
    """What one key has in work and may still send; to be used from one event loop.

    Args:
        spec: The key's bounds.
        clock: Seconds, never going back.
    """

    def __init__(self, spec: KeySpec, clock: Callable[[], float] = time.monotonic) -> None:
        self.spec = spec
        self._clock = clock
        self._in_work = 0
        self._credit = spec.images_per_minute or 0.0
        self._credited_s = clock()

    @contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """Counts a request's images while they are in work.

        Raises:
            TooManyImages: The key may never have so many in work.
            QuotaExceeded: They are too many now.
        """
        spec = self.spec
        if spec.max_images is not None and images > spec.max_images:
            raise TooManyImages(
                f"the request has {images} images, key {spec.name!r} may have {spec.max_images}"
            )
        if spec.max_images is not None and self._in_work + images > spec.max_images:
            raise QuotaExceeded(
                f"key {spec.name!r} has {self._in_work} images in work, {images} more would exceed "
                f"{spec.max_images}",
                "key_images",
                1,
            )
        self._spend(images)
        self._in_work += images
        try:
            yield
        finally:
            self._in_work -= images

    def _spend(self, images: int) -> None:
        rate = self.spec.images_per_minute
        if rate is None:
            return
        now_s = self._clock()
        self._credit = min(rate, self._credit + (now_s - self._credited_s) * rate / 60)
        self._credited_s = now_s
        needed = min(images, rate)  # a request larger than a minute's worth leaves a debt
        if needed > self._credit:
            wait_s = (needed - self._credit) * 60 / rate
            raise QuotaExceeded(
                f"key {self.spec.name!r} may send {rate:g} images a minute; {images} are too many "
                "now",
                "key_rate",
                max(1, math.ceil(wait_s)),
            )
        self._credit -= images


class KeyRing:
    """The keys of a file; a change of the file is seen without a restart.

    Args:
        file: See the module.
        clock: Seconds, never going back.

    Raises:
        StartupError: The file cannot be read.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.file = file
        self._clock = clock
        self._quotas: dict[str, Quota] = {}
        try:
            self._stamp = _stamp(file)
            self._take(_read(file))
        except (OSError, ValueError) as error:
            raise StartupError(f"keys file {str(file)!r}: {error}") from error
        self._checked_s = clock()

    def find(self, key: str) -> Quota | None:
        """The quota of a key, None if there is no such key; takes as long for one as for all."""
        self._reload_if_changed()
        digest = hashlib.sha256(key.encode()).hexdigest()
        found = None
        for known, quota in self._quotas.items():
            if hmac.compare_digest(known, digest):
                found = quota
        return found

    def _reload_if_changed(self) -> None:
        now_s = self._clock()
        if now_s - self._checked_s < CHECK_EVERY_S:
            return
        self._checked_s = now_s
        try:
            stamp = _stamp(self.file)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._take(_read(self.file))
        except (OSError, ValueError) as error:
            logger.error("keys file %s: %s; the keys of before stay valid", self.file, error)
        else:
            logger.info("keys file %s: %d keys are valid now", self.file, len(self._quotas))

    def _take(self, content: KeyFile) -> None:
        """A key whose bounds are what they were keeps what it has in work and in credit."""
        old = self._quotas
        self._quotas = {
            spec.sha256: old[spec.sha256]
            if spec.sha256 in old and old[spec.sha256].spec == spec
            else Quota(spec, self._clock)
            for spec in content.keys
        }


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(file: Path) -> KeyFile:
    try:
        return KeyFile.model_validate_json(file.read_bytes())
    except ValidationError as error:
        parts = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ValueError("; ".join(parts)) from error


def add_key(file: Path, name: str, **bounds: object) -> str:
    """Makes a key and enters it into the file, which is made if it is not there.

    Args:
        file: The keys file.
        name: Who gets the key.
        **bounds: Other fields of `KeySpec`.

    Returns:
        The key; it is not kept anywhere.

    Raises:
        ValueError: The file or a bound is wrong, or the name is taken.
    """
    specs = _read(file).keys if file.exists() else ()
    if name in {spec.name for spec in specs}:
        raise ValueError(f"{file} has a key for {name!r} already")
    key = secrets.token_urlsafe(32)
    digest = hashlib.sha256(key.encode()).hexdigest()
    spec = KeySpec.model_validate({"name": name, "sha256": digest, **bounds})
    content = KeyFile(keys=(*specs, spec)).model_dump(mode="json", exclude_defaults=True)
    partial = file.with_name(f".{file.name}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as output:
        output.write(json.dumps(content, indent=2) + "\n")
    os.replace(partial, file)
    return key


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m service.http.keys", description="Makes an API key."
    )
    parser.add_argument("name", help="who gets the key; for logs")
    parser.add_argument("--file", type=Path, required=True, help="keys file, SOLO_KEYS_FILE")
    parser.add_argument("--max-images", type=int, help="images in work at once")
    parser.add_argument("--images-per-minute", type=float, help="mean rate")
    parser.add_argument("--admin", action="store_true", help="may load and unload models")
    options = vars(parser.parse_args(arguments))
    bounds = {k: v for k, v in options.items() if k not in ("name", "file") and v is not None}
    try:
        key = add_key(options["file"], options["name"], **bounds)
    except (OSError, ValueError) as error:
        print(f"service.http.keys: {error}", file=sys.stderr)
        return 1
    print(key)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
