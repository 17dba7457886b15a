"""python -m benchmarks NAME [options]: measures something of the running code.

NAME is a file of benchmarks/cases with a function of the same name. The function's keyword
parameters are the options (a positional-only parameter is an argument), their `Annotated` texts
the help. It returns a `Report`, which is printed and written as JSON.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from benchmarks.harness import BenchmarkError
from benchmarks.harness.plots import draw, load_pyplot
from benchmarks.harness.report import RESULTS, Report, write_report

CASES = Path(__file__).resolve().parents[1] / "cases"
PROGRAM = "python -m benchmarks"
Benchmark = Callable[..., Report]


def find_benchmarks() -> dict[str, str]:
    """The first line of each benchmark's docstring, by name; nothing is imported."""
    found = {}
    for file in sorted(CASES.glob("[a-z]*.py")):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[file.stem] = text.partition("\n")[0]
    return found


def build_parser(
    name: str, benchmark: Benchmark, description: str | None
) -> argparse.ArgumentParser:
    """The options of one benchmark, and those that all have."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = get_type_hints(benchmark, include_extras=True)
    for parameter in inspect.signature(benchmark).parameters.values():
        _add_option(parser, parameter, hints[parameter.name])
    add = parser.add_argument
    add("--out", default=f"{RESULTS / name}.json", help="JSON to write; - for none (%(default)s)")
    add("--plot", type=Path, help="picture to draw, .svg or .png; needs matplotlib")
    return parser


def _add_option(
    parser: argparse.ArgumentParser, parameter: inspect.Parameter, hint: object
) -> None:
    kind, text = get_args(hint) if get_origin(hint) is Annotated else (hint, "")
    if get_origin(kind) in (Union, types.UnionType):  # T | None
        (kind,) = [one for one in get_args(kind) if one is not type(None)]
    how: dict[str, Any] = {}
    if get_origin(kind) is tuple:
        kind, how["nargs"] = get_args(kind)[0], "+"
    if get_origin(kind) is Literal:
        how["choices"] = get_args(kind)
        kind = type(how["choices"][0])
    required = parameter.default is parameter.empty
    how["help"] = text.replace("%", "%%")
    if not required and parameter.default is not None and kind is not bool:
        shown = parameter.default
        shown = " ".join(map(str, shown)) if isinstance(shown, tuple) else shown
        how["help"] += f" ({shown})".replace("%", "%%")
    if parameter.kind is parameter.POSITIONAL_ONLY:
        parser.add_argument(parameter.name, type=kind, **how)
        return
    flag = f"--{parameter.name.replace('_', '-')}"
    if kind is bool:
        parser.add_argument(flag, action="store_true", **how)
    else:
        default = None if required else parameter.default
        parser.add_argument(flag, type=kind, default=default, required=required, **how)


def run(benchmark: Benchmark, options: argparse.Namespace) -> Report:
    """Calls a benchmark with the options that are its own."""
    given = vars(options)
    positional, named = [], {}
    for parameter in inspect.signature(benchmark).parameters.values():
        value = given[parameter.name]
        value = tuple(value) if isinstance(value, list) else value
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(value)
        else:
            named[parameter.name] = value
    return benchmark(*positional, **named)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if the benchmark failed or found a fault."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    known = find_benchmarks()
    if not given or given[0] in ("--list", "-h", "--help"):
        print(f"usage: {PROGRAM} NAME [options]; {PROGRAM} NAME --help shows the options\n")
        width = max(map(len, known))
        print("\n".join(f"  {name:{width}}  {text}" for name, text in known.items()))
        return 0
    name = given[0]
    if name not in known:
        print(f"{PROGRAM}: no benchmark {name!r}, expected {', '.join(known)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"benchmarks.cases.{name}")
    benchmark: Benchmark = getattr(module, name)
    options = build_parser(name, benchmark, module.__doc__).parse_args(given[1:])
    try:
        if options.plot is not None:
            load_pyplot()  # before anything is measured
        report = run(benchmark, options)
    except BenchmarkError as error:
        print(f"{PROGRAM} {name}: {error}", file=sys.stderr)
        return 1
    print(report.render())
    if options.out != "-":
        write_report(Path(options.out), report, [PROGRAM, name, *given[1:]])
    if options.plot is not None:
        draw(report.panels, options.plot)
    for failure in report.failures:
        print(f"{PROGRAM} {name}: {failure}", file=sys.stderr)
    return 1 if report.failures else 0
