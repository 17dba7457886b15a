from __future__ import annotations

from typing import Any

import pytest

from service.errors import DeviceError, Draining, ServiceError, StartupError, UnknownVersion
from service.scale.cluster.messages import Call
from service.scale.cluster.settings import ClusterSettings
from service.scale.cluster.worker import Worker, start_segmenter
from service.work.stages import ImageFile, Outcome, Stages
from service.work.steps import Options
from tests.support.blob_model import draw_picture, encode_picture

PICTURE = encode_picture(draw_picture())


def build_call(**changes: Any) -> Call:
    given: dict[str, Any] = {
        "model": "blobs",
        "version": None,
        "expected": 1,
        "images": [ImageFile(None, PICTURE)],
        "options": Options(),
    }
    return Call(**{**given, **changes})


async def test_another_version_than_expected_comes_with_its_configuration(worker: Worker) -> None:
    answer = await worker.segment(build_call())
    assert (answer.version, answer.config, len(answer.outcomes)) == (1, None, 1)
    answer = await worker.segment(build_call(expected=7))
    assert answer.version == 1
    assert answer.config is not None and answer.config.name == "blobs"


async def test_what_is_refused_as_a_whole_is_the_answers_error(worker: Worker) -> None:
    answer = await worker.segment(build_call(version=7))
    assert isinstance(answer.error, UnknownVersion)
    assert not answer.outcomes


async def test_an_error_of_a_library_does_not_travel(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(*_: object) -> Outcome:
        return Outcome(b"{}", error=KeyError("local"))

    monkeypatch.setattr(Stages, "run", run)
    (outcome,) = (await worker.segment(build_call())).outcomes
    assert type(outcome.error) is ServiceError
    assert "local" not in str(outcome.error)


async def test_a_worker_that_ends_takes_nothing_more(worker: Worker) -> None:
    await worker.check_health()
    await worker._segmenter.finish_accepted()
    assert isinstance((await worker.segment(build_call())).error, Draining)
    with pytest.raises(RuntimeError, match="engine"):
        await worker.check_health()


async def test_a_worker_that_cannot_start_says_why(cluster_settings: ClusterSettings) -> None:
    for changes, kind in (
        ({"model_repo": cluster_settings.model_repo / "no"}, StartupError),
        ({"device": "cuda"}, DeviceError),
    ):
        with pytest.raises(kind):
            await start_segmenter({**cluster_settings.server_settings(), **changes})
