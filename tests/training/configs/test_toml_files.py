from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model_config import ClassSpec, KeepRatioResize, MaskNms
from training.configs import get_config, list_configs
from training.configs.schema import Config
from training.configs.toml_files import format_config, load_config, main, parse_config

NUCLEI = get_config("nuclei")


@pytest.mark.parametrize("name", list_configs())
def test_every_configuration_survives_toml(name: str) -> None:
    assert parse_config(format_config(get_config(name)), "other") == get_config(name)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(texts=st.lists(TEXT, max_size=3), rate=st.floats(allow_nan=False))
def test_any_text_and_number_survives(texts: list[str], rate: float) -> None:
    config = replace(
        NUCLEI,
        description="".join(texts),
        schedule=replace(NUCLEI.schedule, lr=rate, clip_norm=None),
        loss=replace(NUCLEI.loss, mask_weight=None),
        classes=tuple(ClassSpec(category_id=i, name=name) for i, name in enumerate(texts)),
    )
    assert parse_config(format_config(config), "other") == config


def test_a_name_of_none_is_a_text() -> None:
    config = replace(NUCLEI, name="none", classes=(ClassSpec(category_id=1, name="none"),))
    assert parse_config(format_config(config), "other") == config


def test_only_the_differences_from_a_base() -> None:
    text = (
        'base = "nuclei"\n[schedule]\nepochs = 3\nclip_norm = "none"\n[model.head]\nchannels = 8\n'
    )
    expected = replace(
        NUCLEI,
        name="mine",
        schedule=replace(NUCLEI.schedule, epochs=3, clip_norm=None),
        model=replace(NUCLEI.model, head=replace(NUCLEI.model.head, channels=8)),
    )
    assert parse_config(text, "mine") == expected
    assert parse_config('base = "nuclei"\nname = "nuclei"\n', "mine") == NUCLEI


def test_without_a_base_fields_have_the_schemas_defaults() -> None:
    assert parse_config("", "mine") == Config(name="mine")


def test_another_rule_replaces_the_base_s_table() -> None:
    resize = '[input.resize]\nrule = "keep_ratio"\nshort_side = 96\nlong_side = 128\n'
    nms = '[postprocess.nms]\nkind = "mask"\n'
    config = parse_config(f'base = "nuclei"\n{resize}{nms}', "mine")
    assert config.input.resize == KeepRatioResize(short_side=96, long_side=128)
    assert config.input.contrast == NUCLEI.input.contrast
    assert config.postprocess.nms == MaskNms()
    same = parse_config('base = "nuclei"\n[input.resize]\nrule = "tile"\noverlap_px = 40\n', "mine")
    assert same.input.resize == NUCLEI.input.resize.model_copy(update={"overlap_px": 40})
    head = parse_config('base = "nuclei"\n[model.head]\nkind = "vanilla"\n', "mine").model.head
    assert head == replace(NUCLEI.model.head, kind="vanilla")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('base = "nuclei"\n[schedule]\nepoch = 3\n', r"schedule\.epoch: "),
        ("[model.head]\nnum_gridz = [1]\n", r"model\.head\.num_gridz: "),
        ("surplus = 1\n", "surplus: "),
        ('base = "nuclei"\n[input.resize]\nshort_side = 3\n', r"resize\.tile\.short_side: "),
        ('[schedule]\nlr = "fast"\n', r"schedule\.lr: Input should be a valid number"),
        ('base = "nuclei"\nschedule = 3\n', "schedule: "),
        ('base = "nuclei"\n[schedule]\nlr = "none"\n', r"schedule\.lr: "),
        ('base = "nucleus"\n', "'nucleus'; there are"),
        ("base = 3\n", "base is 3"),
        ("lr = 1979-05-27\n", "lr: "),
        ("a = \n", "line 1"),
        ("a = 1\na = 2\n", "line 2"),
        ("a = " + "[" * 100_000, "nested too deeply|line 1|too many"),
        ("a = " + "9" * 5_000, "digits|a: "),
    ],
)
def test_mistakes_name_the_file_and_the_field(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_config(str(file))
    assert str(error.value).startswith(f"{file}: ")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"name = '\xe9'"])
def test_a_file_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"mine\.toml: "):
        load_config(str(file))
    with pytest.raises(ValueError, match=r"absent\.toml: "):
        load_config(str(tmp_path / "absent.toml"))


def test_the_file_names_the_configuration_and_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "leaves.toml"
    file.write_bytes('\ufeffbase = "nuclei"\r\n'.encode())
    assert load_config(str(file)) == replace(NUCLEI, name="leaves")
    assert load_config("nuclei") == NUCLEI


def test_show_prints_what_load_reads(tmp_path: Path, capsys: Any) -> None:
    assert main(["show", "nuclei", "--set", "schedule.lr=0.5"]) == 0
    file = tmp_path / "shown.toml"
    file.write_text(capsys.readouterr().out)
    assert load_config(str(file)) == replace(NUCLEI, schedule=replace(NUCLEI.schedule, lr=0.5))
    assert main(["show", str(file)]) == 0
    assert capsys.readouterr().out == file.read_text()


def test_list_names_every_configuration(capsys: Any) -> None:
    assert main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list_configs()


@pytest.mark.parametrize("arguments", [["nucleus"], ["nuclei", "--set", "lr=1"], ["no.toml"]])
def test_show_of_what_is_not_there_is_one_line(arguments: list[str], capsys: Any) -> None:
    assert main(["show", *arguments]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("solo-config: ") and printed.count("\n") == 1
