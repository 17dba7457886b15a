"""The real TensorRT Python binding without TensorRT: downloaded, loaded over stub libraries.

The binding's wheel holds every class and signature; of the libraries beneath, which are not on
PyPI, it needs nine C functions. Stubs of these that return nothing let it be imported without a
GPU. `stubgen` turns what it finds there into a `.pyi` file, against which mypy checks our sources.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
# What pip says when no index can be reached.
OFFLINE = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeoutError|ProxyError|"
    r"Network is unreachable|Temporary failure in name resolution"
)
MYPY_CONFIG = """
[mypy]
strict = true
python_version = 3.11
namespace_packages = true
explicit_package_bases = true
follow_imports = silent
warn_unused_ignores = false
disallow_untyped_calls = false

[mypy-tensorrt.*]
ignore_errors = true

[mypy-cuda.*]
ignore_errors = true
ignore_missing_imports = true

[mypy-onnxruntime.*,pycocotools.*]
ignore_missing_imports = true
"""


@dataclass(frozen=True)
class Binding:
    """One version of the binding, installed into a folder of its own.

    Attributes:
        version: E.g. "10.16.1.11".
        folder: Holds `site` (what pip installed), `lib` (stub libraries) and `stubs` (.pyi).
    """

    version: str
    folder: Path

    @property
    def major(self) -> str:
        return self.version.split(".")[0]

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a process imports it as `tensorrt`."""
        path = os.pathsep.join(map(str, (self.folder / "site", ROOT)))
        return os.environ | {"LD_LIBRARY_PATH": str(self.folder / "lib"), "PYTHONPATH": path}

    def run(self, code: str) -> str:
        """Standard output of a Python process that sees this TensorRT."""
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def check(self, sources: list[Path], root: Path = ROOT) -> list[str]:
        """What mypy finds wrong in sources, with this TensorRT and the installed cuda-core."""
        config = self.folder / "mypy.ini"
        config.write_text(MYPY_CONFIG)
        files = [str(source.relative_to(root)) for source in sources]
        options = ["--config-file", str(config), "--cache-dir", str(self.folder / "cache")]
        done = subprocess.run(
            [sys.executable, "-m", "mypy", *options, *files],
            cwd=root,
            env=os.environ | {"MYPYPATH": str(self.folder / "stubs")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return [line for line in done.stdout.splitlines() if ": error:" in line]


def install_binding(version: str, folder: Path) -> Binding:
    """Downloads a binding, builds its stub libraries and its .pyi; skips where that cannot be."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed, which builds the stub libraries")
    _install(f"tensorrt-cu13-bindings=={version}", folder / "site")
    package = folder / "site" / "tensorrt"
    (folder / "site" / "tensorrt_bindings").rename(package)
    binding = Binding(version, folder)
    _build_libraries(binding)
    _write_stubs(binding)
    return binding


def _install(requirement: str, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    if done.returncode != 0 and OFFLINE.search(done.stdout + done.stderr):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr[-4000:]


def _build_libraries(binding: Binding) -> None:
    libraries = binding.folder / "lib"
    libraries.mkdir()
    source = libraries / "stub.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for name in LIBRARIES:
        file = f"lib{name}.so.{binding.major}"
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", str(libraries / file)]
        subprocess.run([*command, str(source)], check=True)


def _write_stubs(binding: Binding) -> None:
    """What `stubgen` reads from the binding, and cuda-core's own .pyi files, for mypy."""
    raw = binding.folder / "raw"
    start = "from mypy.stubgen import main; main()"
    stubgen = [sys.executable, "-c", start, "--inspect-mode", "-q", "-o", str(raw)]
    subprocess.run(
        [*stubgen, "-m", "tensorrt.tensorrt"], env=binding.environment, check=True, cwd=raw.parent
    )
    text = (raw / "tensorrt" / "tensorrt.pyi").read_text()
    # The binding has a value called `bool`, which hides the type; and one method of a layer that
    # we do not use has a default before a parameter without one.
    text = re.sub(r"(->|:) bool\b", r"\1 builtins.bool", text)
    text = text.replace("typing.SupportsInt", "int").replace("typing.SupportsFloat", "float")
    text = re.sub(r"(def add_scale_nd\(self).*", r"\1, *args, **kwargs): ...", text)
    # IHostMemory is a buffer, as its docstring says; `stubgen` does not see that.
    buffer = "def __buffer__(self, flags: int, /) -> memoryview: ..."
    text = text.replace("class IHostMemory:\n", f"class IHostMemory:\n    {buffer}\n")
    target = binding.folder / "stubs" / "tensorrt"
    target.mkdir(parents=True)
    (target / "__init__.pyi").write_text(f"import builtins\n{text}\n__version__: str\n")
    _copy_cuda_core(binding.folder / "stubs" / "cuda" / "core")


def _copy_cuda_core(target: Path) -> None:
    """cuda-core picks its real package by CUDA's major when it is imported; here it is 13."""
    try:
        # Not by its import spec, which it replaces when it is imported.
        source = Path(str(distribution("cuda-core").locate_file("cuda/core")))
    except PackageNotFoundError:
        pytest.skip("cuda-core is not installed")
    shutil.copytree(source / "cu13", target, ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(source / "__init__.py", target / "__init__.py")
    for file in (target / "__init__.py", target / "_memory" / "__init__.py"):
        # mypy cannot follow lists of lists; without them every import of `*` counts.
        file.write_text(re.sub(r"__all__ = \[.*?\]\n", "", file.read_text(), flags=re.DOTALL))
