from __future__ import annotations

import errno
import os

import pytest

from service.jobs.errors import ImageUnusable, RunFailed, blame_image, describe, may_pass


def test_a_reason_is_the_systems_text_or_the_kind_of_the_exception() -> None:
    text = os.strerror(errno.EACCES)
    assert describe(PermissionError(errno.EACCES, text, "a/b.png")) == text
    assert describe(OSError("of a library")) == "OSError: of a library"
    assert describe(KeyError("score")) == "KeyError: 'score'"
    assert describe(MemoryError()) == "MemoryError"


@pytest.mark.parametrize("error", [MemoryError(), ValueError("x"), OSError("y"), RecursionError()])
def test_any_exception_is_the_images(error: Exception) -> None:
    with pytest.raises(ImageUnusable) as caught, blame_image():
        raise error
    assert str(caught.value) == describe(error)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [RunFailed("gone"), ImageUnusable("bad"), KeyboardInterrupt()])
def test_what_is_known_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, blame_image():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError("AWS Error SLOW_DOWN during GetObject operation: no"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 502) during HeadObject operation"), True),
        (OSError("google::cloud::Status(UNAVAILABLE: no)"), True),
        (ConnectionResetError("gone"), True),
        (TimeoutError(), True),
        (OSError("AWS Error ACCESS_DENIED for key 'in/SLOW_DOWN.png' during HeadObject"), False),
        (OSError("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation"), False),
        (FileNotFoundError(2, "No such file", "/data/UNAVAILABLE/a.png"), False),
        (ValueError("wrong"), False),
    ],
)
def test_what_may_pass(error: Exception, passes: bool) -> None:
    assert may_pass(error) is passes
