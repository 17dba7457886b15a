from __future__ import annotations

import pytest

from service.errors import Draining, Overloaded, TooManyImages
from service.work.admission import Admission


def test_work_is_counted_until_it_is_done() -> None:
    admission = Admission(4, 100)
    with admission.admit(3, 60):
        assert (admission.images, admission.pixels) == (3, 60)
        with admission.admit(1, 40):
            assert (admission.images, admission.pixels) == (4, 100)
    assert (admission.images, admission.pixels) == (0, 0)


def test_work_that_fails_gives_its_room_back() -> None:
    admission = Admission(4, 100)
    with pytest.raises(RuntimeError), admission.admit(4, 100):
        raise RuntimeError
    assert (admission.images, admission.pixels) == (0, 0)


@pytest.mark.parametrize(
    ("images", "pixels", "reason"), [(3, 1, "queue_images"), (1, 50, "queue_pixels")]
)
def test_what_does_not_fit_now_is_overload(images: int, pixels: int, reason: str) -> None:
    admission = Admission(4, 100)
    with admission.admit(2, 60):
        with pytest.raises(Overloaded, match="would exceed") as caught:
            admission.admit(images, pixels).__enter__()
        assert caught.value.reason == reason
        assert (admission.images, admission.pixels) == (2, 60)


@pytest.mark.parametrize(("images", "pixels"), [(5, 1), (1, 101)])
def test_what_can_never_fit_is_no_overload(images: int, pixels: int) -> None:
    with pytest.raises(TooManyImages, match=f"{images} images of {pixels} px"):
        Admission(4, 100).admit(images, pixels).__enter__()


def test_closed_admission_takes_nothing_and_lets_accepted_work_end() -> None:
    admission = Admission(4, 100)
    with admission.admit(1, 1):
        admission.close()
        assert not admission.is_open
        with pytest.raises(Draining):
            admission.admit(1, 1).__enter__()
        with pytest.raises(Draining):
            admission.check_open()
        assert admission.images == 1
    assert admission.images == 0


def test_a_full_queue_is_seen_before_a_body_is_read() -> None:
    admission = Admission(1, 100)
    admission.check_open()
    with admission.admit(1, 1), pytest.raises(Overloaded):
        admission.check_open()
