"""The network and the objective of a run, as its options place and compile them."""

from __future__ import annotations

import torch
from torch import nn

from training import distributed
from training.configs.schema import Config
from training.model.solo import Solo
from training.objective import Objective
from training.run_options import RunOptions


def build_network(config: Config, options: RunOptions, processes: int) -> Solo:
    """The network with random weights, on its device."""
    model = Solo(config.model, config.num_classes).to(options.device)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    on_gpus = options.device.startswith("cuda") and processes > 1
    if on_gpus and config.model.backbone.norm == "bn":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return model


def build_objective(model: Solo, config: Config, options: RunOptions) -> nn.Module:
    """The network and its loss as one module, whose gradients all processes share."""
    objective = Objective(
        model, config.loss, precision=options.precision, channels_last=options.channels_last
    )
    if options.compile:
        model.compile()
    return distributed.synchronised(objective)
