from __future__ import annotations

import os
import sys

import pytest

from service.errors import ServiceError
from service.http.limits import RequestBodies, return_free_memory
from tests.support.memory import read_resident_bytes


class Source:
    def __init__(self, bodies: RequestBodies) -> None:
        self.bodies = bodies
        self.arriving_bytes = 0
        self.errors: list[str] = []

    def receive(self, count: int) -> None:
        self.arriving_bytes += count
        self.bodies.add(self, count)

    def refuse_body(self, error: ServiceError) -> None:
        self.errors.append(str(error))
        self.bodies.complete(self)
        self.bodies.release(self.arriving_bytes)
        self.arriving_bytes = 0


def test_up_to_the_limit_nobody_is_refused() -> None:
    bodies = RequestBodies(100)
    one, two = Source(bodies), Source(bodies)
    one.receive(60)
    two.receive(40)
    assert (bodies.held, one.errors, two.errors) == (100, [], [])


def test_beyond_it_the_largest_is_refused_until_there_is_room() -> None:
    bodies = RequestBodies(100)
    sources = [Source(bodies) for _ in range(3)]
    for source, count in zip(sources, (50, 40, 10), strict=True):
        source.receive(count)
    sources[2].receive(1)
    assert [len(source.errors) for source in sources] == [1, 0, 0]
    assert "101 bytes of request bodies are in memory, the limit is 100" in sources[0].errors[0]
    assert bodies.held == 51


def test_a_complete_body_is_never_refused() -> None:
    bodies = RequestBodies(100)
    complete, late = Source(bodies), Source(bodies)
    complete.receive(99)
    bodies.complete(complete)
    late.receive(2)
    assert (len(complete.errors), len(late.errors), bodies.held) == (0, 1, 99)
    bodies.release(99)
    late.receive(100)
    assert len(late.errors) == 1


def test_memory_is_returned_once_after_much_was_released(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.limits._MUCH_BYTES", 100)
    bodies = RequestBodies(1000)
    source = Source(bodies)
    source.receive(150)
    assert not bodies.has_shrunk()
    bodies.release(99)
    assert not bodies.has_shrunk()
    bodies.release(1)
    assert bodies.has_shrunk()
    assert not bodies.has_shrunk()
    source.receive(100)
    bodies.release(100)
    assert bodies.has_shrunk()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    before = read_resident_bytes(os.getpid())
    blocks = [bytes(60_000) for _ in range(3000)]
    pins = blocks[::500]
    blocks.clear()
    return_free_memory()
    assert read_resident_bytes(os.getpid()) < before + 60_000_000
    assert len(pins) == 6
