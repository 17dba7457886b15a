"""The command solo-eval: COCO mask AP of a checkpoint, a model_repo folder or a running server.

All three use the same preprocessing and postprocessing (`pipeline`), so the AP is that of the
served model.
"""

from __future__ import annotations

import argparse
import json
import sys
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
from pipeline.model_config import ClassSpec, ContrastSpec, Task
from pipeline.postprocess import postprocess
from pipeline.preprocess import prepare
from pipeline.types import Candidates, Detection
from training import distributed
from training.coco_metrics import describe_metrics, mask_ap
from training.configs.schema import Config
from training.data.coco import CocoDataset, open_split
from training.data.formats import add_format_options
from training.data.records import DatasetError, ImageId
from training.data.validate import check_classes
from training.error_analysis import with_ground_truth_masks
from training.model.solo import Solo
from training.run_folder import require_writable
from training.weights.formats import CheckpointError, load_model

Result = dict[str, Any]
Predictor = Callable[[bytes], list[Result]]
"""Encoded image -> COCO results without their image_id."""

EVALUATION_THRESHOLD = 0.0
"""Score threshold in evaluation: COCO AP is computed from all ranked instances."""


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
        batch_size: Tiles per forward pass.
    """

    def __init__(self, model: Solo, config: Config, *, max_dets: int, batch_size: int = 4) -> None:
        self.model, self.config = model, config
        self.classes = config.classes
        self.max_dets, self.batch_size = max_dets, batch_size

    @torch.inference_mode()
    def __call__(self, data: bytes) -> list[Result]:
        """Encoded image -> results."""
        prepared = prepare(decode_image(data), self.config.input)
        device = self.model.pixel_mean.device
        found: list[Candidates] = []
        for start in range(0, len(prepared.tiles), self.batch_size):
            tiles = prepared.tiles[start : start + self.batch_size]
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
        )
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

    def __init__(self, url: str, model: str | None, *, max_dets: int) -> None:
        query = {"score_threshold": str(EVALUATION_THRESHOLD), "max_instances": str(max_dets)}
        if model is not None:
            query["model"] = model
        base = url.rstrip("/")
        self.url = f"{base}/segment?{urllib.parse.urlencode(query)}"
        name = model or self._fetch(f"{base}/v2/models")["default_model"]
        detail = self._fetch(f"{base}/v2/models/{urllib.parse.quote(str(name), safe='')}")
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


def evaluate_model(
    model: Solo, config: Config, data: CocoDataset, *, max_dets: int
) -> dict[str, float]:
    """AP of a network on a split; several processes share the images, the first one scores."""
    results = predict(data, CheckpointPredictor(model, config, max_dets=max_dets))
    numbers = {}
    if distributed.is_main():
        numbers = mask_ap(data.truth(), results, max_dets=max_dets)
    return distributed.from_main(numbers)


def load_validation(options: argparse.Namespace) -> CocoDataset:
    """A split for validation during training.

    Raises:
        DatasetError: It has no annotations, as COCO's test-dev.
    """
    data = open_split(options, options.val_split)
    if not data.labelled:
        raise DatasetError(
            f"{data.report.source} has no annotations, so --val-split {options.val_split} is not "
            "possible; train with another split; solo-eval --results writes the file for COCO's "
            "server"
        )
    return data


def open_splits(
    options: argparse.Namespace,
    contrast: ContrastSpec | None,
    train: CocoDataset | None = None,
) -> tuple[CocoDataset, CocoDataset | None]:
    """The data for training and, unless `--val-split` is empty, for validation.

    Their classes are compared, and what cannot be used of them is printed.

    Args:
        options: Of solo-train.
        contrast: Contrast rule of the model's input; validation applies it by itself.
        train: The training split, if it is open already.

    Raises:
        DatasetError: A split is refused, or the two do not fit together.
    """
    val = load_validation(options) if options.val_split else None
    data = (train or open_split(options, options.train_split)).with_contrast(contrast)
    warnings = [*data.report.warnings()]
    if val is not None:
        check_classes(val.checked, data.classes, data.report.source)
        warnings += val.report.warnings()
    distributed.warn("solo-train", warnings)
    return data, val


def build_validator(data: CocoDataset, max_dets: int) -> Callable[[Solo, Config], dict[str, float]]:
    """`evaluate_model` on a split, for the trainer."""

    def validate(model: Solo, config: Config) -> dict[str, float]:
        return evaluate_model(model, config, data, max_dets=max_dets)

    return validate


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


def build_parser() -> argparse.ArgumentParser:
    """The command line of solo-eval."""
    parser = argparse.ArgumentParser(
        prog="solo-eval",
        description="COCO mask AP of a model on a COCO-format split. A split without annotations "
        "(COCO's test-dev as downloaded) is not scored; --results writes the file for COCO's "
        "evaluation server, detections_test-dev2017_NAME_results.json, which is uploaded zipped.",
        epilog="Examples: solo-eval runs/nuclei/best.pt --data datasets/nuclei --max-dets 500 | "
        "solo-eval model_repo/nuclei --data ... | solo-eval http://localhost:8000 --data ... | "
        "torchrun --nproc-per-node 8 -m training.evaluate best.pt --device cuda --data "
        "datasets/coco --split test-dev --results detections_test-dev2017_solo_results.json",
    )
    parser.add_argument("model", help="checkpoint file, model_repo/<model> folder or server URL")
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled images")
    add_format_options(parser)
    parser.add_argument("--split", default="val", help="name of the annotation file (default: val)")
    parser.add_argument("--max-dets", type=int, default=100, help="detections per image (100)")
    parser.add_argument(
        "--device", default="cpu", help="device for a checkpoint: cpu, cuda, ... (cpu)"
    )
    parser.add_argument("--model-name", help="model of the server (default: the server's default)")
    parser.add_argument("--version", type=int, help="version of the folder (default: last)")
    parser.add_argument("--group-by", help="also print the AP for each value of this image field")
    parser.add_argument(
        "--ground-truth-masks",
        action="store_true",
        help="score the results with each mask replaced by the ground-truth mask of the largest "
        "IoU (error analysis of later versions of the paper)",
    )
    parser.add_argument("--results", type=Path, help="file to write the COCO results to")
    parser.add_argument("--json", type=Path, help="file to write the metrics to")
    return parser


def _groups(data: CocoDataset, field: str | None) -> dict[str, list[ImageId]]:
    """Ids of the images by the value of a field of the annotation file."""
    groups: dict[str, list[ImageId]] = {}
    for record, fields in zip(data.records, data.image_fields if field else (), strict=False):
        if field not in fields:
            raise DatasetError(f"image {record.image_id} has no field {field!r} to group by")
        groups.setdefault(str(fields[field]), []).append(record.image_id)
    return groups


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuses files that could not be written after the prediction."""
    for path in (options.results, options.json):
        if path is not None and (not path.parent.is_dir() or path.is_dir()):
            reason = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise ValueError(f"{path} cannot be written: {reason}")
        if path is not None:
            require_writable(path.parent)


