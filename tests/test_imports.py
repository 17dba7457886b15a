"""Who may import whom (see CONTRIBUTING.md), read from the sources without running them."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("pipeline", "service", "solo_client", "training", "export")

# Distribution name of an import, where the two differ.
DISTRIBUTIONS = {
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "prometheus_client": "prometheus-client",
    "pydantic_settings": "pydantic-settings",
    "starlette": "fastapi",  # a part of FastAPI's public interface
    "onnx_ir": "onnxscript",  # likewise of onnxscript's
}
# Modules that import a library only where it is asked for and installed.
OPTIONAL_IMPORTS = {
    "pipeline/formats/dicom.py",
    "pipeline/formats/jpeg2000.py",
    "pipeline/formats/tiff_file.py",
    "pipeline/formats/tiff_plane.py",
    "pipeline/formats/zarr_library.py",
    "pipeline/writers/labels.py",  # tifffile
    "service/engines/aotinductor.py",
    "service/engines/openvino.py",
    "service/engines/kernels/postprocessor.py",
    "service/engines/kernels/launcher.py",
    "service/engines/kernels/nvrtc.py",
    "service/engines/device.py",
    "service/engines/tensorrt/engine.py",
    "service/engines/tensorrt/build.py",
    "service/engines/tensorrt/call.py",
    "service/engines/tensorrt/log.py",
    *(
        f"service/grpc/{name}.py"
        for name in ("calls", "handler", "messages", "read", "server", "status", "tls")
    ),
    "service/scale/cluster/app.py",
    "service/scale/cluster/command.py",
    "service/jobs/files.py",
    "service/predict/ray_job.py",
    "service/observe/tracing.py",
    "solo_client/result.py",  # supervision
}


@dataclass(frozen=True)
class Import:
    """One import statement.

    Attributes:
        file: Relative to the root.
        line: In the file.
        name: Absolute and dotted.
        top_level: Whether it is run when the module is imported.
        for_types: Whether it stands in an `if TYPE_CHECKING` block.
    """

    file: str
    line: int
    name: str
    top_level: bool
    for_types: bool = False

    @property
    def root(self) -> str:
        return self.name.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def read_imports(source: str, file: str) -> Iterator[Import]:
    """Yields every import of a module, also those in functions and `TYPE_CHECKING` blocks.

    `from a import b` counts as `a.b`, so that a rule about a submodule sees it.
    """
    tree = ast.parse(source, filename=file)
    package = list(Path(file).with_suffix("").parts)[:-1]
    top = {id(node) for node in tree.body}
    typed = {id(node) for block in _find_type_blocks(tree) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(file, node.lineno, name, id(node) in top, id(node) in typed)


def _find_type_blocks(tree: ast.Module) -> Iterator[ast.If]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield node


def imports_of(room: str) -> list[Import]:
    found: list[Import] = []
    for path in sorted((ROOT / room).rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        found += read_imports(path.read_text(encoding="utf-8"), file)
    return found


def offences_against_rooms(imports: list[Import]) -> list[str]:
    """The imports between rooms that CONTRIBUTING.md does not allow."""
    return [str(item) for item in imports if not _is_allowed(item)]


def _is_allowed(item: Import) -> bool:
    if item.root not in ROOMS:
        return True
    room = item.file.split("/")[0]
    if room == "pipeline":
        return item.root == "pipeline"
    if room == "solo_client":
        return item.root == "solo_client"
    if room == "service":
        remote = item.file.startswith("service/predict/") and item.root == "solo_client"
        return item.root in ("service", "pipeline") or remote
    measured = (
        "pipeline",
        "service.models.repository",
        "service.engines",
        "service.cores",
        "service.files",
    )
    served = any(is_in(item.name, allowed) for allowed in measured)
    if room == "training":
        return item.root == "training" or served
    return item.root in ("export", "training") or served


_ABOVE_ALL = ("service.predict", "service.__main__")
_APPLICATION = ("service.http", "service.grpc", "service.scale", *_ABOVE_ALL)
_SERVING = ("service.protocol", "service.segmenter", "service.jobs", *_APPLICATION)
FORBIDDEN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *("service.background", "service.errors", "service.cores", "service.settings"),
            "service.flags",
            *("service.memory", "service.version", "service.files", "service.observe"),
        ),
        ("service.work", "service.models", *_SERVING),
    ),
    "service.engines": ("service.settings", "service.work", "service.models", *_SERVING),
    "service.work": ("service.models", *_SERVING),
    "service.models": ("service.segmenter", "service.jobs", *_APPLICATION),
    "service.protocol": ("service.models", "service.segmenter", "service.jobs", *_APPLICATION),
    "service.segmenter": ("service.jobs", *_APPLICATION),
    "service.jobs": ("service.models", "service.segmenter", *_APPLICATION),
    "service.http": ("service.grpc", "service.scale", *_ABOVE_ALL),
    "service.grpc": ("service.scale", *_ABOVE_ALL),
    "service.scale": _ABOVE_ALL,
    "service.predict": ("service.http", "service.grpc", "service.scale", "service.__main__"),
}
"""What the parts of the service must not import: the layers above them. The engines' probes and
the metrics name types of `service.work` in `if TYPE_CHECKING` blocks."""


def offences_against_layers(imports: list[Import]) -> list[str]:
    """The imports of a higher layer of the service by a lower one."""
    return [str(item) for item in imports if _is_upward(item) and not _is_excused(item)]


def _is_upward(item: Import) -> bool:
    module = item.file.removesuffix(".py").replace("/", ".")
    forbidden = [names for part, names in FORBIDDEN.items() if is_in(module, part)]
    return any(is_in(item.name, name) for names in forbidden for name in names)


def _is_excused(item: Import) -> bool:
    return item.for_types and is_in(item.name, "service.work")


def declared_distributions(extra: str | None) -> set[str]:
    """Direct dependencies of the project with one extra or none, references to itself followed."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        project: dict[str, Any] = tomllib.load(file)["project"]
    found: set[str] = set()
    waiting: list[str] = [*project["dependencies"]]
    waiting += project["optional-dependencies"][extra] if extra else []
    while waiting:
        requirement = waiting.pop()
        own = re.fullmatch(r"solo-serve\[([\w-]+)\]", requirement)
        if own:
            waiting += project["optional-dependencies"][own[1]]
        else:
            name = re.match(r"[\w.-]+", requirement)
            assert name, requirement
            found.add(name[0].lower().replace("_", "-"))
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_it_may(room: str) -> None:
    imports = imports_of(room)
    assert imports, f"no imports found in {room}/"
    assert offences_against_rooms(imports) == []


