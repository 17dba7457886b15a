"""Rules for the Dockerfiles, read from their instructions."""

from __future__ import annotations

import importlib.util
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = ("docker/Dockerfile", "docker/Dockerfile.gpu")
OPENCV = {
    *(
        "LUT",
        "Laplacian",
        "Sobel",
        "approxPolyDP",
        "boundingRect",
        "boxFilter",
        "calcHist",
        "circle",
    ),
    *("connectedComponents", "connectedComponentsWithStats", "convexHull", "copyMakeBorder"),
    *("copyTo", "cvtColor", "dilate", "drawContours", "findContours", "getNumThreads", "imdecode"),
    *("max", "mean", "meanStdDev", "min", "morphologyEx", "norm", "resize", "setNumThreads"),
    *("split", "subtract", "threshold"),
}
"""Work with what docker/trim.sh leaves of OpenCV; `pytest tests/pipeline` passes with that alone.
Before one is added, see whether it needs linear algebra (LAPACK, a product of matrices) or video.
"""


def instructions(name: str) -> list[tuple[str, str]]:
    """Each (INSTRUCTION, arguments) of a Dockerfile, continued lines joined."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    found = []
    for line in filter(str.strip, text.splitlines()):
        word, _, rest = line.strip().partition(" ")
        found.append((word.upper(), " ".join(rest.split())))
    return found


def last_stage(name: str) -> list[tuple[str, str]]:
    found = instructions(name)
    start = max(i for i, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


@pytest.mark.parametrize("name", DOCKERFILES)
class TestDockerfile:
    def test_the_base_is_an_argument_with_a_pinned_tag(self, name: str) -> None:
        word, base = instructions(name)[0]
        assert word == "ARG"
        assert re.fullmatch(r"BASE_IMAGE=[\w./-]+:\d+\.\d+\.\d+-[\w.-]+", base), base
        stages = [rest.split()[0] for word, rest in instructions(name) if word == "FROM"]
        assert set(stages) <= {"${BASE_IMAGE}", "dependencies"}
        assert [stages[0], stages[-1]] == ["${BASE_IMAGE}"] * 2

    def test_the_user_is_not_root_and_has_a_fixed_number(self, name: str) -> None:
        users = [rest for word, rest in last_stage(name) if word == "USER"]
        assert users == ["10001:10001"]
        after = [word for word, _ in last_stage(name)]
        assert "RUN" not in after[after.index("USER") :]
        assert "COPY" not in after[after.index("USER") :]

    def test_nothing_installs_torch(self, name: str) -> None:
        installs = [rest for word, rest in instructions(name) if word == "RUN" and "pip" in rest]
        assert installs
        for install in installs:
            assert "torch" not in install
            assert "training" not in install
            assert "export" not in install

    def test_every_install_is_constrained(self, name: str) -> None:
        runs = [rest for word, rest in instructions(name) if word == "RUN"]
        commands = [command for run in runs for command in run.split("&&")]
        installs = [each for each in commands if re.search(r"pip .*\binstall\b", each)]
        assert installs
        for install in installs:
            assert re.search(r"--constraint (engines-)?constraints\.txt", install), install

    def test_package_lists_do_not_stay_in_a_layer(self, name: str) -> None:
        for word, rest in instructions(name):
            if word == "RUN" and "apt-get update" in rest:
                assert "--no-install-recommends" in rest
                assert "rm -rf /var/lib/apt/lists/*" in rest

    def test_what_changes_often_is_copied_late(self, name: str) -> None:
        copies = [rest for word, rest in last_stage(name) if word == "COPY"]
        assert copies[0].startswith("--from=dependencies")
        models = {"docker/Dockerfile": "/models", "docker/Dockerfile.gpu": "model_repo"}[name]
        assert [copy.split()[-2] for copy in copies[-2:]] == ["service", models]
        assert "." not in [copy.split()[0] for copy in copies]

    def test_everything_copied_exists_and_is_let_through(self, name: str) -> None:
        allowed = {
            line[1:]
            for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
            if line.startswith("!")
        }
        copies = [rest.split() for word, rest in instructions(name) if word == "COPY"]
        sources = [copy[:-1] for copy in copies if not copy[0].startswith("--from")]
        assert sources
        for source in chain.from_iterable(sources):
            assert (ROOT / source).exists(), source
            assert source in allowed, source

    def test_health_is_asked_of_ready(self, name: str) -> None:
        (check,) = [rest for word, rest in last_stage(name) if word == "HEALTHCHECK"]
        assert check.endswith('CMD ["python", "/app/healthcheck.py"]')
        assert "/v2/health/ready" in (ROOT / "docker/healthcheck.py").read_text(encoding="utf-8")

    def test_the_engine_collects_no_usage_data(self, name: str) -> None:
        (variables,) = [rest for word, rest in last_stage(name) if word == "ENV"]
        assert "ORT_DISABLE_TELEMETRY=1" in variables.split()

    def test_it_starts_in_exec_form_so_that_signals_arrive(self, name: str) -> None:
        (entry,) = [rest for word, rest in last_stage(name) if word == "ENTRYPOINT"]
        assert entry == '["python", "-m", "service"]'


def test_the_image_has_all_that_is_used_of_opencv() -> None:
    files = [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "service").rglob("*.py")]
    used = {
        name
        for file in files
        for name in re.findall(r"\bcv2\.(\w+)\(", file.read_text(encoding="utf-8"))
    }
    assert used == OPENCV
    assert not any("from cv2" in file.read_text(encoding="utf-8") for file in files)


def test_variables_of_the_image_are_settings() -> None:
    from service.settings import Settings

    everywhere = {"host", "port", "model_repo"}
    gpu = {"engine_cache", "max_batch", "precision"}
    for name, more in zip(DOCKERFILES, (set(), gpu), strict=True):
        variables = re.findall(r"SOLO_(\w+)=", " ".join(rest for _, rest in instructions(name)))
        assert {v.lower() for v in variables} == everywhere | more
        assert {v.lower() for v in variables} <= set(Settings.model_fields)


def test_the_gpu_images_user_may_write_its_cache() -> None:
    stage = last_stage("docker/Dockerfile.gpu")
    assert ("VOLUME", "/cache") in stage
    (made,) = [rest for word, rest in stage if word == "RUN"]
    assert "install --directory --owner=10001 --group=10001 /cache" in made
    (variables,) = [rest.split() for word, rest in stage if word == "ENV"]
    assert {"SOLO_ENGINE_CACHE=/cache/engines", "XDG_CACHE_HOME=/cache"} <= set(variables)


def test_the_gpu_image_lets_the_driver_in() -> None:
    (variables,) = [rest for word, rest in last_stage("docker/Dockerfile.gpu") if word == "ENV"]
    assert "NVIDIA_VISIBLE_DEVICES=all" in variables.split()
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in variables.split()


def test_no_engine_is_added_unless_it_is_asked_for() -> None:
    assert ("ARG", 'ENGINES=""') in instructions("docker/Dockerfile.gpu")


def test_the_gpu_image_says_that_nobody_ran_it() -> None:
    assert "NOT RUN ON HARDWARE" in (ROOT / "docker/Dockerfile.gpu").read_text(encoding="utf-8")


@pytest.mark.parametrize(("status", "expected"), [(200, 0), (503, 1)])
def test_the_health_check_passes_on_what_ready_says(
    status: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/v2/health/ready" else 404)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("SOLO_PORT", str(server.server_address[1]))
        assert _run_health_check() == expected


def test_the_health_check_fails_where_nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLO_PORT", "1")
    assert _run_health_check() == 1


def _run_health_check() -> int:
    spec = importlib.util.spec_from_file_location("healthcheck", ROOT / "docker/healthcheck.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result: int = module.main()
    return result
