"""python -m benchmarks NAME [options]."""

from benchmarks.harness.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
