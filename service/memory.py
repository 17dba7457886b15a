"""Memory limit of this process's control group, and settings that stay within it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from service.cores import list_cgroups
from service.errors import StartupError
from service.settings import MIB, Settings

logger = logging.getLogger(__name__)

PROCESS_BYTES: Final = 256 * MIB
"""A process with the bundled model, without requests."""
PIXEL_BYTES: Final = 3
_UNLIMITED: Final = 1 << 60  # v1 reports the largest multiple of a page


def find_memory_limit() -> int | None:
    """Least memory limit of this process's cgroup and those above it, bytes; None if unlimited."""
    limits = [limit for folder in list_cgroups("memory") if (limit := _read_limit(folder))]
    return min(limits, default=None)


def fit_memory(settings: Settings, limit: int | None) -> Settings:
    """Lowers the bounds of decoded images and of bodies to what a memory limit leaves for them.

    Bounds that were set stay as they are.

    Args:
        settings: The server's settings.
        limit: Memory limit, bytes; None: unlimited.

    Raises:
        StartupError: The limit has no room for one body and one image of the allowed size.
    """
    if limit is None:
        return settings
    processes = settings.workers * PROCESS_BYTES
    one_image = PIXEL_BYTES * settings.max_image_pixels
    needed = processes + settings.max_body_bytes + one_image
    if limit < needed:
        raise StartupError(
            f"the memory limit of {limit // MIB} MiB is below the {-(-needed // MIB)} MiB that are "
            f"needed: {processes // MIB} for {settings.workers} process(es), "
            f"{settings.max_body_bytes // MIB} for a request (max_body_bytes) and "
            f"{one_image // MIB} for a decoded image (max_image_pixels)"
        )
    free = limit - processes
    pixels = max(free // 2 // PIXEL_BYTES, settings.max_image_pixels)
    pixels = _lower(settings, "max_decoded_pixels", pixels)
    bodies = max(free - PIXEL_BYTES * pixels, settings.max_body_bytes)
    bodies = _lower(settings, "max_bodies_bytes", bodies)
    if processes + PIXEL_BYTES * pixels + bodies > limit:
        logger.warning(
            "max_decoded_pixels %d and max_bodies_bytes %d may need more than the memory limit of "
            "%d MiB",
            *(pixels, bodies, limit // MIB),
        )
    return settings.model_copy(update={"max_decoded_pixels": pixels, "max_bodies_bytes": bodies})


def _lower(settings: Settings, name: str, most: int) -> int:
    """A bound, lowered to `most` unless it was set."""
    value: int = getattr(settings, name)
    if name in settings.model_fields_set or value <= most:
        return value
    logger.info("%s is %d instead of %d, because of the memory limit", name, most, value)
    return most


def _read_limit(cgroup: Path) -> int | None:
    """Limit of one cgroup of either version; None if it has none."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            limit = int((cgroup / name).read_text(encoding="ascii"))
        except (OSError, ValueError):  # not this version, or "max"
            continue
        return limit if 0 < limit < _UNLIMITED else None
    return None
