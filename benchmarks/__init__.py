"""Measured comparisons: `python -m benchmarks --list`. None of them is a timed test.

`service` comes before NumPy and ONNX Runtime, which it configures here as in the server.
"""

import service  # noqa: F401
