from __future__ import annotations

import pytest

from benchmarks.load import NO_ANSWER, Answer, Load


@pytest.mark.parametrize("status", [503, NO_ANSWER])
def test_a_load_with_an_answer_other_than_200_is_no_success(status: int) -> None:
    load = Load([Answer(200, 0.1, 0.0), Answer(200, 0.1, 0.0)])
    load.require_success("http://a")
    load.answers.append(Answer(status, 0.1, 0.0))
    with pytest.raises(RuntimeError, match=f"http://a answered .*200: 2, {status}: 1"):
        load.require_success("http://a")


def test_a_load_without_answers_is_no_success() -> None:
    with pytest.raises(RuntimeError, match=r"http://a answered \{\}"):
        Load().require_success("http://a")
