"""The entry point of the commands that need more packages than the server."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

MODULES = {
    "solo-train": "training.train",
    "solo-data": "training.data_command",
    "solo-config": "training.configs.toml_files",
    "solo-eval": "training.evaluate",
    "solo-import": "training.weights.importing",
    "solo-export": "export.__main__",
}
_OWN = ("training", "export", "pipeline", "service")


def main() -> int:
    """Runs the command of this process's name.

    Returns:
        Its exit status; 1 if a package is missing, after one line that names the extra.
    """
    name = Path(sys.argv[0]).stem
    try:
        module = import_module(MODULES[name])
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in _OWN:
            raise
        extra = "export" if name == "solo-export" else "training"
        advice = f"it is in the extra '{extra}' of solo-serve (make install-training)"
        print(f"{name}: {error.name} is not installed; {advice}", file=sys.stderr)
        return 1
    status: int = module.main()
    return status
