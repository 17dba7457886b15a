"""A request's scale: images of another magnification are brought to the model's own.

Tiles become smaller or larger windows of the image on the same canvas, so that masks have the
image's size and the image is never resized as a whole.
"""

from __future__ import annotations

from typing import Literal

from pipeline.errors import PixelSizeError
from pipeline.model_config import MAX_ZOOM, InputSpec, ModelConfig, TileResize

Scale = Literal["own", "auto"]
"""The model's own, or one that is found from the objects in the image."""


class ScaleError(ValueError):
    """The scale that was asked for is impossible; the message names the parameter."""


def zoom_input(spec: InputSpec, zoom: float) -> InputSpec:
    """The input of a model with tiles for images that are shown larger by a factor."""
    assert isinstance(spec.resize, TileResize)
    return spec.model_copy(update={"resize": spec.resize.zoomed(zoom)})


def fit_scale(
    config: ModelConfig,
    *,
    object_size_px: float | None = None,
    um_per_px: float | None = None,
    scale: Scale = "own",
) -> ModelConfig:
    """The model's configuration for an image of this scale.

    Args:
        config: The model.
        object_size_px: Typical diameter of the image's objects.
        um_per_px: Size of the image's pixels, in micrometres.
        scale: `auto`: checked here, chosen by `pipeline.auto_scale`.

    Returns:
        The same model; its input is changed if the scale is not the model's own.

    Raises:
        ScaleError: Several are given, the model does not state its own or has no fixed scale, or
            the two differ by more than a factor of `MAX_ZOOM`.
    """
    given = {"object_size_px": object_size_px, "um_per_px": um_per_px}
    asked = [name for name, value in given.items() if value is not None]
    if scale == "auto":
        asked.append("scale")
    if not asked:
        return config
    if len(asked) > 1:
        raise ScaleError(f"{' and '.join(asked)} cannot be combined; give one")
    (name,) = asked
    resize, model = config.input.resize, f"model {config.name!r}"
    if not isinstance(resize, TileResize):
        raise ScaleError(f"{name}: {model} has no fixed scale, it resizes every image")
    stated = "object_size_px" if name == "scale" else name
    own = getattr(config.card, stated)
    if own is None:
        raise ScaleError(f"{name}: the card of {model} states no {stated}")
    value = given.get(name)
    if value is None:
        return config
    zoom = own / value if name == "object_size_px" else value / own
    if not 1 / MAX_ZOOM <= zoom <= MAX_ZOOM:
        raise ScaleError(
            f"{name} {value:g} is not in {own / MAX_ZOOM:g} to {own * MAX_ZOOM:g}; "
            f"{model} has {own:g}"
        )
    return config.model_copy(update={"input": zoom_input(config.input, zoom)})


def fit_stated(config: ModelConfig, um_per_px: float | None) -> ModelConfig:
    """The model's configuration for an image whose file states the size of its pixels.

    Returns:
        The same model; unchanged if nothing is stated, or the model has no such scale.

    Raises:
        PixelSizeError: The size differs from the model's by more than a factor of `MAX_ZOOM`.
    """
    is_scaled = isinstance(config.input.resize, TileResize) and config.card.um_per_px is not None
    if um_per_px is None or not is_scaled:
        return config
    try:
        return fit_scale(config, um_per_px=um_per_px)
    except ScaleError as error:
        raise PixelSizeError(
            f"the file states this size of a pixel: {error}; um_per_px or object_size_px in the "
            "request replaces it"
        ) from error
