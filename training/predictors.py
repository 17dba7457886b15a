"""COCO results of a checkpoint, a model_repo folder or a running server.

All three use the same preprocessing and postprocessing (`pipeline`), so the AP is that of the
served model.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from tqdm import tqdm

from pipeline.contour import fill_contour
from pipeline.decode import decode_image
from pipeline.model_config import ClassSpec, Task
from pipeline.postprocess import postprocess
from pipeline.preprocess import prepare
from pipeline.types import Candidates, Detection
from training import distributed
from training.configs.schema import Config
from training.data.coco import CocoDataset
from training.model.solo import Solo
from training.weights.formats import CheckpointError, load_model

Result = dict[str, Any]
Predictor = Callable[[bytes], list[Result]]
"""Encoded image -> COCO results without their image_id."""

EVALUATION_THRESHOLD = 0.0
"""Score threshold in evaluation: COCO AP is computed from all ranked instances."""
_TILES_AT_ONCE = 4


def to_results(instances: Iterable[Detection], classes: tuple[ClassSpec, ...]) -> list[Result]:
    """Instances -> COCO results without their image_id."""
    return [
        {
            "category_id": classes[instance.label].category_id,
            "score": float(instance.score),
            "segmentation": {
                "size": list(instance.rle["size"]),
                "counts": instance.rle["counts"].decode(),
            },
        }
        for instance in instances
    ]


def as_regions(results: Sequence[Result], task: Task) -> list[Result]:
    """Replaces each contour by the region that it encloses; masks are not changed.

    The AP of contours then has the same ground truth and meaning as that of segmentation. An open
    contour encloses only its own pixels.
    """
    if task == "segmentation":
        return list(results)
    regions = []
    for result in results:
        filled = fill_contour(coco_mask.decode(result["segmentation"]))
        rle = coco_mask.encode(np.asfortranarray(filled))
        segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
        regions.append({**result, "segmentation": segmentation})
    return regions


class CheckpointPredictor:
    """Runs the PyTorch network.

    Args:
        model: The network in evaluation mode.
        config: Its configuration, with classes.
        max_dets: Maximum number of instances per image.
    """

    def __init__(self, model: Solo, config: Config, *, max_dets: int) -> None:
        self.model, self.config = model, config
        self.classes, self.score_threshold = config.classes, config.postprocess.score_threshold
        self.max_dets = max_dets

    @torch.inference_mode()
    def __call__(self, data: bytes) -> list[Result]:
        """Encoded image -> results."""
        prepared = prepare(decode_image(data), self.config.input)
        device = self.model.pixel_mean.device
        found: list[Candidates] = []
        for start in range(0, len(prepared.tiles), _TILES_AT_ONCE):
            tiles = prepared.tiles[start : start + _TILES_AT_ONCE]
            images = torch.from_numpy(np.stack([tile.image for tile in tiles])).to(device)
            valid_hw = torch.tensor([tile.valid_hw for tile in tiles], device=device)
            scores, labels, probs = self.model.candidates(images, valid_hw)
            found += [
                Candidates(s, c, m)
                for s, c, m in zip(
                    scores.cpu().numpy(), labels.cpu().numpy(), probs.cpu().numpy(), strict=True
                )
            ]
        instances = postprocess(
            prepared,
            found,
            self.config.postprocess,
            score_threshold=EVALUATION_THRESHOLD,
            max_instances=self.max_dets,
        ).instances
        return as_regions(to_results(instances, self.config.classes), self.config.task)


class RepositoryPredictor:
    """Runs a model_repo folder with the loader and the engine of the server.

    Raises:
        CheckpointError: The server would refuse the folder; says why.
    """

    def __init__(self, folder: Path, version: int | None, *, max_dets: int) -> None:
        from service.models.repository import ModelRefused, load_version

        try:
            self.loaded = load_version(folder, version)
        except ModelRefused as error:
            raise CheckpointError(str(error)) from error
        self.classes = self.loaded.config.classes
        self.score_threshold = self.loaded.config.postprocess.score_threshold
        self.max_dets = max_dets

    def __call__(self, data: bytes) -> list[Result]:
        """Encoded image -> results."""
        instances = self.loaded.segment(
            decode_image(data),
            score_threshold=EVALUATION_THRESHOLD,
            max_instances=self.max_dets,
        )
        config = self.loaded.config
        return as_regions(to_results(instances, config.classes), config.task)


class ServerPredictor:
    """Posts images to a running server's /segment.

    Raises:
        RuntimeError: The server answers with an error; the message contains its text.
    """

    classes: tuple[ClassSpec, ...]
    score_threshold: float

    def __init__(self, url: str, model: str | None, *, max_dets: int) -> None:
        query = {"score_threshold": str(EVALUATION_THRESHOLD), "max_instances": str(max_dets)}
        if model is not None:
            query["model"] = model
        base = url.rstrip("/")
        self.url = f"{base}/segment?{urllib.parse.urlencode(query)}"
        name = model or self._fetch(f"{base}/v2/models")["default_model"]
        detail = self._fetch(f"{base}/v2/models/{urllib.parse.quote(str(name), safe='')}")
        self.score_threshold = float(detail["postprocess"]["score_threshold"])
        self.classes = tuple(
            ClassSpec(category_id=c["category_id"], name=c["name"]) for c in detail["classes"]
        )

    def __call__(self, data: bytes) -> list[Result]:
        """Encoded image -> results."""
        kind = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
        request = urllib.request.Request(self.url, data, {"Content-Type": kind})
        content = self._fetch(request)
        keys = ("category_id", "score", "segmentation")
        results = [{k: i[k] for k in keys} for i in content["results"][0]["instances"]]
        return as_regions(results, content.get("task", "segmentation"))

    @staticmethod
    def _fetch(request: str | urllib.request.Request) -> dict[str, Any]:
        """The JSON of an answer."""
        url = request if isinstance(request, str) else request.full_url
        try:
            with urllib.request.urlopen(request) as response:
                content: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{url} answered {error.code}: {error.read()!r}") from error
        return content


def predict(data: CocoDataset, predictor: Predictor, *, progress: bool = False) -> list[Result]:
    """COCO results of all images of a split, in the order of the images.

    Of n processes, each predicts every n-th image; the first process returns all results, the
    others an empty list.
    """
    own = range(distributed.rank(), len(data), distributed.world_size())
    found = []
    for index in tqdm(own, unit="image", disable=not (progress and distributed.is_main())):
        image_id = data.records[index].image_id
        results = predictor(data.image_bytes(index))
        found.append((index, [{"image_id": image_id, **r} for r in results]))
    gathered = sorted(distributed.gather_to_main(found), key=lambda pair: pair[0])
    return [result for _, results in gathered for result in results]


def build_predictor(
    source: str, model: str | None, version: int | None, max_dets: int, device: str = "cpu"
) -> CheckpointPredictor | RepositoryPredictor | ServerPredictor:
    """A predictor for a URL, a model_repo folder or a checkpoint file (on `device`).

    Raises:
        CheckpointError: `source` is not one of the three.
    """
    if source.startswith(("http://", "https://")):
        return ServerPredictor(source, model, max_dets=max_dets)
    path = Path(source)
    if (path / "config.json").is_file():
        return RepositoryPredictor(path, version, max_dets=max_dets)
    if path.is_file():
        config, network = load_model(path)
        return CheckpointPredictor(network.to(device), config, max_dets=max_dets)
    raise CheckpointError(
        f"{source!r} is neither a checkpoint, nor a model folder with config.json, nor a URL"
    )
