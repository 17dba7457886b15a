"""solo-import on checkpoints with random weights under the publishers' names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.file_server import FileServer, serve_files
from tests.support.parity import ParityModel, load_parity_model, parity_models
from tests.support.published import Publisher, publish, small_config, write_published
from tests.support.tiny_solo import tiny_network
from training.configs.coco_classes import COCO_CLASSES
from training.configs.schema import HeadKind
from training.weights.formats import CheckpointError, load_checkpoint, load_model, load_provenance
from training.weights.importing import main, read_classes
from training.weights.sources import get_model

NAME = "decoupled_solo_light_r50_fpn_3x_coco"
FILE = f"{NAME}_20210906_142703-e70e226f.pth"
NAMES = tuple(c.name for c in COCO_CLASSES)

SMALL = [
    *("--set", "model.backbone.depth=18", "--set", "model.backbone.base_width=8"),
    *("--set", "model.neck_channels=16", "--set", "model.head.channels=32"),
    *("--set", "model.head.num_convs=2", "--set", "model.head.num_grids=[6,5,4,3,2]"),
]


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FileServer]:
    """A mirror, and an empty cache."""
    with serve_files() as server:
        monkeypatch.setenv("SOLO_MIRROR", server.url)
        monkeypatch.setenv("SOLO_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield server


def fails(arguments: list[str], capsys: Any) -> str:
    """The message of a command that must fail."""
    assert main(arguments) == 1
    message: str = capsys.readouterr().err.splitlines()[-1]  # behind the bar of a download
    assert message.startswith("solo-import: ")
    return message


@pytest.mark.parametrize("kind", ["vanilla", "decoupled", "decoupled_light"])
@pytest.mark.parametrize("publisher", ["authors", "mmdetection"])
def test_a_file_becomes_the_same_network(
    tmp_path: Path, capsys: Any, kind: HeadKind, publisher: Publisher
) -> None:
    network = write_published(tmp_path / "a.pth", small_config(kind), publisher, legacy=True)
    assert main([str(tmp_path / "a.pth"), "--out", str(tmp_path / "a.pt")]) == 0
    config, loaded = load_model(tmp_path / "a.pt")
    assert config.model.head == replace(
        network.config.head, scale_ranges=config.model.head.scale_ranges
    )
    assert config.classes == COCO_CLASSES
    images = torch.randint(0, 256, (1, 64, 96, 3), dtype=torch.uint8)
    valid_hw = torch.tensor([[64, 96]])
    with torch.inference_mode():
        expected = network.eval().candidates(images, valid_hw)
        found = loaded.candidates(images, valid_hw)
    assert expected[0].max() > 0
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    output = capsys.readouterr().out
    assert f"{len(network.state_dict())} tensors of a.pth, all of them used" in output
    assert "backbone.depth is 18, not 50" in output


@pytest.mark.parametrize("which", parity_models(), ids=str)
def test_the_published_implementations_files(
    tmp_path: Path, capsys: Any, which: ParityModel
) -> None:
    path = which.folder / "model.pth"
    assert main([str(path), "--out", str(tmp_path / "a.pt")]) == 0
    config, loaded = load_model(tmp_path / "a.pt")
    expected = load_parity_model(which)
    state = expected.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    ranges = expected.config.head.scale_ranges  # a matter of training, not in the weights
    assert (
        replace(config.model.head, scale_ranges=ranges) == expected.config.head
        and config.model.backbone == expected.config.backbone
    )
    assert load_provenance(tmp_path / "a.pt")["imported_from"] == {
        "file": "model.pth",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def test_what_is_not_used_is_explained(tmp_path: Path, capsys: Any) -> None:
    network = tiny_network(small_config())
    state = {
        f"module.{key}": value.half() if value.is_floating_point() else value
        for key, value in publish(network, "mmdetection").items()
        if "num_batches_tracked" not in key
    }
    state |= {
        "module.backbone.fc.weight": torch.zeros(1000, 64),
        "module.backbone.fc.bias": torch.zeros(9),
    }
    content = {"state_dict": state, "optimizer": {}, "meta": {"CLASSES": NAMES}}
    torch.save(content, tmp_path / "a.pth")
    assert main([str(tmp_path / "a.pth"), "--out", str(tmp_path / "a.pt")]) == 0
    output = capsys.readouterr().out
    for text in (
        "entries that hold no weights of the model: optimizer",
        "the prefix 'module.'",
        "tensors are converted to float32",
        "backbone.fc.weight, backbone.fc.bias left out: the ImageNet classifier",
        "it has no 20 counters num_batches_tracked, which are not used",
    ):
        assert text in output
    stored = load_model(tmp_path / "a.pt")[1].state_dict()
    for key, value in network.state_dict().items():
        torch.testing.assert_close(stored[key], value, rtol=1e-3, atol=1e-4)


def test_of_two_sets_of_weights_the_averaged_one_is_taken(tmp_path: Path, capsys: Any) -> None:
    """The hook of mmdetection 2 exchanges them before it saves: `ema_*` are the others."""
    network = tiny_network(small_config())
    state = publish(network, "mmdetection")
    others = {f"ema_{k.replace('.', '_')}": torch.zeros_like(v) for k, v in state.items()}
    torch.save({"state_dict": {**state, **others}}, tmp_path / "a.pth")
    assert main([str(tmp_path / "a.pth"), "--out", str(tmp_path / "a.pt")]) == 0
    output = capsys.readouterr().out
    assert f"{len(others)} tensors ema_* left out" in output and "moving average" in output
    stored = load_model(tmp_path / "a.pt")[1].state_dict()
    for key, value in network.state_dict().items():
        torch.testing.assert_close(stored[key], value, rtol=0, atol=0)
    # A name that is no copy of a weight is refused as any other unknown one.
    torch.save({"state_dict": {**state, "ema_x": torch.zeros(1)}}, tmp_path / "b.pth")
    assert "ema_x" in fails([str(tmp_path / "b.pth"), "--out", str(tmp_path / "b.pt")], capsys)


def test_a_published_name_is_downloaded_and_checked(
    tmp_path: Path, files: FileServer, capsys: Any
) -> None:
    config = small_config("decoupled_light")
    write_published(tmp_path / FILE, config, legacy=True)
    data = (tmp_path / FILE).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    files.files[FILE] = data
    out = ["--out", str(tmp_path / "a.pt")]
    assert f"SHA-256 {digest}, expected e70e226f..." in fails([NAME, *out, *SMALL], capsys)
    assert not (tmp_path / "cache" / FILE).exists() and not (tmp_path / "a.pt").exists()
    assert main([NAME, *out, *SMALL, "--sha256", digest[:10]]) == 0
    stored, content = load_checkpoint(tmp_path / "a.pt")
    assert stored.name == "decoupled_solo_light_r50" and stored.schedule.epochs == 36
    assert content["provenance"]["imported_from"] == {
        "file": FILE,
        "sha256": digest,
        "name": NAME,
        "publisher": "mmdetection",
    }  # neither the URL nor the AP: it has not the published hash
    assert len(files.requests) == 2
    # Another time it comes from the cache, and --out is not replaced unless asked.
    again = [NAME, *out, *SMALL, "--sha256", digest]
    assert f"{tmp_path / 'a.pt'} exists already; --force" in fails(again, capsys)
    assert main([*again, "--force"]) == 0
    assert len(files.requests) == 2


def test_the_origin_of_a_published_file(tmp_path: Path, files: FileServer, capsys: Any) -> None:
    model = get_model("SOLO_R50_1x")
    write_published(tmp_path / "a", small_config("vanilla"), "authors")
    files.files[model.file_name] = (tmp_path / "a").read_bytes()
    assert main(["SOLO_R50_1x", "--out", str(tmp_path / "a.pt"), *SMALL]) == 0
    assert "published mask AP 32.9" in capsys.readouterr().out
    origin = load_provenance(tmp_path / "a.pt")["imported_from"]
    assert (origin["url"], origin["published_mask_ap"]) == (model.url, 32.9)
    config, _ = load_checkpoint(tmp_path / "a.pt")
    assert (config.name, config.schedule.epochs) == ("solo_r50", 12)
    assert config.description.endswith("1x")


def test_a_published_file_at_hand_is_known_by_its_name(
    tmp_path: Path, files: FileServer, capsys: Any
) -> None:
    """A 1x file; the wrong network and the wrong hash are told from the catalogue's entry."""
    path = tmp_path / "DECOUPLED_SOLO_R50_1x.pth"
    write_published(path, small_config("vanilla"), "authors")
    message = fails([str(path), "--out", str(tmp_path / "a.pt")], capsys)
    assert "unexpected keys: bbox_head.ins_convs.0.conv.weight" in message
    assert "The configuration is decoupled_solo_r50 (published as DECOUPLED_SOLO_R50_1x)" in message
    path = path.rename(tmp_path / FILE)
    message = fails([str(path), "--out", str(tmp_path / "a.pt")], capsys)
    assert "expected e70e226f: it is damaged or another file" in message
    assert path.exists() and not files.requests


