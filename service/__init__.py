"""solo-serve: an HTTP microservice for instance segmentation with SOLO."""

import os

# ONNX Runtime reads this when it is imported; it collects usage data otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# NumPy's OpenBLAS reads this when it is loaded. NMS multiplies small matrices, in threads of our
# own, which are as many as there are cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
