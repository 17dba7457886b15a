from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness.plots import Panel, draw

LINES = {"a": [(1.0, 2.0), (2.0, 4.0), (4.0, 4.1)], "b": [(1.0, 3.0), (4.0, 3.1)]}


def test_panels_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install matplotlib")
    panels = [
        Panel(title="lines", lines=LINES, rings={"a": [(2.0, 4.0)]}, log="xy"),
        Panel(title="levels", lines=LINES, levels={"limit": 5.0}, crosses={"c": [(2, 1)]}, log="x"),
        Panel(title="bars", bars={"one": (1.0, 2.0, 3.0)}),
        Panel(title="linear", lines=LINES),
        Panel(title="second row", lines=LINES),
    ]
    file = tmp_path / "plot.svg"
    draw(panels, file)
    text = file.read_text()
    assert all(panel.title in text for panel in panels)
    assert "limit" in text and "one" in text