def test_every_part_of_the_service_has_its_layer() -> None:
    parts = {path.stem for path in (ROOT / "service").iterdir() if path.suffix == ".py"}
    parts |= {path.parent.name for path in (ROOT / "service").glob("*/__init__.py")}
    assert {f"service.{part}" for part in parts - {"__init__", "__main__"}} == set(FORBIDDEN)


def test_no_layer_of_the_service_imports_a_higher_one() -> None:
    assert offences_against_layers(imports_of("service")) == []


def test_only_the_command_imports_what_scales() -> None:
    outside = [item for room in ROOMS for item in imports_of(room)]
    importers = {
        item.file
        for item in outside
        if is_in(item.name, "service.scale") and not item.file.startswith("service/scale/")
    }
    assert importers == {"service/__main__.py"}


def names_of_classes() -> dict[str, list[str]]:
    """The files that define a class, by its name."""
    found: dict[str, list[str]] = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    return found


def test_a_class_has_a_name_of_its_own() -> None:
    assert {name: files for name, files in names_of_classes().items() if len(files) > 1} == {}


def test_service_imports_torch_in_no_place_but_a_function_of_aoti() -> None:
    offences = [
        str(item)
        for item in imports_of("service")
        if item.root in ("torch", "torchvision")
        and (item.file != "service/engines/aotinductor.py" or item.top_level)
    ]
    assert offences == []


def test_the_client_needs_little() -> None:
    """It imports less than the distribution's own dependencies."""
    allowed = {*sys.stdlib_module_names, "solo_client", "httpx", "numpy", "PIL", "pycocotools"}
    foreign = [str(item) for item in imports_of("solo_client") if item.root not in allowed]
    assert [item for item in foreign if not item.endswith("imports supervision")] == []


def test_integrations_know_the_server_by_its_client_alone() -> None:
    imports = imports_of("integrations")
    assert imports
    own = ("integrations", "solo_client")
    assert [str(item) for item in imports if item.root in ROOMS and item.root not in own] == []


def test_configs_import_no_torch() -> None:
    configs = [item for item in imports_of("training") if item.file.startswith("training/configs/")]
    assert [str(item) for item in configs if item.root in ("torch", "torchvision")] == []


