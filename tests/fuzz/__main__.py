"""Searches for inputs that a target does not stand: `python -m tests.fuzz TARGET --seconds 600`.

Needs `pip install -e '.[fuzz]'` (atheris). Inputs that reach new code are kept in `.fuzz/TARGET`,
those that fail in `.fuzz/crashes`. `--minimise` then replaces the corpus in the repository, which
`tests/fuzz/test_corpus.py` runs in `make test`, by the smallest of all these that reach as much.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

from tests.fuzz.targets import TARGETS

FOUND = Path(".fuzz")
MAX_BYTES = 4096
TIMEOUT_S = 10
MEMORY_MB = 3000


def search(name: str, seconds: int) -> None:
    """Runs atheris, which ends the process; its last lines tell executions and coverage."""
    import atheris

    target = TARGETS[name]
    with atheris.instrument_imports(include=list(target.modules)):
        from tests.fuzz.corpus import build_seeds, load_corpus

        for data in (seeds := build_seeds(name) + load_corpus(name)):
            target.run(data)  # imports what it needs
    found, crashes = FOUND / name, FOUND / "crashes"
    for folder in (found, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds):
        (found / f"seed-{number}").write_bytes(data)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={MAX_BYTES}",
        f"-timeout={TIMEOUT_S}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-artifact_prefix={crashes}/{name}-",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(found)], target.run)
    atheris.Fuzz()


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--minimise", action="store_true", help="instead of a search")
    options = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    if not options.minimise:
        search(options.target, options.seconds)
        return 0
    from tests.fuzz.corpus import build_seeds, load_corpus, minimise, save_corpus

    inputs = [path.read_bytes() for path in (FOUND / options.target).glob("*")]
    inputs += build_seeds(options.target) + load_corpus(options.target)
    kept = minimise(TARGETS[options.target], inputs)
    save_corpus(options.target, kept)
    size = sum(map(len, kept))
    print(f"{options.target}: {len(kept)} of {len(inputs)} inputs kept, {size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