def run(options: argparse.Namespace) -> None:
    """Predicts, scores if there are annotations, and writes the files of the options."""
    data = open_split(options, options.split)
    if not data.labelled and not options.results:
        raise DatasetError(
            f"{data.annotation_file} has no annotations to score; --results FILE writes the results"
        )
    _check_outputs(options)
    groups = _groups(data, options.group_by)
    distributed.warn("solo-eval", data.report.warnings())
    predictor = build_predictor(
        options.model, options.model_name, options.version, options.max_dets, options.device
    )
    check_classes(data.checked, predictor.classes, f"the model {options.model}")
    results = predict(data, predictor, progress=True)
    if not distributed.is_main():
        return
    if options.results:
        options.results.write_text(json.dumps(results))
    if not data.labelled:
        print(f"{len(results)} results: {options.results} (not scored, there are no annotations)")
        return
    if options.ground_truth_masks:
        results = with_ground_truth_masks(results, data)
    truth = data.truth()
    numbers = {"all": mask_ap(truth, results, max_dets=options.max_dets)}
    for name, ids in sorted(groups.items()):
        numbers[name] = mask_ap(truth, results, max_dets=options.max_dets, image_ids=ids)
    for name, row in numbers.items():
        print(f"{name:>20} " + describe_metrics(row))
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2))


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        with distributed.joined(options.device) as options.device:
            run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"solo-eval: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
