"""Compiles the kernels for named architectures, so that a server needs no compiler.

python -m service.engines.kernels.prebuild --architectures sm_80 sm_90
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from service.engines.base import BackendError
from service.engines.kernels.nvrtc import (
    ARCHITECTURES,
    PREBUILT,
    SOURCES,
    compile_cubin,
    compiler_version,
    describe,
    prebuilt_path,
    read_cubin,
    write_cubin,
)


def prebuild(folder: Path = PREBUILT, architectures: Sequence[str] = ARCHITECTURES) -> list[Path]:
    """Compiles the kernels that are missing; needs no GPU.

    Args:
        folder: Target; the service searches the default first.
        architectures: For example "sm_90".

    Returns:
        All files, new and existing.

    Raises:
        BackendError: NVRTC is missing or fails.
        OSError: The folder cannot be written.
    """
    paths = []
    for architecture in architectures:
        for name in SOURCES:
            recipe = describe(name, architecture, compiler_version())
            path = prebuilt_path(folder, name, architecture)
            if read_cubin(path, recipe) is None:
                write_cubin(path, recipe, compile_cubin(name, architecture))
            paths.append(path)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m service.engines.kernels.prebuild", description=__doc__
    )
    parser.add_argument("--folder", type=Path, default=PREBUILT, help="default: %(default)s")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), metavar="SM")
    options = parser.parse_args(arguments)
    try:
        paths = prebuild(options.folder, options.architectures)
    except (BackendError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(f"{path} {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
