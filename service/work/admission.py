"""Admission: how many images and pixels may be in work at once.

All of a request's images are let in or none; what is let in is counted until it is answered,
because that is how long its memory is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import Draining, Overloaded, TooManyImages


class Admission:
    """Counts work; to be used from one event loop.

    Args:
        max_images: Images in work at once.
        max_pixels: Pixels of the original images in work at once.
    """

    def __init__(self, max_images: int, max_pixels: int) -> None:
        self.max_images = max_images
        self.max_pixels = max_pixels
        self.images = 0
        self.pixels = 0
        self._closed = False

    @property
    def is_open(self) -> bool:
        """Whether new work is taken at all."""
        return not self._closed

    def close(self) -> None:
        """Refuses all new work from now on."""
        self._closed = True

    def check_open(self) -> None:
        """Cheap test before anything is read.

        Raises:
            Draining: The server is going down.
            Overloaded: There is no room for even one image.
        """
        if self._closed:
            raise Draining("the server is going down")
        if self.images >= self.max_images:
            raise self._full_of_images(1)

    @contextmanager
    def admit(self, images: int, pixels: int) -> Iterator[None]:
        """Holds room for a request's images.

        Raises:
            Draining: The server is going down.
            TooManyImages: They would not fit into an idle server either.
            Overloaded: They do not fit now.
        """
        if self._closed:
            raise Draining("the server is going down")
        if images > self.max_images or pixels > self.max_pixels:
            raise TooManyImages(
                f"the request has {images} images of {pixels} px together; the server takes at "
                f"most {self.max_images} images and {self.max_pixels} px at once"
            )
        if self.images + images > self.max_images:
            raise self._full_of_images(images)
        if self.pixels + pixels > self.max_pixels:
            raise Overloaded(
                f"{self.pixels} px are in work, {pixels} px more would exceed {self.max_pixels}",
                "queue_pixels",
            )
        self.images += images
        self.pixels += pixels
        try:
            yield
        finally:
            self.images -= images
            self.pixels -= pixels

    def _full_of_images(self, images: int) -> Overloaded:
        return Overloaded(
            f"{self.images} images are in work, {images} more would exceed {self.max_images}",
            "queue_images",
        )
