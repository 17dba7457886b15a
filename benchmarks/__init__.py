"""Measured comparisons; never timed tests. `python -m benchmarks` runs them.

`service` comes before NumPy and ONNX Runtime, which it sets up here as in the server.
"""

import service  # noqa: F401
