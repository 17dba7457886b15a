from __future__ import annotations

import pytest

from service.errors import drop_frames


def fail_with_cause() -> None:
    try:
        raise OSError("first")
    except OSError as error:
        raise ValueError("second") from error


def fail_in_handler() -> None:
    try:
        fail_with_cause()
    except ValueError:
        raise RuntimeError("third")  # noqa: B904


def list_errors(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *list_errors(error.__context__)]


def test_no_frame_remains_of_an_error_and_its_causes() -> None:
    with pytest.raises(RuntimeError) as caught:
        fail_in_handler()
    errors = list_errors(caught.value)
    assert [str(error) for error in errors] == ["third", "second", "first"]
    assert all(error.__traceback__ is not None for error in errors)
    drop_frames(caught.value)
    assert all(error.__traceback__ is None for error in errors)
    assert list_errors(caught.value) == errors


def test_causes_may_be_a_cycle_or_never_raised() -> None:
    one, two, raised = ValueError("one"), ValueError("two"), OSError("raised")
    one.__cause__, two.__cause__, two.__context__ = two, one, raised
    with pytest.raises(OSError, match="raised"):
        raise raised
    assert raised.__traceback__ is not None
    drop_frames(one)
    assert raised.__traceback__ is None
