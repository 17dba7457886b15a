from __future__ import annotations

import pytest

from export.options import list_stages, parse_arguments
from training.provenance import describe_command


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("a.pt --out repo --opset 21", "--opset: invalid choice: 21"),
        ("a.pt --out repo --precision fp8", "--precision: invalid choice: 'fp8'"),
        ("--out repo", "a checkpoint or --variants-of is required"),
        ("a.pt", "--out is required"),
        ("a.pt --variants-of repo/a/1 --precision fp16", "does not accept a checkpoint, got a.pt"),
        ("--variants-of repo/a/1", "--variants-of requires --precision, --exits"),
        (
            "--variants-of repo/a/1 --precision fp16 --name b --out c",
            "--out, --name: not allowed with --variants-of",
        ),
        ("--tensorrt fp16", "a checkpoint or --variants-of is required"),
        ("--kernels sm_90 --tensorrt fp16", "a checkpoint or --variants-of is required"),
        ("a.pt --out repo --tensorrt int8", "--tensorrt: invalid choice: 'int8'"),
        ("a.pt --out repo --aoti cuda:int8", "'cuda:int8' is not cpu or cuda"),
        ("a.pt --out repo --aoti fp16", "'fp16' is not cpu or cuda"),
        ("--variants-of repo/a/1 --aoti cpu:fp32", "--aoti requires a checkpoint"),
        ("a.pt --out repo --calibration-images 0", "--calibration-images is 0"),
    ],
)
def test_invalid_combinations_are_usage_errors(
    arguments: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(arguments.split())
    assert reason in capsys.readouterr().err


def test_by_default_no_other_precision_is_built() -> None:
    options = parse_arguments(["a.pt", "--out", "repo"])
    assert options.precision == [] and options.accept_unrun is False
    assert options.calibration_split != options.split


def test_kernels_require_no_checkpoint_and_engines_a_version() -> None:
    assert parse_arguments(["--kernels"]).kernels == []
    assert parse_arguments(["--kernels", "sm_90"]).kernels == ["sm_90"]
    options = parse_arguments(["--variants-of", "repo/a/1", "--tensorrt", "fp16", "bf16"])
    assert options.tensorrt == ["fp16", "bf16"]
    (package,) = parse_arguments(["a.pt", "--out", "repo", "--aoti", "cuda:fp16"]).aoti
    assert (package.device, package.precision) == ("cuda", "fp16")


def test_commands_are_recorded_without_folders() -> None:
    words = ["/a/b/best.pt", "--out", "model_repo", "--name", "a b"]
    expected = "solo-export best.pt --out model_repo --name 'a b'"
    assert describe_command("solo-export", words) == expected


def test_the_stages_are_those_that_the_options_ask_for() -> None:
    def stages(*more: str) -> list[str]:
        return list_stages(parse_arguments(["a.pt", "--out", "repo", *more]))

    assert len(stages()) == 4 and stages()[-1] == "publishing it"
    assert set(stages("--data", "d")) - set(stages()) == {"measuring its AP"}
    for more in (["--precision", "fp16"], ["--exits"], ["--aoti", "cpu:fp32"]):
        assert set(stages(*more)) - set(stages()) == {"building the other files of the version"}
