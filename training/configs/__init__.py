"""The model zoo. A configuration's name is also the name of the model in model_repo."""

from __future__ import annotations

from training.configs.coco import COCO_CONFIGS
from training.configs.facades import FACADES_CONFIGS
from training.configs.nuclei import NUCLEI_CONFIGS
from training.configs.schema import Config

_ZOO = {config.name: config for config in (*COCO_CONFIGS, *NUCLEI_CONFIGS, *FACADES_CONFIGS)}


def list_configs() -> list[str]:
    """Names of the configurations, sorted."""
    return sorted(_ZOO)


def get_config(name: str) -> Config:
    """A configuration by its name.

    Raises:
        ValueError: There is no such name; lists those that there are.
    """
    if name not in _ZOO:
        raise ValueError(f"no configuration named {name!r}; there are {', '.join(list_configs())}")
    return _ZOO[name]
