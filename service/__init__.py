"""solo-serve: an HTTP microservice for instance segmentation with SOLO."""

import os

# ONNX Runtime reads this when it is imported; it collects usage data otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
