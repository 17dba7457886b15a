from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.errors import STATUS_BY_CODE
from service.http.routes.web import DOCS_FILES, WEB_FILES

WEB = Path(__file__).resolve().parents[4] / "service/http/web"
PAGES = ("index.html", "docs.html")
NOTES = ("samples/SOURCE.md",)
TEXTS = sorted(path for path in WEB.iterdir() if path.suffix in (".html", ".js", ".css", ".svg"))
NAMESPACES = ("http://www.w3.org/2000/svg",)  # names, never loaded


def read_policy(response: httpx.Response) -> dict[str, str]:
    parts = response.headers["content-security-policy"].split("; ")
    return dict(part.split(" ", 1) for part in parts)


async def test_the_demo_page_is_served_with_its_headers(client: httpx.AsyncClient) -> None:
    response = await client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "<title>solo-serve</title>" in response.text
    policy = read_policy(response)
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        ("app.js", "text/javascript; charset=utf-8"),
        ("style.css", "text/css; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
        ("samples/sparse.jpg", "image/jpeg"),
    ],
)
async def test_files_have_their_type_and_the_headers(
    client: httpx.AsyncClient, name: str, media_type: str
) -> None:
    response = await client.get(f"/web/{name}")
    assert response.status_code == 200
    assert response.content == (WEB / name).read_bytes()
    assert response.headers["content-type"] == media_type
    assert response.headers["x-content-type-options"] == "nosniff"
    assert read_policy(response)["default-src"] == "'none'"


@pytest.mark.parametrize("path", ["/", "/web/app.js", "/docs", "/docs/swagger-ui.css"])
async def test_a_file_that_the_client_has_is_not_sent_again(
    client: httpx.AsyncClient, path: str
) -> None:
    first = await client.get(path)
    assert first.headers["cache-control"] == "no-cache"
    etag = first.headers["etag"]
    for known in (etag, f'"other", W/{etag}'):
        again = await client.get(path, headers={"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == etag
    changed = await client.get(path, headers={"if-none-match": '"other"'})
    assert (changed.status_code, changed.content) == (200, first.content)
    head = await client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(first.content))


@pytest.mark.parametrize(
    "path",
    [
        "/web/../app.py",
        "/web/%2e%2e/app.py",
        "/web/samples/..%2f..%2fapp.py",
        "/web/..%5capp.py",
        "/web//etc/passwd",
        "/web/%2fetc/passwd",
        "/web/app.js%00",
        "/web/",
        "/web/samples",
        "/web/samples/SOURCE.md",
        "/web/index.html",
        "/docs/../core.py",
        "/docs/%2e%2e%2fcore.py",
        "/docs/redoc.standalone.js",
        "/redoc",
    ],
)
async def test_nothing_else_is_served(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


async def test_pages_are_read_only(client: httpx.AsyncClient) -> None:
    for path in ("/", "/web/app.js", "/docs"):
        response = await client.post(path, content=b"x")
        assert (response.status_code, set(response.headers["allow"].split(", "))) == (
            405,
            {"GET", "HEAD"},
        )


def test_every_file_of_the_folder_is_known_and_there() -> None:
    found = {path.relative_to(WEB).as_posix() for path in WEB.rglob("*") if path.is_file()}
    assert found == WEB_FILES | set(PAGES) | set(NOTES)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_no_file_names_another_host(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in NAMESPACES:
        text = text.replace(name, "")
    assert not re.search(r"(?:https?|wss?|ftp):|//[\w-]+\.\w", text)
    assert not re.search(r"@import|\bon\w+=\"|style=\"|innerHTML|insertAdjacentHTML", text)


@pytest.mark.parametrize("page", PAGES)
async def test_whatever_a_page_names_is_served(client: httpx.AsyncClient, page: str) -> None:
    text = (WEB / page).read_text(encoding="utf-8")
    names = set(re.findall(r"(?:src|href)=\"([^\"#]+)\"", text))
    assert len(names) >= 4
    for name in names:
        assert not name.startswith("/"), "a path from the root breaks behind a proxy's prefix"
        assert (await client.get(f"/{name}")).status_code == 200, name


def test_whatever_a_script_imports_is_served() -> None:
    imported = set()
    for path in WEB.glob("*.js"):
        imported |= set(re.findall(r"from \"\./([^\"]+)\"", path.read_text(encoding="utf-8")))
    assert imported == {n for n in WEB_FILES if n.endswith(".js")} - {"app.js", "docs.js"}


def test_every_refusal_has_plain_words() -> None:
    text = (WEB / "api.js").read_text(encoding="utf-8")
    known = set(re.findall(r"^  (\w+): ", text, re.MULTILINE))
    own_mistakes = {
        *("invalid_request", "invalid_multipart", "invalid_parameter"),
        *("not_found", "unknown_version", "method_not_allowed", "unsupported_encoding"),
    }
    of_jobs = {
        *("unknown_job", "job_not_finished", "jobs_unavailable", "storage_full"),
        *("idempotency_key_reused", "source_forbidden", "source_unavailable", "process_lost"),
    }
    for code, status in STATUS_BY_CODE.items():
        assert known & {code, str(status)} or code in own_mistakes | of_jobs, code


def test_the_samples_are_small() -> None:
    assert sum(path.stat().st_size for path in (WEB / "samples").iterdir()) < 300_000


async def test_the_description_of_the_api_needs_no_other_host(client: httpx.AsyncClient) -> None:
    response = await client.get("/docs")
    assert response.status_code == 200
    assert "https:" not in response.text
    assert "'unsafe-inline'" not in read_policy(response)["script-src"]
    for name in DOCS_FILES:
        file = await client.get(f"/docs/{name}")
        assert file.status_code == 200
        assert len(file.content) > 100_000
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert "/segment" in paths
    assert not [path for path in paths if path.startswith(("/web", "/docs")) or path == "/"]


async def test_the_document_is_built_once_and_revalidated(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[FastAPI] = []
    build = FastAPI.openapi

    def count(app: FastAPI) -> dict[str, Any]:
        built.append(app)
        return build(app)

    monkeypatch.setattr(FastAPI, "openapi", count)
    answers = await asyncio.gather(*(client.get("/openapi.json") for _ in range(5)))
    assert len(built) == 1
    assert len({answer.content for answer in answers}) == 1
    assert answers[0].headers["content-type"] == "application/json"
    known = {"if-none-match": answers[0].headers["etag"]}
    assert (await client.get("/openapi.json", headers=known)).status_code == 304


async def test_pages_are_counted_by_route(client: httpx.AsyncClient) -> None:
    for path in ("/", "/web/app.js", "/web/style.css", "/web/no.js"):
        await client.get(path)
    text = (await client.get("/metrics")).text
    assert 'solo_requests_total{method="GET",route="/",status="200"} 1.0' in text
    assert 'solo_requests_total{method="GET",route="/web/{name:path}",status="200"} 2.0' in text
    assert 'solo_requests_total{method="GET",route="/web/{name:path}",status="404"} 1.0' in text
