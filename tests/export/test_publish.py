from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from export.config_json import describe_file, read_repository
from export.errors import PublishError
from export.publish import (
    Artefact,
    Release,
    add_artefacts,
    describe_served,
    keep_default,
    next_version,
    publish,
    require_free,
)
from service.engines.base import BackendOptions
from service.models.repository import find_default, load_version
from tests.support import blob_model
from tests.support.releases import GRAPH, OTHER, PASSED, build_release, files_under, read_config

UINT8 = GRAPH.replace(b"\x08\x01\x12", b"\x08\x02\x12")
"""The same with values of uint8."""


def test_the_first_version_can_be_loaded(tmp_path: Path) -> None:
    graph = blob_model.build_graph()
    target = publish(tmp_path / "repo", build_release(graph=graph))
    assert target == tmp_path / "repo" / "blobs" / "1"
    assert sorted(files_under(tmp_path / "repo")) == [
        "blobs/1/model.onnx",
        "blobs/1/parity.json",
        "blobs/config.json",
    ]
    config = read_config(tmp_path / "repo")
    assert config["versions"] == {
        "1": {"files": {"model.onnx": describe_file(graph)}, "provenance": {"run": 1}}
    }
    assert config["candidates"] == 3 and config["schema_version"] == 1
    loaded = load_version(target.parent, None, BackendOptions(device="cpu"))
    assert loaded.config == build_release(graph=graph).config
    assert len(loaded.segment(blob_model.draw_picture())) == 1


def test_an_existing_version_is_rejected_and_nothing_changes(tmp_path: Path) -> None:
    publish(tmp_path, build_release())
    before = files_under(tmp_path)
    with pytest.raises(PublishError, match="1 already exists; choose another version or"):
        publish(tmp_path, build_release(graph=OTHER))
    assert files_under(tmp_path) == before


def test_an_unlisted_version_folder_is_rejected_too(tmp_path: Path) -> None:
    (tmp_path / "blobs" / "1").mkdir(parents=True)
    with pytest.raises(PublishError, match="already exists"):
        require_free(tmp_path, "blobs", 1)


def test_force_replaces_only_that_version(tmp_path: Path) -> None:
    publish(tmp_path, build_release(1))
    publish(tmp_path, build_release(2))
    publish(tmp_path, build_release(1, OTHER, candidates=5), force=True)
    repository = read_repository(tmp_path / "blobs")
    assert repository is not None
    assert repository.for_version(2) == build_release(2).config
    assert repository.for_version(1).candidates == 5
    assert sorted(files_under(tmp_path)) == [
        "blobs/1/model.onnx",
        "blobs/1/parity.json",
        "blobs/2/model.onnx",
        "blobs/2/parity.json",
        "blobs/config.json",
    ]
    assert (tmp_path / "blobs" / "1" / "model.onnx").read_bytes() == OTHER


def test_a_failing_rename_keeps_the_old_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    publish(tmp_path, build_release())
    before = files_under(tmp_path)
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == "config.json":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="No space left"):
        publish(tmp_path, build_release(graph=OTHER), force=True)
    assert files_under(tmp_path) == before


@pytest.mark.parametrize("parity", [{"passed": False}, {}])
def test_a_failed_parity_report_is_rejected(tmp_path: Path, parity: dict[str, Any]) -> None:
    release = build_release()
    with pytest.raises(PublishError, match="parity report has not passed"):
        publish(tmp_path, Release(release.config, release.graph, parity))
    assert files_under(tmp_path) == {}


def test_a_graph_that_differs_from_its_config_entry_is_rejected(tmp_path: Path) -> None:
    release = build_release()
    with pytest.raises(PublishError, match=r"model\.onnx differs from its entry"):
        publish(tmp_path, Release(release.config, OTHER, PASSED))