def test_a_wrong_configuration_names_the_first_keys_that_differ(
    tmp_path: Path, capsys: Any
) -> None:
    write_published(tmp_path / "a.pth", small_config("vanilla"))
    arguments = [str(tmp_path / "a.pth"), "--out", str(tmp_path / "a.pt"), "--config"]
    message = fails([*arguments, "decoupled_solo_r50"], capsys)
    assert "unexpected keys: mask_head.mask_convs.0.conv.weight, " in message
    assert "and 11 more. The configuration is decoupled_solo_r50 (from --config)" in message
    assert "missing keys: backbone.layer1" in fails([*arguments, "solo_r50"], capsys)
    assert "no configuration named 'solo'" in fails([*arguments, "solo"], capsys)


def test_a_foreign_network_is_refused(tmp_path: Path, capsys: Any) -> None:
    torch.save({"rpn_head.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "a.pth")
    arguments = [str(tmp_path / "a.pth"), "--out", str(tmp_path / "a.pt")]
    assert "keys that no published SOLO model has: rpn_head.a, b" in fails(arguments, capsys)
    torch.save(tiny_network(small_config()).backbone.state_dict(), tmp_path / "a.pth")
    assert "is a plain ResNet, not a SOLO model; solo-train --init" in fails(arguments, capsys)
    assert "'solo_v2' is neither a file nor a published" in fails(
        ["solo_v2", *arguments[1:]], capsys
    )


def test_a_pickle_with_code_needs_the_option(tmp_path: Path, capsys: Any) -> None:
    state = publish(tiny_network(small_config()), "mmdetection")
    torch.save({"state_dict": state, "path": Path("a")}, tmp_path / "a.pth")
    arguments = [str(tmp_path / "a.pth"), "--out", str(tmp_path / "a.pt")]
    assert "pathlib" in fails(arguments, capsys)
    assert main([*arguments, "--allow-pickle"]) == 0


def test_offline_says_where_to_put_the_file(tmp_path: Path, files: FileServer, capsys: Any) -> None:
    message = fails([NAME, "--out", str(tmp_path / "a.pt")], capsys)
    assert f"cannot download {files.url}/{FILE}: the server answers 404" in message
    assert message.rstrip().endswith(f"put the file at {tmp_path / 'cache' / FILE}")


@pytest.mark.parametrize(
    ("count", "meta", "options", "expected"),
    [
        (80, None, [], [(1, "person"), (2, "bicycle")]),
        (80, [n.replace(" ", "_") for n in NAMES], [], [(1, "person"), (2, "bicycle")]),
        (80, NAMES[::-1], [], [(1, "toothbrush"), (2, "hair drier")]),
        (2, ["cat", "dog"], [], [(1, "cat"), (2, "dog")]),
        (2, ["cat", "dog"], ["--classes", "list.json"], [(7, "ring"), (3, "disc")]),
        (2, None, ["--classes", "coco.json"], [(3, "disc"), (7, "ring")]),
        (2, ["one"], ["--placeholder-classes"], [(1, "class_1"), (2, "class_2")]),
    ],
)
def test_the_classes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    meta: Any,
    options: list[str],
    expected: list[tuple[int, str]],
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"id": 7, "name": "ring"}, {"id": 3, "name": "disc"}]
    Path("list.json").write_text(json.dumps(rows))
    Path("coco.json").write_text(json.dumps({"categories": rows, "images": []}))
    content = {"CLASSES": meta} if meta else {}
    write_published(Path("a.pth"), small_config(num_classes=count), meta=content)
    assert main(["a.pth", "--out", "a.pt", *options]) == 0
    config, _ = load_model(Path("a.pt"))
    assert config.num_classes == len(config.classes) == count
    assert [(c.category_id, c.name) for c in config.classes[:2]] == expected


