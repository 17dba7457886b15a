"""Links between the pages, and the README's table of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "integrations/*.md", "model_repo/*/README.md")
    for path in ROOT.glob(pattern)
)


def remove_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def read_anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(r"^#+ +(.+?) *$", remove_code(page.read_text("utf-8")), re.MULTILINE)
    texts = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in texts}


def find_broken_links(page: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", remove_code(page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists() or (anchor and anchor not in read_anchors(path)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_pages_and_headings(page: Path) -> None:
    assert find_broken_links(page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    links = "[1](b.md) [2](#none) [3](#a-head) [4](https://a.b/c.md) [5](a.md#a-head)"
    page.write_text(f"# A `head`\n\n{links}\n\n```\n[x](y.md)\n# none\n```\n", "utf-8")
    assert find_broken_links(page) == ["b.md", "#none"]


def test_the_readme_lists_every_page() -> None:
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    table = (ROOT / "README.md").read_text("utf-8").split("## Documentation")[1]
    assert pages
    assert pages <= set(re.findall(r"\]\(([^)]+)\)", table))
