"""API keys: which clients may send requests, and how many canvases.

    {"keys": [{"name": "shop", "sha256": "<hex>", "max_canvases": 256, "weight": 2}]}

The file holds SHA-256 sums of the keys. Keys are long and random, so a plain hash cannot be
reversed by guessing. `python -m service.http.keys NAME --file keys.json` creates a key and prints
it once.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import logging
import math
import secrets
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import StartupError, TooManyWrongKeys
from service.files import replacing
from service.work.request import ClientProfile

logger = logging.getLogger(__name__)

CHECK_EVERY_S = 1.0
"""Shortest time between two checks of the file for changes, seconds."""
WRONG_KEYS = 10
"""Of one address that are answered at once; beyond them one in `WRONG_KEY_EVERY_S`."""
WRONG_KEY_EVERY_S = 1.0
MAX_DELAY_S = 2.0
MAX_ADDRESSES = 4096


class KeySpec(BaseModel):
    """A key's entry in the file.

    Attributes:
        name: Its holder; for logs and messages.
        sha256: Of the key.
        max_canvases: In flight at once; None: no bound of its own.
        canvases_per_minute: Mean rate; a minute's worth may come at once. None: no bound.
        weight: Share of the server relative to other clients.
        max_job_files: Files of its jobs that may be unfinished at once; None: no bound of its own.
        admin: Whether models may be loaded and unloaded with it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    max_canvases: Annotated[int | None, Field(gt=0)] = None
    canvases_per_minute: Annotated[float | None, Field(gt=0)] = None
    weight: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    max_job_files: Annotated[int | None, Field(gt=0)] = None
    admin: bool = False

    @property
    def client(self) -> ClientProfile:
        """What admission and scheduling know of the key."""
        return ClientProfile(
            name=f"key {self.name}",
            weight=self.weight,
            max_canvases=self.max_canvases,
            canvases_per_minute=self.canvases_per_minute,
        )


class KeyFile(BaseModel):
    """The file's content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[KeySpec, ...]


class WrongKeys:
    """Wrong keys of each address; of the addresses the last `MAX_ADDRESSES` are known.

    Args:
        clock: Monotonic, seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._paid_s: OrderedDict[str, float] = OrderedDict()

    def count(self, address: str) -> float:
        """Counts a wrong key; returns for how long its answer is to be delayed, seconds.

        Raises:
            TooManyWrongKeys: For more than `MAX_DELAY_S`; the key is not counted then.
        """
        now_s = self._clock()
        paid_s = max(self._paid_s.get(address, now_s), now_s)
        delay_s = paid_s - now_s - (WRONG_KEYS - 1) * WRONG_KEY_EVERY_S
        if delay_s > MAX_DELAY_S:
            retry_after_s = math.ceil(delay_s - MAX_DELAY_S)
            text = f"too many wrong API keys came from {address}"
            raise TooManyWrongKeys(text, "wrong_keys", retry_after_s)
        self._paid_s[address] = paid_s + WRONG_KEY_EVERY_S
        self._paid_s.move_to_end(address)
        if len(self._paid_s) > MAX_ADDRESSES:
            self._paid_s.popitem(last=False)
        return max(0.0, delay_s)


class KeyRing:
    """The keys of a file; a change of the file is seen without a restart.

    Args:
        file: See the module.
        clock: Monotonic, seconds.

    Attributes:
        wrong: Keys that were not found.

    Raises:
        StartupError: The file cannot be read.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.file = file
        self.wrong = WrongKeys(clock)
        self._clock = clock
        self._keys: dict[str, KeySpec] = {}
        try:
            self._stamp = _stamp(file)
            self._take(_read(file))
        except (OSError, ValueError) as error:
            raise StartupError(f"keys file {str(file)!r}: {error}") from error
        self._checked_s = clock()

    def find(self, key: str) -> KeySpec | None:
        """The entry of a key, or None; takes the same time for every key."""
        self._reload_if_changed()
        digest = hashlib.sha256(key.encode()).hexdigest()
        found = None
        for known, spec in self._keys.items():
            if hmac.compare_digest(known, digest):
                found = spec
        return found

    def _reload_if_changed(self) -> None:
        now_s = self._clock()
        if now_s - self._checked_s < CHECK_EVERY_S:
            return
        self._checked_s = now_s
        with suppress(OSError):  # `reload` reports it
            if _stamp(self.file) == self._stamp:
                return
        self.reload()

    def reload(self) -> None:
        """Reads the file again; if that fails, the keys read before stay valid."""
        try:
            self._stamp = _stamp(self.file)
            self._take(_read(self.file))
        except (OSError, ValueError) as error:
            logger.error("keys file %s: %s; the keys read before stay valid", self.file, error)
        else:
            logger.info("keys file %s: %d keys are valid now", self.file, len(self._keys))

    def _take(self, content: KeyFile) -> None:
        self._keys = {spec.sha256: spec for spec in content.keys}


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
        name: Client that the key is given to.
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
    with replacing(file) as partial:
        partial.touch(mode=0o600)
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return key


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m service.http.keys", description="Makes an API key."
    )
    parser.add_argument("name", help="its holder; for logs and messages")
    parser.add_argument("--file", type=Path, required=True, help="keys file, SOLO_KEYS_FILE")
    parser.add_argument("--max-canvases", type=int, help="canvases in flight at once")
    parser.add_argument("--canvases-per-minute", type=float, help="mean rate")
    parser.add_argument("--weight", type=float, help="share relative to other clients (1)")
    parser.add_argument("--max-job-files", type=int, help="files of jobs, unfinished at once")
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