@pytest.mark.parametrize("meta", [{}, {"CLASSES": ("one",)}])
def test_unnamed_classes_are_not_invented(tmp_path: Path, capsys: Any, meta: Any) -> None:
    write_published(tmp_path / "a.pth", small_config(num_classes=2), meta=meta)
    message = fails([str(tmp_path / "a.pth"), "--out", str(tmp_path / "a.pt")], capsys)
    assert (
        "the network has 2 classes and the file does not name them; name them with --classes FILE"
        in message
    )


def test_another_number_of_classes_is_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.json").write_text('[{"id": 1, "name": "a"}]')
    write_published(tmp_path / "a.pth", small_config(num_classes=2))
    arguments = [str(tmp_path / "a.pth"), "--out", str(tmp_path / "a.pt")]
    message = fails([*arguments, "--classes", str(tmp_path / "c.json")], capsys)
    assert "1 classes are given, but the network has 2" in message


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "{}", '[{"id": 1}]', '[{"id": "x", "name": "a"}]', '{"categories": 3}', "[]"],
)
def test_a_file_of_no_classes_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"c\.json"):
        read_classes(tmp_path / "c.json")
    with pytest.raises(CheckpointError, match=r"none\.json"):
        read_classes(tmp_path / "none.json")


def test_two_classes_of_one_id_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]')
    with pytest.raises(CheckpointError, match="2 classes with 1 ids"):
        read_classes(tmp_path / "c.json")
