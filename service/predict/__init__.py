"""solo-predict: segments files with a model of model_repo, or through a running server.

Writes COCO results that `pycocotools` loads and, with --overlays, pictures with the masks. An
interrupted run continues where it stopped.
"""

from service.predict.command import main

__all__ = ["main"]
