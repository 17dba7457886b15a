"""Two processes against one, and one forward pass against several (float32, no batch norm)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.processes import finish, start_python
from tests.support.shared_training import (
    CANVASES,
    RUNS,
    TILES,
    curve,
    evaluate,
    train,
    weights,
)
from tests.support.tiny import build_tiny_data
from training import distributed
from training.configs.schema import Config
from training.data.coco import CocoDataset
from training.data.loader import build_loader
from training.data.sampling import Share

CURVE_TOLERANCE = 1e-5  # relative; metrics.csv has six digits
WEIGHTS_TOLERANCE = 1e-5  # of each tensor's largest change


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def two(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    out = tmp_path_factory.mktemp("two")
    command = ["-m", "tests.support.shared_training", "all", str(root), str(out)]
    for status, text in finish(start_python([command] * 2)):
        assert status == 0, text
    return out


@pytest.fixture(scope="module")
def one(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same configurations, each in this process."""
    out = tmp_path_factory.mktemp("one")
    for name, config in (("tiles", TILES), ("canvases", CANVASES)):
        train(root, out / name, config)
    return out


def assert_same_training(a: Path, b: Path, start: dict[str, torch.Tensor]) -> None:
    """Same losses at every step and the same weights at the end; `start` is where both began."""
    for name in ("category", "mask", "total", "num_positives", "lr"):
        assert curve(b, name) == pytest.approx(curve(a, name), rel=CURVE_TOLERANCE, abs=1e-9), name
    assert curve(b, "grad_norm") == pytest.approx(curve(a, "grad_norm"), rel=1e-4)
    first, second = weights(a), weights(b)
    moved = 0
    for key, before in start.items():
        change = (first[key] - before).abs().max().item()
        moved += change > 1e-4
        difference = (first[key] - second[key]).abs().max().item()
        assert difference <= WEIGHTS_TOLERANCE * max(change, 0.1), key
    assert moved > 20  # it was training


def initial_weights(root: Path, out: Path, config: Config) -> dict[str, torch.Tensor]:
    """Weights after no step of training."""
    trainer = train(root, out, replace(config, schedule=replace(config.schedule, epochs=1, lr=0.0)))
    return {k: v for k, v in trainer.model.state_dict().items() if v.is_floating_point()}


@pytest.mark.parametrize("name", sorted(RUNS))
def test_two_processes_train_as_one_does(
    name: str, one: Path, two: Path, root: Path, tmp_path: Path
) -> None:
    config = RUNS[name][0]
    alone = one / ("tiles" if config is TILES else "canvases")
    assert len(curve(alone, "total")) == 6
    assert_same_training(alone, two / name, initial_weights(root, tmp_path, config))


def test_the_runs_contain_a_process_without_objects_and_unequal_ones(root: Path) -> None:
    data = CocoDataset(root, "train")
    counts = []
    for rank in range(2):
        share = Share(rank=rank, processes=2)
        loader = build_loader(
            data, TILES, seed=0, start_step=0, stop_step=6, workers=0, share=share
        )
        counts.append([batch.num_positives for batch in loader])
    pairs = list(zip(*counts, strict=True))
    assert any(0 in pair and max(pair) > 0 for pair in pairs)
    assert any(0 < min(pair) < max(pair) for pair in pairs)


def test_all_processes_hold_the_same_weights_and_only_the_first_one_writes(two: Path) -> None:
    noted = [json.loads((two / f"noted{rank}.json").read_text()) for rank in range(2)]
    for name in RUNS:
        assert noted[0][name] == noted[1][name]
        assert len(list((two / name).glob("events.out.tfevents.*"))) == 1
        files = {path.name for path in (two / name).iterdir() if "tfevents" not in path.name}
        assert files == {"metrics.csv", "last.pt", "rollback.pt"}


def test_a_batch_that_does_not_divide_is_refused_by_every_process(two: Path) -> None:
    for rank in range(2):
        noted = json.loads((two / f"noted{rank}.json").read_text())
        assert noted["odd"] == "batch_size 3 cannot be split evenly over 2 processes"
    assert not (two / "odd").exists()


def test_shared_evaluation_is_the_same_without_duplicates(root: Path, two: Path) -> None:
    expected = evaluate(root)  # three images: two for one process, one for the other
    first, second = (json.loads((two / f"noted{r}.json").read_text()) for r in range(2))
    assert len(expected["results"]) > 20
    assert first["evaluation"]["results"] == json.loads(json.dumps(expected["results"]))
    assert second["evaluation"]["results"] == []
    assert first["evaluation"]["AP"] == second["evaluation"]["AP"] == expected["AP"]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    accumulate: int, root: Path, tmp_path: Path
) -> None:
    config = replace(TILES, schedule=replace(TILES.schedule, batch_size=4, epochs=3))
    train(root, tmp_path / "whole", config)
    train(root, tmp_path / "parts", config, accumulate=accumulate)
    start = initial_weights(root, tmp_path / "start", config)
    assert_same_training(tmp_path / "whole", tmp_path / "parts", start)


def test_alone_every_exchange_is_the_identity() -> None:
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.sum_over_processes([1.0, 2.5]) == [1.0, 2.5]
    assert distributed.any_process(True, False) == [True, False]
    assert distributed.gather_to_main([1, 2]) == [1, 2]
    assert distributed.from_main({"AP": 0.5}) == {"AP": 0.5}
    module = torch.nn.Linear(1, 1)
    assert distributed.synchronised(module) is module
    assert not distributed.is_lost_peer(RuntimeError("Connection closed by peer"))
    with distributed.joined("cuda:3") as device:
        assert device == "cuda:3"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:1", "device is 'cuda:1', expected cpu or cuda under torchrun"),
        ("cuda", "process 99 of this machine has no GPU: there are"),
    ],
)
def test_devices_that_processes_cannot_take(
    device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "99"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), distributed.joined(device):
        raise AssertionError("joined")


def test_parts_of_a_batch_need_the_whole_batchs_count(root: Path, tmp_path: Path) -> None:
    """Normalising each part by its own positives is another loss: the tests above can fail."""
    config = replace(TILES, schedule=replace(TILES.schedule, batch_size=4, epochs=1))
    data: Any = CocoDataset(root, "train")
    share = Share(accumulate=2)
    parts = list(
        build_loader(data, config, seed=0, start_step=0, stop_step=1, workers=0, share=share)
    )
    counts = [part.num_positives for part in parts]
    assert min(counts) > 0
    trainer = train(root, tmp_path, replace(config, schedule=replace(config.schedule, lr=0.0)))

    def loss(part: Any, normaliser: float) -> float:
        found = trainer.objective(part.images, part.valid_hw, part.targets, normaliser)
        return float(found["category"].detach())

    whole = sum(loss(part, sum(counts)) for part in parts)
    alone = [loss(part, count) for part, count in zip(parts, counts, strict=True)]
    assert abs(sum(alone) / 2 - whole) > 0.01 * whole
