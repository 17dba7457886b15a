"""What one worker gets of the server's limits."""

from __future__ import annotations

import math

from service.cores import count_cores
from service.settings import Settings


def share(settings: Settings) -> Settings:
    """The settings of one worker process: its share of the server's limits.

    Threads that were not set are divided too; engines get twice their share, so that a busy worker
    uses the cores of an idle one. The largest image stays allowed, unless its limit follows from
    a small queue.
    """
    count, cores = settings.workers, count_cores()
    own = math.ceil(cores / count)
    queue, image = math.ceil(settings.max_queue_canvases / count), settings.max_image_canvases
    follows = image < Settings.model_fields["max_image_canvases"].default
    if follows and "max_image_canvases" not in settings.model_fields_set:
        image = max(1, queue // 2)
    queue = max(queue, 2 * image)
    threads = {"pool_threads": own, "threads": min(cores, 2 * own)}
    return settings.model_copy(
        update={name: n for name, n in threads.items() if name not in settings.model_fields_set}
        | {
            "max_queue_canvases": queue,
            "max_image_canvases": image,
            "max_decoded_pixels": math.ceil(settings.max_decoded_pixels / count),
            "max_connections": math.ceil(settings.max_connections / count),
            "max_bodies_bytes": max(
                settings.max_body_bytes, math.ceil(settings.max_bodies_bytes / count)
            ),
        }
    )
