from __future__ import annotations

import os
import sys
from pathlib import Path

import httpx
import pytest

from solo_client.address import (
    find_proxy,
    hide_password,
    is_excluded,
    load_certificates,
    parse_address,
)

HTTP = httpx.URL("http://solo.example:8000")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("REQUEST_METHOD", raising=False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://localhost:8000", "http://localhost:8000"),
        ("HTTPS://Host/solo/", "https://host/solo/"),
        ("http://[::1]:8000/solo", "http://[::1]:8000/solo"),
        ("http://127.0.0.1", "http://127.0.0.1"),
        ("http://name:pass%40word@host", "http://name:pass%40word@host"),
    ],
)
def test_an_address_is_a_url(given: str, expected: str) -> None:
    assert parse_address(given) == httpx.URL(expected)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "localhost:8000",
        "ftp://localhost",
        "http://",
        "http://localhost:80a0",
        "http://localhost:0",
        "http://localhost:65536",
        "http://::1:8000",
        "http://[::1",
        "http://a..b",
        f"http://{'a' * 64}.example",
        "http://local\nhost",
        "http://localhost?model=a",
        "http://localhost/#top",
    ],
)
def test_any_other_text_is_refused_and_named(wrong: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_address(wrong)
    assert repr(wrong) in str(caught.value)
    assert type(caught.value) is ValueError


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="Path"):
        parse_address(Path("/socket"))  # type: ignore[arg-type]


def test_no_password_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hide_password("http://name:s3cret@host/a") == "http://***@host/a"
    assert hide_password("name:s3@cret@host") == "***@host"
    assert hide_password("http://host:1") == "http://host:1"
    with pytest.raises(ValueError, match=r"\*\*\*@host") as caught:
        parse_address("http://name:s3cret@host:x")
    assert "s3cret" not in str(caught.value)
    monkeypatch.setenv("HTTP_PROXY", "http://name:s3cret@proxy:x")
    with pytest.raises(ValueError, match=r"HTTP_PROXY=http://\*\*\*@proxy") as caught:
        find_proxy(HTTP)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "address", "expected"),
    [
        ({}, "http://solo.example", None),
        ({"HTTP_PROXY": "http://proxy:3128"}, "http://solo.example", "http://proxy:3128"),
        ({"http_proxy": "proxy:3128"}, "http://solo.example", "http://proxy:3128"),
        ({"HTTPS_PROXY": "http://proxy:3128"}, "http://solo.example", None),
        ({"HTTPS_PROXY": "http://proxy:3128"}, "https://solo.example", "http://proxy:3128"),
        ({"ALL_PROXY": "https://proxy"}, "http://solo.example", "https://proxy"),
        (
            {"ALL_PROXY": "bad://proxy", "HTTP_PROXY": "http://first"},
            "http://solo.example",
            "http://first",
        ),
        ({"HTTP_PROXY": ""}, "http://solo.example", None),
        (
            {"HTTP_PROXY": "http://proxy", "NO_PROXY": "fd00::/8,.example"},
            "http://solo.example",
            None,
        ),
        ({"ALL_PROXY": "socks5://proxy:1", "no_proxy": "*"}, "http://solo.example", None),
        ({"ALL_PROXY": "socks5://proxy:1"}, "http://solo.example", "socks5://proxy:1"),
    ],
)
def test_the_environment_names_the_proxy(
    variables: dict[str, str],
    address: str,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as if socksio were there
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    proxy = find_proxy(httpx.URL(address))
    assert (proxy and proxy.url) == (expected and httpx.URL(expected))


def test_a_proxy_may_want_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://name:pass%40word@proxy:3128")
    proxy = find_proxy(HTTP)
    assert proxy is not None
    assert proxy.auth == ("name", "pass@word")
    assert proxy.url == httpx.URL("http://proxy:3128")


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("ALL_PROXY", "socks5://proxy:1080", "pip install 'httpx[socks]'"),
        ("all_proxy", "socks5h://proxy:1080", "pip install 'httpx[socks]'"),
        ("HTTP_PROXY", "socks://proxy:1080", "socks5://"),
        ("http_proxy", "ftp://proxy", "starts with http://"),
        ("HTTP_PROXY", "http://proxy:31x8", "Invalid port: '31x8'"),
        ("HTTP_PROXY", "http://proxy:99999", "its port is 99999"),
        ("HTTP_PROXY", "http://", "it has no host"),
        ("HTTP_PROXY", "http://a..b", "its host is invalid"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_an_error_with_its_variable(
    variable: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError) as caught:
        find_proxy(HTTP)
    assert str(caught.value).startswith(f"{variable}={value}: ")
    assert reason in str(caught.value)
    monkeypatch.setenv("NO_PROXY", "solo.example")
    assert find_proxy(HTTP) is None


@pytest.mark.parametrize(
    ("no_proxy", "address", "excluded"),
    [
        ("*", "http://a.b", True),
        ("x, *", "http://a.b", True),
        ("", "http://a.b", False),
        (" ,, .", "http://a.b", False),
        ("a.b", "http://A.B", True),
        ("b", "http://a.b", True),
        (".b", "http://a.b", True),
        ("*.b", "http://a.b", True),
        ("*b", "http://a.b", True),
        (".b", "http://b", True),
        ("b", "http://ab", False),
        ("a.b.c", "http://b.c", False),
        ("b.", "http://b", True),
        ("b", "http://b.", True),
        ("x b", "http://b", True),
        ("b/", "http://b", True),
        ("b:80", "http://b", True),
        ("b:443", "https://b", True),
        ("b:8000", "http://b", False),
        ("b:8000", "http://b:8000", True),
        ("http://b:8000/", "http://b:8000", True),
        ("all://b", "http://b", True),
        ("https://b", "http://b", False),
        ("127.0.0.1", "http://127.0.0.1:8000", True),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", True),
        ("127.0.0.1:8001", "http://127.0.0.1:8000", False),
        ("127.0.0.0/8", "http://127.9.9.9", True),
        ("127.0.0.0/8", "http://128.0.0.1", False),
        ("127.0.0.0/99", "http://127.0.0.1", False),
        ("127.0.0.0/8", "http://[::1]", False),
        ("::1", "http://[::1]:8000", True),
        ("[::1]", "http://[::1]:8000", True),
        ("[::1]:80", "http://[::1]", True),
        ("[::1]:81", "http://[::1]", False),
        ("0:0:0:0:0:0:0:1", "http://[::1]", True),
        ("fd00::/8", "http://[fd12::3]", True),
        ("[fd00::]/8", "http://[fd12::3]", True),
        ("fd00::/8", "http://[fe80::1]", False),
        ("fd00::/8", "http://127.0.0.1", False),
        ("fd00::/8", "http://fd00.example", False),
        ("fd00::/999", "http://[fd12::3]", False),
    ],
)
def test_entries_of_no_proxy(no_proxy: str, address: str, excluded: bool) -> None:
    assert is_excluded(httpx.URL(address), no_proxy) is excluded


def test_missing_certificates_are_an_error_with_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    assert load_certificates(httpx.URL("https://a"), None).get_ca_certs()
    assert load_certificates(HTTP, httpx.Proxy("https://proxy")).get_ca_certs()
    assert load_certificates(HTTP, None).get_ca_certs() == []
    missing = tmp_path / "missing"
    monkeypatch.setenv("SSL_CERT_FILE", str(missing))
    with pytest.raises(ValueError, match=f"SSL_CERT_FILE={missing}"):
        load_certificates(httpx.URL("https://a"), None)
    load_certificates(HTTP, httpx.Proxy("http://proxy"))
