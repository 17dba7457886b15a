"""The side of mmdetection 3.3 in `benchmarks training`; runs in mmdetection's interpreter.

    python -m benchmarks.sides.training_mmdet KIND weights FILE    writes initial weights
    python -m benchmarks.sides.training_mmdet KIND steps FILE      answers each line with a step

mmcv-lite has no compiled operators. SOLO's heads use none, but mmdetection imports them with
every detector, so `mmcv.ops` is replaced by a module with empty classes.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sides.training_steps import answer_steps

HEADS = {
    "vanilla": "SOLOHead",
    "decoupled": "DecoupledSOLOHead",
    "decoupled_light": "DecoupledSOLOLightHead",
}


class _Stub(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - what makes a module a package

    def __getattr__(self, name: str) -> type[nn.Module]:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `mmcv.ops` and every module below it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "mmcv.ops" or name.startswith("mmcv.ops."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stub_operators() -> None:
    """Lets mmdetection be imported without mmcv's compiled operators."""
    sys.meta_path.insert(0, _StubFinder())


def import_mmdetection() -> None:
    """Makes mmdetection's models known to its registry, without `mmcv.ops`."""
    stub_operators()
    import_module("mmdet.utils").register_all_modules(init_default_scope=True)


def head_config(kind: str, levels: dict[str, Any]) -> dict[str, Any]:
    """mmdetection's head in its published configuration."""
    dice = {"type": "DiceLoss", "use_sigmoid": True, "loss_weight": 3.0}
    if kind != "vanilla":
        dice["activate"] = False
    return {
        "type": HEADS[kind],
        "num_classes": 80,
        "in_channels": 256,
        "feat_channels": 256,
        "pos_scale": 0.2,
        "cls_down_index": 0,
        "loss_mask": dice,
        "norm_cfg": {"type": "GN", "num_groups": 32, "requires_grad": True},
        **levels,
    }


def build_head(kind: str, levels: dict[str, Any]) -> Any:
    """A head, initialised as mmdetection does it."""
    import_mmdetection()
    head: Any = import_module("mmdet.registry").MODELS.build(head_config(kind, levels))
    head.init_weights()
    return head


def data_samples(inputs: dict[str, Any]) -> list[Any]:
    """Ground truth as mmdetection's loader hands it over."""
    structures = import_module("mmdet.structures")
    height, width = inputs["canvas_hw"]
    samples = []
    for image in inputs["objects"]:
        sample = structures.DetDataSample(
            metainfo={"batch_input_shape": (height, width), "img_shape": (height, width)}
        )
        sample.gt_instances = import_module("mmengine.structures").InstanceData(
            bboxes=image["boxes_xyxy"],
            labels=image["labels"],
            masks=structures.mask.BitmapMasks(image["masks"].numpy(), height, width),
        )
        samples.append(sample)
    return samples


def main(kind: str, task: str, file: Path) -> None:
    """Entry point."""
    content = torch.load(file, weights_only=True)
    torch.manual_seed(0)
    head = build_head(kind, content["levels"])
    if task == "weights":
        torch.save(head.state_dict(), file.with_name("weights.pt"))
        return
    torch.set_num_threads(content["threads"])
    head.load_state_dict(content["weights"])
    head.train()
    features = [f.requires_grad_() for f in content["features"]]

    def step() -> dict[str, Tensor]:
        losses = head.loss(features, data_samples(content))
        (losses["loss_cls"] + losses["loss_mask"]).backward()
        return {"category": losses["loss_cls"], "mask": losses["loss_mask"]}

    answer_steps(step, {f"mask_head.{k}": p for k, p in head.named_parameters()}, features)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