def test_the_next_version_follows_listed_versions_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "blobs"
    assert next_version(folder) == 1
    publish(tmp_path, build_release(4))
    assert next_version(folder) == 5
    (folder / "7").mkdir()
    (folder / "notes").mkdir()
    assert next_version(folder) == 8


INT8 = Artefact("model.int8.onnx", b"int8", PASSED)
PACKAGE = Artefact("model.sm_90.fp16.pt2", b"package", PASSED)


def test_artefacts_are_published_with_the_version(tmp_path: Path) -> None:
    base = build_release()
    publish(tmp_path, Release(base.config, base.graph, PASSED, (INT8, PACKAGE)))
    assert sorted(files_under(tmp_path / "blobs" / "1")) == [
        "model.int8.onnx",
        "model.onnx",
        "model.sm_90.fp16.pt2",
        "parity.int8.json",
        "parity.json",
        "parity.sm_90.fp16.json",
    ]
    files = read_config(tmp_path)["versions"]["1"]["files"]
    assert files == {
        "model.onnx": describe_file(GRAPH),
        INT8.name: describe_file(b"int8"),
        PACKAGE.name: describe_file(b"package"),
    }


def test_files_added_later_change_no_other_line(tmp_path: Path) -> None:
    publish(tmp_path, build_release(1))
    publish(tmp_path, build_release(2, candidates=7))
    before = read_config(tmp_path)
    add_artefacts(tmp_path / "blobs", 1, [INT8])
    after = read_config(tmp_path)
    assert after["versions"]["1"]["files"].pop(INT8.name) == describe_file(b"int8")
    assert after == before and list(after) == list(before)
    assert (tmp_path / "blobs" / "1" / "model.int8.onnx").read_bytes() == b"int8"


def test_a_listed_file_is_only_replaced_with_force(tmp_path: Path) -> None:
    publish(tmp_path, build_release())
    add_artefacts(tmp_path / "blobs", 1, [INT8])
    before = files_under(tmp_path)
    other = Artefact(INT8.name, b"other", PASSED)
    with pytest.raises(PublishError, match=r"model\.int8\.onnx already exists; --force"):
        add_artefacts(tmp_path / "blobs", 1, [other])
    assert files_under(tmp_path) == before
    add_artefacts(tmp_path / "blobs", 1, [other], force=True)
    assert read_config(tmp_path)["versions"]["1"]["files"][INT8.name] == describe_file(b"other")


@pytest.mark.parametrize("stop_at", ["parity.int8.json", "model.int8.onnx", "config.json"])
@pytest.mark.parametrize("listed", [False, True])
def test_an_interrupted_call_leaves_a_valid_version_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: str, listed: bool
) -> None:
    import os

    graph = blob_model.build_graph()
    publish(tmp_path, build_release(graph=graph))
    if listed:
        add_artefacts(tmp_path / "blobs", 1, [Artefact(INT8.name, b"older", PASSED)])
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == stop_at:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(os, "replace", failing)
        add_artefacts(tmp_path / "blobs", 1, [INT8], force=True)
    load_version(tmp_path / "blobs", 1, BackendOptions(device="cpu")).backend.close()
    add_artefacts(tmp_path / "blobs", 1, [INT8], force=True)
    load_version(tmp_path / "blobs", 1, BackendOptions(device="cpu")).backend.close()
    assert read_config(tmp_path)["versions"]["1"]["files"][INT8.name] == describe_file(b"int8")


