"""solo-predict: segments files with a model of model_repo, or through a running server.

Writes COCO results (`pycocotools` loads them as they are) and, if asked, pictures with the masks.
A run that was cut goes on where it stopped.
"""

from service.predict.command import main

__all__ = ["main"]
