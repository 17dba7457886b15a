"""ONNX Runtime on the CPU or on CUDA; never on another device than it says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from service.backends.base import BackendError, BackendOptions, Precision, collate, split_batch
from service.cores import count_cores
from service.errors import DeviceError
from service.pipeline.types import Candidates, Tile

logger = logging.getLogger(__name__)

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
INPUTS = {"images": ("tensor(uint8)", 4), "valid_hw": ("tensor(int64)", 2)}
OUTPUTS = {
    "scores": ("tensor(float)", 2),
    "labels": ("tensor(int64)", 2),
    "mask_probs": ("tensor(float)", 4),
}


class OrtBackend:
    """A graph in an ONNX Runtime session."""

    name = "onnxruntime"
    precision: Precision = "fp32"
    concurrency = 1

    def __init__(self, session: ort.InferenceSession, device: str, reason: str) -> None:
        self.device = device
        self.reason = reason
        self._session: ort.InferenceSession | None = session

    def infer(self, tiles: Sequence[Tile]) -> list[Candidates]:
        """See `Backend.infer`."""
        if self._session is None:
            raise BackendError("the engine is closed")
        images, valid_hw = collate(tiles)
        feeds = {"images": images, "valid_hw": valid_hw}
        outputs = self._session.run(list(OUTPUTS), feeds)
        if len(outputs[0]) != len(images):
            raise BackendError(f"{len(images)} canvases gave {len(outputs[0])} results")
        return split_batch(*(np.asarray(output) for output in outputs))

    def close(self) -> None:
        """See `Backend.close`."""
        self._session = None


def check_device(device: str) -> None:
    """Refuses `cuda` where it cannot work, before any model is read.

    Raises:
        DeviceError: Says what is missing.
    """
    if device == "cuda" and CUDA not in ort.get_available_providers():
        raise DeviceError(
            f"device cuda: this ONNX Runtime {ort.__version__} has no CUDA, only "
            f"{ort.get_available_providers()}; install the extra service-gpu instead of service"
        )


def build_ort_backend(model: bytes | Path, options: BackendOptions) -> OrtBackend:
    """Builds a session on the device asked for.

    Args:
        model: The graph's bytes, or its path where it has data files beside it.
        options: With `auto`, CUDA if it works and else the CPU, with a warning if CUDA was there.

    Raises:
        BackendError: The graph cannot be read or does not honour the graph contract.
        DeviceError: CUDA was asked for and does not work.
    """
    check_device(options.device)
    session, device, reason = None, "cpu", f"device {options.device} was asked for"
    if options.device == "auto":
        reason = "this ONNX Runtime has no CUDA"
    if options.device != "cpu" and CUDA in ort.get_available_providers():
        try:
            session, device = _build_cuda_session(model, options), "cuda"
            reason = "CUDA works"
        except DeviceError as error:
            if options.device == "cuda":
                raise
            logger.warning("device auto takes the CPU: %s", error)
            reason = str(error)
    if session is None:
        session = _build_session(model, options, [CPU])
    _check_signature(session)
    return OrtBackend(session, device, reason)


def _build_cuda_session(model: bytes | Path, options: BackendOptions) -> ort.InferenceSession:
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN from their own packages, if they are installed
    try:
        session = _build_session(model, options, [CUDA, CPU])
    except BackendError as error:
        if "cuda" in str(error).lower():
            raise DeviceError(f"device cuda: {error}") from error
        raise
    if session.get_providers()[0] != CUDA:  # the runtime falls back without an error
        raise DeviceError(
            "device cuda: ONNX Runtime cannot use CUDA here (driver, CUDA or cuDNN libraries are "
            f"missing or do not fit); it offers {session.get_providers()}"
        )
    session.disable_fallback()
    return session


def _build_session(
    model: bytes | Path, options: BackendOptions, providers: list[str]
) -> ort.InferenceSession:
    session_options = ort.SessionOptions()
    session_options.intra_op_num_threads = options.threads or count_cores()
    session_options.inter_op_num_threads = 1
    session_options.log_severity_level = 3
    # Waiting threads must not burn the cores that decode and encode.
    session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = str(model) if isinstance(model, Path) else model
    try:
        return ort.InferenceSession(source, session_options, providers=providers)
    except Exception as error:  # the runtime's exceptions have no common base
        raise BackendError(f"ONNX Runtime cannot load the graph: {error}") from error


def _check_signature(session: ort.InferenceSession) -> None:
    for kind, found, wanted in (
        ("input", session.get_inputs(), INPUTS),
        ("output", session.get_outputs(), OUTPUTS),
    ):
        signature: dict[str, tuple[str, int]] = {a.name: (a.type, len(a.shape)) for a in found}
        if signature != wanted:
            raise BackendError(f"the graph's {kind}s are {signature}, they must be {wanted}")
        _check_dynamic(kind, found)


def _check_dynamic(kind: str, arguments: list[Any]) -> None:
    """The batch is symbolic everywhere, and H and W of the images are."""
    for argument in arguments:
        axes = (0, 1, 2) if argument.name == "images" else (0,)
        for axis in axes:
            if isinstance(argument.shape[axis], int):
                raise BackendError(
                    f"{kind} {argument.name!r} has the fixed shape {argument.shape}; "
                    "batch, height and width must be dynamic"
                )
