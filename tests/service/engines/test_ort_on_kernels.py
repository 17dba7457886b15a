"""From images to run lengths as on a GPU, with memory and kernels on the host: equal to the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.decode import decode_image
from pipeline.preprocess import prepare
from pipeline.types import Candidates
from service.engines.base import BackendOptions
from service.models.repository import load_version
from tests.support import fake_gpu
from tests.support.kernel_host import HostLauncher

ROOT = Path(__file__).resolve().parents[3]
IMAGE = ROOT / "tests/data/nuclei/images/16c3d5935ba94b72.jpg"
CPU = BackendOptions(device="cpu", threads=1)


@pytest.mark.slow
def test_the_bundled_model_gives_the_same_instances(
    monkeypatch: pytest.MonkeyPatch, kernel_library: Path, host_launcher: HostLauncher
) -> None:
    image = np.ascontiguousarray(decode_image(IMAGE.read_bytes()))
    wanted = load_version(ROOT / "model_repo/nuclei", None, CPU).segment(image)
    fake_gpu.install(monkeypatch, host_launcher.cuda, fake_kernels=False)
    monkeypatch.setattr(
        "service.engines.kernels.postprocessor.load_launcher",
        lambda device: HostLauncher(kernel_library, device, host_launcher.cuda),
    )
    options = replace(CPU, device="cuda", slots=1)
    model = load_version(ROOT / "model_repo/nuclei", None, options)
    assert "post-processing on the GPU" in model.backend.reason
    kept = model.backend.infer(prepare(image, model.config.input).tiles)
    assert not any(isinstance(candidates, Candidates) for candidates in kept)
    del kept
    for _ in range(3):  # buffers come back
        found = model.segment(image)
        assert [(i.label, i.rle, i.bbox_xywh, i.area) for i in found] == [
            (i.label, i.rle, i.bbox_xywh, i.area) for i in wanted
        ]
        np.testing.assert_allclose([i.score for i in found], [i.score for i in wanted], atol=1e-5)
    assert len(found) > 5