@pytest.mark.parametrize(
    ("room", "extra"),
    [
        ("pipeline", None),
        ("service", "service"),
        ("solo_client", "client"),
        ("training", "training"),
        ("export", "export"),
    ],
)
def test_what_a_room_imports_is_declared_in_its_extra(room: str, extra: str | None) -> None:
    declared = declared_distributions(extra)
    known = {*sys.stdlib_module_names, *ROOMS}
    offences = [
        str(item)
        for item in imports_of(room)
        if item.root not in known
        and item.file not in OPTIONAL_IMPORTS
        and DISTRIBUTIONS.get(item.root, item.root).lower() not in declared
    ]
    assert offences == []


def test_torch_is_in_no_serving_extra() -> None:
    for extra in ("service", "service-gpu", "http"):
        assert "torch" not in declared_distributions(extra)


def test_every_direct_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    with open(ROOT / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for extra in extras:
        assert declared_distributions(extra) - pinned == set(), extra


def test_no_file_is_called_utils() -> None:
    assert [path for room in ROOMS for path in (ROOT / room).rglob("utils.py")] == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("service/http/app.py", "import training"),
        ("service/http/app.py", "from solo_client import Client"),
        ("solo_client/client.py", "from service.http.schemas import SegmentResponse"),
        ("training/evaluate.py", "import solo_client"),
        ("service/http/app.py", "def f():\n    from export.onnx import build"),
        ("pipeline/nms.py", "from service.models.repository import load_version"),
        ("pipeline/nms.py", "from service.errors import ServiceError"),
        ("training/train.py", "from service import app"),
        ("training/train.py", "from service.work.scheduler import Scheduler"),
        ("training/train.py", "from service.models.store import ModelStore"),
        ("export/parity.py", "from service.segmenter import LocalSegmenter"),
        ("training/train.py", "from export import parity"),
        ("export/parity.py", "from service.http.app import create_app"),
    ],
)
def test_the_rules_see_an_offence(file: str, source: str) -> None:
    assert len(offences_against_rooms(list(read_imports(source, file)))) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "service/http/app.py",
            "from pipeline import nms\nfrom . import routes",
        ),
        ("pipeline/nms.py", "from .types import Instance"),
        ("service/predict/predictors.py", "from solo_client import Client"),
        ("solo_client/client.py", "from .errors import SoloError"),
        ("training/evaluate.py", "from service.models.repository import load_version"),
        ("training/evaluate.py", "from pipeline.nms import matrix_nms"),
        ("export/parity.py", "from training.model import solo\nfrom pipeline import types"),
    ],
)
def test_the_rules_allow_what_is_meant(file: str, source: str) -> None:
    assert offences_against_rooms(list(read_imports(source, file))) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("service/engines/base.py", "from service.work import queue"),
        ("service/engines/base.py", "import service.models.store"),
        ("service/engines/kernels/paste.py", "from ...http import app"),
        ("service/engines/base.py", "def f():\n    from service.scale.cluster import front"),
        ("service/engines/base.py", "from service.settings import Settings"),
        ("service/work/image.py", "from service.models.repository import load_model"),
        ("service/work/policy.py", "from service.protocol import ModelState"),
        ("service/models/store.py", "from service.http.app import create_app"),
        ("service/models/store.py", "from service.segmenter import LocalSegmenter"),
        ("service/segmenter.py", "from service.http.schemas import SegmentQuery"),
        ("service/protocol.py", "from service.models.store import ServedModel"),
        ("service/http/app.py", "from service.scale.workers import parent"),
        ("service/http/app.py", "import service.predict.job"),
        ("service/observe/metrics.py", "from service.work.admission import Admission"),
        (
            "service/observe/metrics.py",
            "if TYPE_CHECKING:\n    from service.http.app import create_app",
        ),
        ("service/scale/cluster/front.py", "import service.__main__"),
    ],
)
def test_the_layers_see_an_offence(file: str, source: str) -> None:
    assert len(offences_against_layers(list(read_imports(source, file)))) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("service/models/store.py", "from service.protocol import ModelState"),
        ("service/models/store.py", "from service.work.scheduler import Scheduler"),
        ("service/work/scheduler.py", "from service.engines.watch import WatchedEngine"),
        ("service/http/app.py", "from service.segmenter import LocalSegmenter"),
        ("service/scale/cluster/front.py", "from service.segmenter import measure"),
        (
            "service/observe/metrics.py",
            "if TYPE_CHECKING:\n    from service.work.admission import Admission",
        ),
        ("service/__main__.py", "from service.scale.workers.parent import run_workers"),
        ("service/predict/predictors.py", "from solo_client import Client"),
    ],
)
def test_the_layers_allow_what_is_meant(file: str, source: str) -> None:
    assert offences_against_layers(list(read_imports(source, file))) == []