def test_files_without_a_passed_report_or_version_are_rejected(
    tmp_path: Path,
) -> None:
    base = build_release()
    bad = Artefact(INT8.name, b"int8", {"passed": False})
    with pytest.raises(PublishError, match=r"model\.int8\.onnx is not published"):
        publish(tmp_path, Release(base.config, base.graph, PASSED, (bad,)))
    assert not (tmp_path / "blobs").exists()
    with pytest.raises(PublishError, match=r"has no config\.json"):
        add_artefacts(tmp_path / "blobs", 1, [INT8])
    publish(tmp_path, base)
    before = files_under(tmp_path)
    with pytest.raises(PublishError, match=r"model\.int8\.onnx is not published"):
        add_artefacts(tmp_path / "blobs", 1, [bad])
    with pytest.raises(PublishError, match="has no version 2"):
        add_artefacts(tmp_path / "blobs", 2, [INT8])
    with pytest.raises(PublishError, match=r"'weights\.bin' does not have the form model"):
        add_artefacts(tmp_path / "blobs", 1, [Artefact("weights.bin", b"x", PASSED)])
    assert files_under(tmp_path) == before


def serve(root: Path, **policy: Any) -> None:
    file = root / "blobs" / "config.json"
    file.write_text(json.dumps({**read_config(root), "serve": policy}))


def asked(root: Path, image: str, query: str) -> list[str]:
    return [
        f"to serve it: solo-serve --model-repo {root}",
        f"to ask it: curl -F images=@{image} 'http://localhost:8000/segment?{query}'",
        "and in the browser: http://localhost:8000",
    ]


def test_a_version_that_is_not_served_is_said_with_the_command(tmp_path: Path) -> None:
    target = publish(tmp_path, build_release(1))
    answered = "requests that name no model are answered by"
    assert describe_served(target) == [
        "version 1 of blobs is served",
        f"{answered} blobs",
        *asked(tmp_path, "IMAGE", "model=blobs"),
    ]
    serve(tmp_path, policy="specific", versions=[1])
    warning, default = describe_served(publish(tmp_path, build_release(2)))
    assert warning == (
        "warning: config.json serves version 1 of blobs, not 2; to serve it: "
        f"solo-models serve blobs 2 --model-repo {tmp_path}"
    )
    assert default == "requests that name no model are answered by blobs"
    serve(tmp_path, policy="all")
    newest = publish(tmp_path, build_release(3))
    assert describe_served(newest, image=Path("a.png")) == [
        "version 3 of blobs is served",
        default,
        *asked(tmp_path, "a.png", "model=blobs"),
    ]
    older = asked(tmp_path, "IMAGE", "model=blobs&version=2")
    assert describe_served(newest.with_name("2"))[2:] == older


def publish_as(root: Path, name: str) -> list[str]:
    kept = keep_default(root, name)
    served, *lines = describe_served(publish(root, build_release(name=name)), kept)
    assert served == f"version 1 of {name} is served"
    assert lines[-3:] == asked(root, "IMAGE", f"model={name}")
    return lines[:-3]


def test_a_second_model_does_not_take_over_requests_that_name_none(tmp_path: Path) -> None:
    assert publish_as(tmp_path, "nuclei") == ["requests that name no model are answered by nuclei"]
    assert find_default(tmp_path) == "nuclei"
    assert publish_as(tmp_path, "mine") == [
        "nuclei was the only model and is now recorded as the default",
        "requests that name no model are answered by nuclei",
    ]
    assert publish_as(tmp_path, "other") == ["requests that name no model are answered by nuclei"]
    assert find_default(tmp_path) == "nuclei"


def test_a_default_that_is_not_known_is_said(tmp_path: Path) -> None:
    for name in ("a", "b"):
        publish(tmp_path, build_release(name=name))
    (warning,) = publish_as(tmp_path, "c")
    assert warning.startswith("warning: requests that name no model are refused")
    assert warning.endswith(f"solo-models default c --model-repo {tmp_path}")


def test_nothing_is_recorded_before_the_first_model(tmp_path: Path) -> None:
    assert keep_default(tmp_path / "missing", "a") is None
    assert keep_default(tmp_path, "a") is None
    publish(tmp_path, build_release(name="a"))
    assert keep_default(tmp_path, "a") is None
    assert not (tmp_path / "repository.json").exists()


def test_versions_that_are_published_at_the_same_time_are_all_listed(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda version: publish(tmp_path, build_release(version)), range(1, 9)))
    repository = read_repository(tmp_path / "blobs")
    assert repository is not None and repository.version_numbers == list(range(1, 9))


