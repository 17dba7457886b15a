from __future__ import annotations

from typing import Any

from service.http.explain import explain_errors


def error(name: str, kind: str = "int_type", value: Any = 1) -> dict[str, Any]:
    return {"loc": (name,), "type": kind, "msg": "Wrong", "input": value}


def test_each_value_is_named() -> None:
    errors = [error("a", value="x"), error("b", "extra_forbidden")]
    assert explain_errors(errors, "field") == "a: Wrong, not 'x'; there is no field 'b'"
    nested = {**error("a"), "loc": ("a", 0, "b")}
    assert explain_errors([nested], "field") == "a.0.b: Wrong, not 1"
    assert explain_errors([{**error("a"), "loc": ()}], "field") == "the body: Wrong, not 1"
    own = {**error("a"), "msg": "Value error, it is odd"}
    assert explain_errors([own], "field") == "a: it is odd, not 1"
    whole = {**error("a", "value_error"), "loc": (), "msg": "Value error, a is odd"}
    assert explain_errors([whole], "field") == "a is odd"


def test_much_is_abbreviated() -> None:
    long = explain_errors([error("n" * 5000, "extra_forbidden", "v" * 10**6)], "parameter")
    assert len(long) < 200
    assert len(explain_errors([error("a", value="v" * 10**6)], "parameter")) < 200
    assert len(explain_errors([error("a", value=[[0] * 1000] * 1000)], "parameter")) < 500
    many = explain_errors([error(f"a{i}") for i in range(1000)], "parameter")
    assert many.endswith("; and 990 more")
    assert many.count(";") == 10
