from __future__ import annotations

import sys

import pytest


@pytest.fixture(params=[False, True], ids=["without matplotlib", "matplotlib"])
def has_matplotlib(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether pictures can be drawn; skips the test with matplotlib if that is not installed."""
    if request.param:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed: no picture is drawn")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    return bool(request.param)
