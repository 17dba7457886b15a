"""torch.export and AOTInductor: the graph of `CandidateGraph` as compiled code in one file.

In fp16 and bf16 the convolutions, the masks and their products are half precision; scores,
normalisation statistics, areas and the mean probability over a mask are float32. On CUDA this was
not run on hardware.

Symbols: B batch, K candidates, H W canvas (multiples of 32), h w mask at the finest stride.
"""

from __future__ import annotations

import copy
import platform
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from export.errors import GraphError, ParityError
from export.onnx_graph import EXAMPLE_HW, CandidateGraph
from export.parity import (
    Case,
    Comparison,
    Tolerances,
    build_cases,
    canvas_sizes,
    require_parity,
    run_torch,
)
from pipeline.model_config import InputSpec, TileResize
from pipeline.types import Candidates
from service.engines.aoti_package import (
    CPU_TARGET,
    PackageInfo,
    PackagePrecision,
    describe_cpu,
    name_package,
    name_target,
)
from service.engines.aotinductor import Runner, load_runner
from training.configs.schema import Config
from training.model.deform import DeformConv2d
from training.model.head import LevelOutput
from training.model.solo import Solo

STRIDE = 32
MARCH = "cpp.march"
"""Without this option, which torch 2.11 does not have, the compiler uses all of this CPU."""
DTYPES: dict[PackagePrecision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
TOLERANCES: dict[PackagePrecision, Tolerances] = {
    "fp32": Tolerances(),
    "fp16": Tolerances(score=1e-2, mask=2e-2, unmatched_share=0.02),
    "bf16": Tolerances(score=2e-2, mask=0.3, unmatched_share=0.05),
}
"""What half precision may differ by from float32, pair by pair."""


@dataclass(frozen=True, kw_only=True)
class AotiOptions:
    """What is compiled.

    Attributes:
        device: The CPU, or the CUDA device at hand, for whose architecture the code is.
        precision: Of the convolutions and of the masks.
        max_batch: Most canvases in a call.
        tune: Tries several kernels for each operation on the device; takes much longer.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    precision: PackagePrecision = "fp32"
    max_batch: int = 8
    tune: bool = False


@dataclass(frozen=True)
class AotiArtefact:
    """A package and its parity report, named as in a version's folder."""

    file_name: str
    data: bytes
    parity_name: str
    parity: dict[str, Any]


class TypedGraph(CandidateGraph):
    """`CandidateGraph` of one precision: a copy, batch norms folded, weights channels-last.

    Args:
        network: In evaluation mode; stays as it is.
        precision: Of what computes most; the rest is float32.
    """

    def __init__(self, network: Solo, precision: PackagePrecision) -> None:
        super().__init__(copy.deepcopy(network).eval())
        self.dtype = DTYPES[precision]
        fold_batch_norms(self.network.backbone)
        for part in (self.network.backbone, self.network.neck, self.network.head):
            part.to(self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor, valid_hw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs of `CandidateGraph.forward`, with `mask_probs` in the graph's precision."""
        x = self.network.normalise(images, valid_hw).to(self.dtype)
        outputs = [
            LevelOutput(level.category_logits.float(), level.mask_inputs)
            for level in self.network(x)
        ]
        return self.network.rank(outputs)


def fold_batch_norms(root: nn.Module) -> None:
    """Folds each batch norm into the convolution that is registered before it, in place."""
    for parent in list(root.modules()):
        previous: tuple[str, nn.Module] | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and previous is not None:
                before, conv = previous
                if type(conv) is nn.Conv2d and conv.out_channels == child.num_features:
                    setattr(parent, before, fuse_conv_bn_eval(conv, child))
                    setattr(parent, name, nn.Identity())
            previous = (name, child)


def find_canvases(spec: InputSpec) -> tuple[tuple[int, int], bool]:
    """The largest canvas that an image can get, and whether it is the only one."""
    if isinstance(spec.resize, TileResize):
        return spec.resize.canvas_hw, True
    longest = max(spec.resize.short_side, spec.resize.long_side)
    canvas_hw = spec.resize.pad(longest, longest)
    return canvas_hw, canvas_hw[0] <= STRIDE


def describe_package(
    config: Config, options: AotiOptions, onnx_sha256: str | None = None
) -> PackageInfo:
    """The description that the package will contain.

    Raises:
        GraphError: An option has a wrong value, or there is no CUDA device to compile for.
    """
    if options.max_batch < 1:
        raise GraphError(f"max_batch is {options.max_batch}, expected at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise GraphError(f"torch {torch.__version__} finds no CUDA device to compile for")
    largest_hw, fixed = find_canvases(config.input)
    capability = torch.cuda.get_device_capability() if options.device == "cuda" else None
    return PackageInfo(
        config=config.name,
        target=name_target(capability),
        precision=options.precision,
        torch=torch.__version__.split("+")[0],
        machine=platform.machine(),
        max_batch=options.max_batch,
        max_canvas_hw=largest_hw,
        fixed_canvas=fixed,
        host_cpu=None if MARCH in known_options() else describe_cpu(),
        onnx_sha256=onnx_sha256,
    )


def export_program(graph: CandidateGraph, info: PackageInfo) -> torch.export.ExportedProgram:
    """Traces a graph, its weights on the CPU or on the device they are for.

    Raises:
        GraphError: The network has deformable convolutions, which are an operator of ours that
            compiled code cannot call.
    """
    if any(isinstance(module, DeformConv2d) for module in graph.modules()):
        raise GraphError("AOTInductor packages cannot have deformable convolutions; use ONNX")
    height, width = info.max_canvas_hw
    if not info.fixed_canvas:  # two sides that differ, as in the ONNX export
        height = max(STRIDE, min(EXAMPLE_HW[0], height - STRIDE))
        width = min(EXAMPLE_HW[1], width)
    batch = min(2, info.max_batch)
    device = next(graph.parameters()).device
    images = torch.zeros(batch, height, width, 3, dtype=torch.uint8, device=device)
    valid_hw = torch.tensor([[height, width]] * batch, device=device)
    shapes: dict[str, dict[int, Any]] = {"images": {}, "valid_hw": {}}
    if info.max_batch > 1:
        dim = torch.export.Dim("batch", min=1, max=info.max_batch)
        shapes["images"][0] = shapes["valid_hw"][0] = dim
    if not info.fixed_canvas:
        for axis, name in enumerate(("height32", "width32")):
            most = info.max_canvas_hw[axis] // STRIDE
            shapes["images"][1 + axis] = STRIDE * torch.export.Dim(name, min=1, max=most)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(graph, (images, valid_hw), dynamic_shapes=shapes)


def known_options() -> frozenset[str]:
    """Names of Inductor's options in this torch; releases differ, and others are errors."""
    return frozenset(torch._inductor.config.get_config_copy())


def compiler_options(info: PackageInfo, *, tune: bool) -> dict[str, Any]:
    """Inductor's options for a package, those that this torch has."""
    options: dict[str, Any] = {
        # Lays weights out for their kernels now, not in every call. With symbolic sizes torch 2.13
        # fails there on those that follow from a scale factor.
        "freezing": info.fixed_canvas,
        "cpp.dynamic_threads": True,  # as many as the server says, not as there are here
    }
    if info.machine == "x86_64":  # else the code would need this very CPU
        options |= {MARCH: "x86-64-v3", "cpp.simdlen": 256}
    if tune:
        options |= {"max_autotune": True, "coordinate_descent_tuning": True}
    known = known_options()
    chosen = {name: value for name, value in options.items() if name in known}
    return {"aot_inductor.metadata": info.to_metadata(), **chosen}


def build_aoti(
    network: Solo, config: Config, options: AotiOptions, *, onnx_sha256: str | None = None
) -> bytes:
    """Compiles a network; takes minutes and a C++ compiler.

    Args:
        network: In evaluation mode, on the CPU.
        config: Says which canvases there are.
        options: What is compiled.
        onnx_sha256: Of the model.onnx of the same weights.

    Returns:
        The package.

    Raises:
        GraphError: The options or the network do not fit, or the compiler refuses the graph.
    """
    if network.training:
        raise GraphError("the network is in training mode; call eval() before the export")
    info = describe_package(config, options, onnx_sha256)
    program = export_program(TypedGraph(network, options.precision).to(options.device), info)
    return compile_program(program, info, tune=options.tune)


def compile_program(
    program: torch.export.ExportedProgram, info: PackageInfo, *, tune: bool = False
) -> bytes:
    """Compiles a traced graph for the device of its weights.

    Raises:
        GraphError: The compiler refuses the graph, or there is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name_package(info.target, info.precision)
        try:
            with torch.no_grad():
                torch._inductor.aoti_compile_and_package(
                    program,
                    package_path=str(file),
                    inductor_configs=compiler_options(info, tune=tune),
                )
        except Exception as error:  # the compiler's exceptions have no common base
            raise GraphError(f"AOTInductor cannot compile the graph: {error}") from error
        return file.read_bytes()


def run_package(runner: Runner, case: Case, device: str) -> list[Candidates]:
    """Candidates of each image, empty slots dropped."""
    inputs = [torch.from_numpy(case.images), torch.from_numpy(case.valid_hw)]
    outputs = runner([tensor.to(device) for tensor in inputs])
    scores, labels, masks = (output.cpu().numpy() for output in map(_as_numpy_type, outputs))
    arrays = zip(scores, labels, masks, strict=True)
    return [Candidates(s[s > 0], c[s > 0], m[s > 0]) for s, c, m in arrays]


def _as_numpy_type(output: Tensor) -> Tensor:
    return output.float() if output.is_floating_point() else output


def package_cases(config: Config, options: AotiOptions) -> Iterator[Case]:
    """Batches of the sizes that a package takes."""
    sizes: Sequence[tuple[int, int]] = canvas_sizes(config.input)
    largest_hw, fixed = find_canvases(config.input)
    if fixed:
        sizes = [largest_hw]
    return build_cases(sizes, batches=sorted({1, min(3, options.max_batch)}))


def compare_aoti(
    network: Solo, runner: Runner, cases: Iterable[Case], options: AotiOptions
) -> dict[str, Any]:
    """Runs PyTorch in float32 and a package on every case.

    Args:
        network: In evaluation mode, on the CPU.
        runner: The package's code.
        cases: What to run.
        options: What the package was made with.

    Returns:
        A report of the form of `parity.compare`; the package's numbers stand where that has
        ONNX Runtime's.

    Raises:
        ParityError: The package refuses a batch.
    """
    comparison = Comparison(TOLERANCES[options.precision])
    for case in cases:
        try:
            answers = run_package(runner, case, options.device)
        except RuntimeError as error:
            raise ParityError(f"the package cannot run {case.images.shape}: {error}") from error
        comparison.add(case, run_torch(network, case), answers)
    return comparison.report(
        {
            "torch": torch.__version__.split("+")[0],
            "aotinductor": torch.__version__.split("+")[0],
            "device": torch.cuda.get_device_name() if options.device == "cuda" else CPU_TARGET,
            "machine": platform.machine(),
        }
    )


def export_aoti(
    network: Solo,
    config: Config,
    options: AotiOptions = AotiOptions(),
    *,
    onnx_sha256: str | None = None,
) -> AotiArtefact:
    """Compiles a network, runs the package and compares it with PyTorch.

    Args:
        network: In evaluation mode, on the CPU.
        config: Of the network.
        options: What is compiled.
        onnx_sha256: Of the model.onnx of the same weights, for the package's provenance.

    Raises:
        GraphError: See `build_aoti`.
        BackendError: The package cannot be loaded.
        ParityError: It does not find what PyTorch finds.
    """
    data = build_aoti(network, config, options, onnx_sha256=onnx_sha256)
    info = describe_package(config, options, onnx_sha256)
    cases = package_cases(config, options)
    report = compare_aoti(network, load_runner(data, options.device), cases, options)
    require_parity(report)
    middle = f"{info.target}.{info.precision}"
    name = name_package(info.target, info.precision)
    return AotiArtefact(name, data, f"parity.{middle}.json", report)
