from __future__ import annotations

import re

import pytest

from pipeline.answer_match import AnswerMatch
from service.engines.state import EngineState
from service.observe.metrics import Metrics
from service.observe.timing import Timing
from service.observe.version_series import KEPT_ENDED
from service.work.request import Outcome
from tests.support.metrics import render

ENGINE = EngineState("onnxruntime", "cpu", "fp32", "CPU provider", None)
TIMING = Timing(decode=0.5, queue=0.25, infer=1.0, postprocess=0.125, encode=0.0625, total=2.0)


def serve(metrics: Metrics, version: int, name: str = "nuclei") -> None:
    metrics.add_model(name, version, lambda: ENGINE, 8)


def count_all(metrics: Metrics, version: int) -> None:
    metrics.count_image("nuclei", version, Outcome(b"{}", TIMING, canvases=1, instances=1))
    metrics.count_error("nuclei", version, "corrupt_image")


def end_others(metrics: Metrics, count: int) -> None:
    for version in range(1, count + 1):
        serve(metrics, version, "other")
        metrics.remove_model("other", version)


def find_versions(metrics: Metrics, name: str = "nuclei") -> set[int]:
    """Versions that have any series."""
    samples = re.findall(r"^solo_\w+{(.*)}", render(metrics), re.M)
    of_model = [labels for labels in samples if f'model="{name}"' in labels]
    return {int(n) for labels in of_model for n in re.findall(r'version="(\d+)"', labels)}


def test_of_many_versions_the_last_that_ended_and_those_in_use_have_series() -> None:
    metrics = Metrics()
    sizes = []
    for version in range(1, 31):
        serve(metrics, version)
        count_all(metrics, version)
        if version > 1:
            metrics.remove_model("nuclei", version - 1)
        sizes.append(render(metrics).count("\nsolo_"))
    assert find_versions(metrics) == set(range(30 - KEPT_ENDED, 31))
    assert len(set(sizes[KEPT_ENDED + 1 :])) == 1


def test_all_models_share_the_bound() -> None:
    metrics = Metrics()
    serve(metrics, 1)
    count_all(metrics, 1)
    metrics.remove_model("nuclei", 1)
    end_others(metrics, KEPT_ENDED - 1)
    assert find_versions(metrics) == {1}
    end_others(metrics, KEPT_ENDED)
    assert find_versions(metrics) == set()


def test_a_version_that_is_served_again_goes_on_counting() -> None:
    metrics = Metrics()
    for _ in range(2):
        serve(metrics, 1)
        count_all(metrics, 1)
        metrics.remove_model("nuclei", 1)
    assert 'solo_images_total{model="nuclei",version="1"} 2.0' in render(metrics)
    end_others(metrics, KEPT_ENDED)
    serve(metrics, 1)
    assert 'solo_images_total{model="nuclei",version="1"} 0.0' in render(metrics)
    count_all(metrics, 1)
    end_others(metrics, 3 * KEPT_ENDED)
    assert 'solo_images_total{model="nuclei",version="1"} 1.0' in render(metrics)


def test_an_engine_that_is_renewed_is_no_further_use() -> None:
    metrics = Metrics()
    serve(metrics, 1)
    serve(metrics, 1)
    metrics.remove_model("nuclei", 1)
    metrics.remove_model("nuclei", 1)
    end_others(metrics, KEPT_ENDED)
    assert find_versions(metrics) == set()


@pytest.mark.parametrize("code", ["corrupt_image", "engine_error"])
def test_what_is_counted_after_a_version_is_forgotten_does_not_stay_for_good(code: str) -> None:
    metrics = Metrics()
    serve(metrics, 1)
    metrics.remove_model("nuclei", 1)
    end_others(metrics, KEPT_ENDED)
    metrics.count_error("nuclei", 1, code)
    metrics.count_image("nuclei", 1, Outcome(b"{}", TIMING, canvases=1, instances=1))
    assert find_versions(metrics) == {1}
    end_others(metrics, KEPT_ENDED)
    assert find_versions(metrics) == set()


class TestShadows:
    def test_a_shadows_series_are_bounded_too(self) -> None:
        metrics = Metrics()
        for version in range(1, 20):
            metrics.shadow.begin("nuclei", version)
            metrics.shadow.add("nuclei", version, AnswerMatch((0.8,), (0.1,), (1, 1)))
            metrics.shadow.end("nuclei", version)
        assert find_versions(metrics) == set(range(20 - KEPT_ENDED, 20))

    @pytest.mark.parametrize("promoted_first", [True, False])
    def test_a_promoted_shadow_is_served_with_its_series(self, promoted_first: bool) -> None:
        metrics = Metrics()
        metrics.shadow.begin("nuclei", 2)
        if promoted_first:
            serve(metrics, 2)
            metrics.shadow.end("nuclei", 2)
        else:
            metrics.shadow.end("nuclei", 2)
            serve(metrics, 2)
        end_others(metrics, 3 * KEPT_ENDED)
        assert 'solo_shadow_running{model="nuclei",version="2"} 0.0' in render(metrics)
        metrics.remove_model("nuclei", 2)
        end_others(metrics, KEPT_ENDED)
        assert find_versions(metrics) == set()