def test_what_an_interrupted_publication_left_is_removed(tmp_path: Path) -> None:
    publish(tmp_path, build_release(1))
    before = files_under(tmp_path)
    for left in (".2.next", ".1.prev"):
        (tmp_path / "blobs" / left).mkdir()
        (tmp_path / "blobs" / left / "model.onnx").write_bytes(b"half")
    (tmp_path / "blobs" / ".config.json.partial").write_bytes(b"{")
    publish(tmp_path, build_release(1), force=True)
    assert files_under(tmp_path) == before
    assert not [path for path in (tmp_path / "blobs").iterdir() if path.name.startswith(".")]


def test_a_graph_that_gpus_refuse_is_not_published(tmp_path: Path) -> None:
    refused = (
        r"model\.onnx is not published: GPUs cannot run the graph: Identity 'graph' computes with"
    )
    with pytest.raises(PublishError, match=refused):
        publish(tmp_path, build_release(graph=UINT8))
    with pytest.raises(PublishError, match=r"model\.onnx is not published: not an ONNX graph"):
        publish(tmp_path, build_release(graph=b"graph"))
    assert files_under(tmp_path) == {}
    half = Artefact("model.fp16.onnx", UINT8, PASSED)
    base = build_release()
    with pytest.raises(PublishError, match=r"model\.fp16\.onnx is not published: GPUs cannot"):
        publish(tmp_path, Release(base.config, base.graph, PASSED, (half,)))
    assert files_under(tmp_path) == {}
    publish(tmp_path, base)
    before = files_under(tmp_path)
    with pytest.raises(PublishError, match=r"model\.fp16\.onnx is not published: GPUs cannot"):
        add_artefacts(tmp_path / "blobs", 1, [half], force=True)
    assert files_under(tmp_path) == before
    add_artefacts(tmp_path / "blobs", 1, [Artefact("model.exits.onnx", UINT8, PASSED)])


def with_ap(precision: str, variant: float | None, data: bytes = GRAPH) -> Artefact:
    ap = None if variant is None else {"split": "val", "fp32": 0.48474, "variant": variant}
    report = {**PASSED, "precision": precision, "AP": ap}
    return Artefact(f"model.{precision}.onnx", data, report)


def test_what_a_precision_costs_is_recorded(tmp_path: Path) -> None:
    base = build_release()
    files = (with_ap("int8", 0.4870), with_ap("bf16", 0.4841), with_ap("fp16", None), PACKAGE)
    publish(tmp_path, Release(base.config, base.graph, PASSED, files))
    entry = read_config(tmp_path)["versions"]["1"]
    assert entry["ap_cost"] == {"int8": -0.0023, "bf16": 0.0006}
    publish(tmp_path, build_release(2))
    versions = read_config(tmp_path)["versions"]
    assert versions["1"] == entry
    assert "ap_cost" not in versions["2"]


@pytest.mark.parametrize(
    ("variant", "expected"),
    [(0.4800, {"int8": 0.0047, "bf16": 0.0006}), (None, {"bf16": 0.0006})],
)
def test_the_cost_of_a_file_that_is_replaced_is_too(
    tmp_path: Path, variant: float | None, expected: dict[str, float]
) -> None:
    publish(tmp_path, build_release())
    folder = tmp_path / "blobs"
    add_artefacts(folder, 1, [with_ap("int8", 0.4870), with_ap("bf16", 0.4841)])
    add_artefacts(folder, 1, [with_ap("int8", variant, OTHER)], force=True)
    assert read_config(tmp_path)["versions"]["1"]["ap_cost"] == expected
    add_artefacts(folder, 1, [Artefact("model.exits.onnx", b"exits", PASSED)])
    assert read_config(tmp_path)["versions"]["1"]["ap_cost"] == expected
