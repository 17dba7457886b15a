from __future__ import annotations

import pickle
from typing import Any

import pytest

from pipeline.errors import UnsupportedFormat
from service.errors import DeviceError, Draining, ServiceError, StartupError, UnknownVersion
from service.scale.cluster.messages import Call
from service.scale.cluster.settings import ClusterSettings
from service.scale.cluster.worker import Worker, start_segmenter
from service.work.image import ImageWork
from service.work.request import ClientProfile, ImageFile, Outcome, RequestOptions
from tests.support.blob_model import draw_picture, encode_picture

PICTURE = encode_picture(draw_picture())


def build_call(**changes: Any) -> Call:
    given: dict[str, Any] = {
        "model": "blobs",
        "version": None,
        "expected": 1,
        "images": [ImageFile(None, PICTURE)],
        "options": RequestOptions(),
        "client": ClientProfile(name="a"),
    }
    return Call(**{**given, **changes})


async def test_another_version_than_expected_comes_with_its_state(worker: Worker) -> None:
    answer = await worker.segment(build_call())
    assert (answer.model, answer.error, len(answer.outcomes)) == (None, None, 1)
    answer = await worker.segment(build_call(expected=7))
    assert answer.model is not None
    assert (answer.model.name, answer.model.version) == ("blobs", 1)


async def test_what_is_refused_as_a_whole_is_the_answers_error(worker: Worker) -> None:
    answer = await worker.segment(build_call(version=7))
    assert isinstance(answer.error, UnknownVersion)
    assert not answer.outcomes


async def test_an_error_of_a_library_does_not_travel(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LocalError(Exception):
        """Cannot be pickled."""

    def open_image(self: ImageWork, canvases: Any) -> None:
        raise LocalError("local")

    monkeypatch.setattr(ImageWork, "open", open_image)
    (outcome,) = (await worker.segment(build_call())).outcomes
    assert type(outcome.error) is ServiceError
    assert "local" not in str(outcome.error)
    travelled: Outcome = pickle.loads(pickle.dumps(outcome))
    assert b"local" not in travelled.payload


async def test_a_call_counts_for_its_client(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the worker is as fair between clients as the front."""
    held: list[int] = []
    admission = worker._segmenter.admission

    def open_image(self: ImageWork, canvases: Any) -> None:
        held.append(admission.held(ClientProfile(name="a")))
        raise UnsupportedFormat("enough")

    monkeypatch.setattr(ImageWork, "open", open_image)
    await worker.segment(build_call(images=[ImageFile(None, PICTURE)] * 2))
    assert max(held) == 2
    assert admission.held(ClientProfile(name="a")) == 0


async def test_a_worker_that_ends_takes_nothing_more(worker: Worker) -> None:
    await worker.check_health()
    await worker._segmenter.finish_accepted()
    assert isinstance((await worker.segment(build_call())).error, Draining)
    with pytest.raises(RuntimeError, match="engine"):
        await worker.check_health()


async def test_a_worker_whose_engines_cannot_be_replaced_is_unhealthy(worker: Worker) -> None:
    worker._segmenter.store.renewal.failure = "no engine can be built"
    with pytest.raises(RuntimeError, match="no engine can be built"):
        await worker.check_health()


async def test_a_worker_that_cannot_start_says_why(cluster_settings: ClusterSettings) -> None:
    for changes, kind in (
        ({"model_repo": cluster_settings.model_repo / "no"}, StartupError),
        ({"device": "cuda"}, DeviceError),
    ):
        with pytest.raises(kind):
            await start_segmenter({**cluster_settings.server_settings(), **changes})
