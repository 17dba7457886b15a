"""What the demo page says of a model and of doubtful results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.conftest import OpenDemo
from tests.service.http.routes.test_warnings import STRIPES, USUAL, add_domain
from tests.support.blob_model import encode_picture, publish
from tests.support.server import ServerProcess, run_server

pytestmark = pytest.mark.browser
CARD = {
    "domain": "Coloured boxes",
    "object_size_px": 16,
    "training_data": "40 drawings",
    "licence": "CC0 1.0",
    "attribution": "<b>The</b> authors",
}


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A model that has samples and a card, and one without either."""
    folder = tmp_path_factory.mktemp("cards")
    add_domain(publish(folder / "repo", "nuclei", card=CARD))
    publish(folder / "repo", "plain")
    flags = ("--device", "cpu", "--threads", "1", "--pool-threads", "1")
    with run_server(folder / "log", "--model-repo", str(folder / "repo"), *flags) as running:
        yield running


def test_each_model_shows_its_card_and_its_samples(
    open_demo: OpenDemo, two_models: ServerProcess
) -> None:
    demo = open_demo("?model=nuclei", two_models.url)
    card = demo.page.get_by_role("list", name="About this model")
    card.wait_for()
    assert card.get_by_role("listitem").all_inner_texts() == [
        "Objects of about 16 px",
        "Trained on 40 drawings",
        "CC0 1.0",
        "<b>The</b> authors",
    ]
    assert demo.by_id("model-domain").inner_text() == "nuclei: Coloured boxes."
    samples = demo.page.locator("[data-sample]:visible span")
    assert samples.all_inner_texts() == ["Crowded nuclei", "Sparse nuclei", "Stained tissue"]
    demo.by_id("model").select_option("plain")
    demo.page.get_by_role("button", name="Photograph").wait_for()
    assert card.is_hidden() and demo.by_id("model-domain").is_hidden()
    assert len(samples.all()) == 5


def test_warnings_are_shown_and_announced(open_demo: OpenDemo, two_models: ServerProcess) -> None:
    demo = open_demo("?model=nuclei", two_models.url)
    warnings = demo.page.get_by_role("list", name="Warnings")
    demo.segment(encode_picture(STRIPES), "stripes.png")
    (text,) = warnings.get_by_role("listitem").all_inner_texts()
    assert text.startswith("The image is unlike those that model 'nuclei' was trained on")
    assert text in demo.by_id("announcer").inner_text()
    demo.segment(encode_picture(USUAL), "usual.png")
    assert warnings.is_hidden()


def test_a_sample_can_be_of_another_kind(open_demo: OpenDemo, two_models: ServerProcess) -> None:
    demo = open_demo("?model=plain", two_models.url)
    demo.page.get_by_role("button", name="Photograph").click()
    demo.await_result()
    assert demo.by_id("about").inner_text().startswith("cat.jpg, 451 × 300 px.")


def test_the_page_fits_a_phone_with_card_and_warning(
    open_demo: OpenDemo, two_models: ServerProcess, tmp_path: Path
) -> None:
    demo = open_demo("?model=nuclei", two_models.url, viewport={"width": 360, "height": 740})
    demo.page.get_by_role("list", name="About this model").wait_for()
    width = "document.documentElement.scrollWidth"
    assert demo.page.evaluate(width) <= 360
    demo.segment(encode_picture(STRIPES), "stripes.png")
    assert demo.page.evaluate(width) <= 360
