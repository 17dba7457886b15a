"""Mixed precision, memory layout, compilation and the scaled learning rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.shared_training import CANVASES, TILES, curve, train, weights
from tests.support.tiny import build_tiny_data
from training.configs import get_config
from training.configs.schema import Config
from training.data.coco import CocoDataset
from training.objective import Objective
from training.optim import scale_learning_rate
from training.run_options import RunOptions
from training.trainer import Trainer
from training.weights.formats import load_checkpoint

SHORT_TILES = replace(TILES, schedule=replace(TILES.schedule, epochs=3))
SHORT_CANVASES = replace(CANVASES, schedule=replace(CANVASES.schedule, epochs=3))
BOTH = pytest.mark.parametrize("config", [SHORT_TILES, SHORT_CANVASES], ids=["light", "vanilla"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_data(tmp_path_factory.mktemp("data"))


def record_types(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[torch.dtype]]:
    """Types that the head's convolutions give and that the loss takes, of the steps to come."""
    seen: dict[str, set[torch.dtype]] = {"convolutions": set(), "loss": set()}
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, i, o: seen["convolutions"].add(o.dtype))
    original = trainer.model.head.cell_logits

    def cell_logits(output: Any, *rest: Any) -> Any:
        seen["loss"] |= {output.category_logits.dtype, *(m.dtype for m in output.mask_inputs)}
        logits = original(output, *rest)
        seen["loss"] |= {m.dtype for m in logits}
        return logits

    monkeypatch.setattr(trainer.model.head, "cell_logits", cell_logits)
    return seen


@BOTH
@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_convolutions_are_short_and_losses_long(
    config: Config,
    precision: Any,
    dtype: torch.dtype,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(root, tmp_path / "fp32", config)
    options = RunOptions(out=tmp_path / "mixed", workers=0, log_every=1, precision=precision)
    trainer = Trainer(config, CocoDataset(root, "train"), options, None)
    seen = record_types(trainer, monkeypatch)
    trainer.fit()
    assert seen == {"convolutions": {dtype}, "loss": {torch.float32}}
    state = weights(tmp_path / "mixed")
    assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float32}
    # bfloat16 has eight bits: losses agree to a percent or so.
    full, mixed = curve(tmp_path / "fp32", "total"), curve(tmp_path / "mixed", "total")
    assert mixed == pytest.approx(full, rel=0.02) and mixed != full


def test_the_scale_of_fp16_gradients_is_resumed_and_an_overflow_leaves_a_step_out(
    root: Path, tmp_path: Path
) -> None:
    trainer = train(root, tmp_path, SHORT_TILES, precision="fp16")
    scale = trainer.scaler.get_scale()
    assert load_checkpoint(tmp_path / "last.pt")[1]["scaler"]["scale"] == scale > 1
    longer = replace(TILES, schedule=replace(TILES.schedule, epochs=3, clip_norm=None))
    data = CocoDataset(root, "train")
    options = RunOptions(out=tmp_path / "overflow", workers=0, precision="fp16")
    trainer = Trainer(longer, data, options, None)
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0**40})
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    numbers = trainer.train_step(*next(trainer.batches()))
    assert trainer.step == 1 and numbers["total"] < 10
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert trainer.scaler.get_scale() == 2.0**39
    trainer.save()
    assert Trainer(longer, data, options, None).scaler.get_scale() == 2.0**39


def test_a_bf16_run_resumes_bit_for_bit(root: Path, tmp_path: Path) -> None:
    data = CocoDataset(root, "train")

    def build(out: str) -> Trainer:
        options = RunOptions(out=tmp_path / out, workers=0, precision="bf16")
        return Trainer(SHORT_CANVASES, data, options, None)

    build("unbroken").fit()
    first = build("broken")
    first.train_step(*next(first.batches()))
    first.save()
    second = build("broken")
    assert second.step == 1
    second.fit()
    a, b = weights(tmp_path / "unbroken"), weights(tmp_path / "broken")
    assert all(torch.equal(a[k], b[k]) for k in a)


@BOTH
def test_the_memory_layout_changes_no_number_that_matters(
    config: Config, root: Path, tmp_path: Path
) -> None:
    train(root, tmp_path / "plain", config)
    trainer = train(root, tmp_path / "channels_last", config, channels_last=True)
    kernel = trainer.model.backbone.get_submodule("layer1.0.conv1").weight
    assert isinstance(kernel, torch.Tensor)
    assert kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()
    plain, other = (curve(tmp_path / name, "total") for name in ("plain", "channels_last"))
    assert other == pytest.approx(plain, rel=1e-4)
    # A checkpoint of one layout goes on in the other.
    for source, channels_last in (("plain", True), ("channels_last", False)):
        options = RunOptions(out=tmp_path / source, workers=0, channels_last=channels_last)
        resumed = Trainer(config, CocoDataset(root, "train"), options, None)
        assert resumed.step == 3
        stored = weights(tmp_path / source)
        assert all(torch.equal(v, stored[k]) for k, v in resumed.model.state_dict().items())


@pytest.mark.slow  # minutes of compilation
def test_a_compiled_network_trains_alike(root: Path, tmp_path: Path) -> None:
    train(root, tmp_path / "eager", SHORT_TILES)
    train(root, tmp_path / "compiled", SHORT_TILES, compile=True)
    eager, compiled = (curve(tmp_path / name, "total") for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-3)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "eager").keys()


def test_another_precision_is_refused(root: Path, tmp_path: Path) -> None:
    options = RunOptions(out=tmp_path, precision="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision is 'int8', expected one of fp32, bf16, fp16"):
        Trainer(TILES, CocoDataset(root, "train"), options, None)


def test_the_objective_is_the_models_loss(root: Path, tmp_path: Path) -> None:
    trainer = Trainer(TILES, CocoDataset(root, "train"), RunOptions(out=tmp_path, workers=0), None)
    assert isinstance(trainer.objective, Objective)
    assert {n.removeprefix("model.") for n, _ in trainer.objective.named_parameters()} == {
        n for n, _ in trainer.model.named_parameters()
    }


@pytest.mark.parametrize(("batch", "factor"), [(16, 1.0), (32, 2.0), (4, 0.25)])
def test_the_rate_grows_with_the_batch(batch: int, factor: float) -> None:
    config = get_config("solo_r50")
    larger = replace(config, schedule=replace(config.schedule, batch_size=batch))
    scaled = scale_learning_rate(larger, config.schedule.batch_size)
    assert scaled.schedule.lr == pytest.approx(0.01 * factor)
    assert replace(scaled, schedule=larger.schedule) == larger
