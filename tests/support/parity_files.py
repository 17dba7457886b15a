"""Where the stored outputs of the published implementation are."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ROOT / "tests" / "data" / "parity" / "training"
"""The part that is in the repository."""
SHARED = Path(os.environ.get("SOLO_SHARED", ROOT.parent / "shared")) / "fixtures" / "parity"
"""The complete set: `$SOLO_SHARED/fixtures/parity`, by default beside the repository."""
WITHOUT_SHARED = f"the complete parity fixtures are not at {SHARED} (set SOLO_SHARED)"
"""The reason for which a test of the complete set is skipped."""


def has_shared() -> bool:
    """Whether the complete set is present."""
    return SHARED.is_dir()
