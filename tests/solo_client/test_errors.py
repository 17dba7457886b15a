from __future__ import annotations

import copy
import inspect
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import solo_client
from solo_client import Busy, ImageFailed, SoloError, TimedOut

FIELDS: dict[str, Any] = {
    "status": 503,
    "code": "overloaded",
    "message": "it is full",
    "request_id": "r1",
    "retry_after_s": 2.5,
    "index": 3,
    "file_name": "a.jpg",
}


def find_errors(base: type[SoloError] = SoloError) -> list[type[SoloError]]:
    return [base, *(found for child in base.__subclasses__() for found in find_errors(child))]


def build(kind: type[SoloError]) -> SoloError:
    """An error of a class, with a value for each argument of its constructor."""
    if kind.__init__ is Exception.__init__:
        return kind("some text")
    signature = inspect.signature(kind)
    positional, named = [], {}
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            named[name] = FIELDS[name]
        else:
            positional.append(FIELDS[name])
    return kind(*positional, **named)


def test_every_public_error_is_found() -> None:
    public = {getattr(solo_client, name) for name in solo_client.__all__}
    errors = {kind for kind in public if isinstance(kind, type) and issubclass(kind, Exception)}
    assert errors == set(find_errors())
    assert len(errors) >= 9


def pickle_by(protocol: int) -> Callable[[Any], Any]:
    return lambda error: pickle.loads(pickle.dumps(error, protocol))


COPIES = {
    **{f"protocol {n}": pickle_by(n) for n in range(pickle.HIGHEST_PROTOCOL + 1)},
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("kind", find_errors())
@pytest.mark.parametrize("way", COPIES)
def test_an_error_is_copied_and_pickled_with_its_fields(kind: type[SoloError], way: str) -> None:
    error = build(kind)
    error.add_note("while testing")
    found = COPIES[way](error)
    assert type(found) is kind
    assert found is not error
    assert vars(found) == vars(error)
    assert found.args == error.args
    assert str(found) == str(error) != ""


def fail(kind: type[SoloError]) -> None:
    raise build(kind)


@pytest.mark.parametrize("kind", [Busy, ImageFailed, TimedOut])
def test_errors_come_through_a_pool_of_processes(kind: type[SoloError]) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(kind) as caught:
        pool.map_async(fail, [kind]).get(timeout=60)
    assert vars(caught.value) == vars(build(kind))


def test_a_failed_image_is_named() -> None:
    assert str(ImageFailed(2, "a.jpg", "corrupt_image", "it is cut")) == (
        "image 2 (a.jpg): corrupt_image: it is cut"
    )
    assert str(ImageFailed(2, None, "corrupt_image", "it is cut")) == (
        "image 2: corrupt_image: it is cut"
    )
