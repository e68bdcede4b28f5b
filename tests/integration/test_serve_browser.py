"""A person at the dashboard, with a real browser. Skipped, and said so, where none is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from models.settings import Settings
from tests.browser import browser, missing, resize
from tests.running import served, wait_for
from tests.sites import every_page, failed_document, fill_with

TOKEN = "correct-horse-battery-staple"

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"browser tests: {missing()}")


@pytest.fixture
def driver() -> Iterator[Any]:
    with browser() as driver:
        yield driver


def text(driver: Any, selector: str = "main") -> str:
    """Return what a part of the page says now, also where another page comes while it is asked."""
    from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException

    for _ in range(1000):
        with contextlib.suppress(NoSuchElementException, StaleElementReferenceException):
            return str(driver.find_element("css selector", selector).text)
    raise AssertionError(f"no {selector} on the page")


def click(driver: Any, selector: str) -> None:
    driver.find_element("css selector", selector).click()


def resolutions(conn: psycopg.Connection) -> list[tuple[str, str | None]]:
    return [tuple(row) for row in conn.execute("SELECT doc_id, resolution FROM dead_letters ORDER BY doc_id")]


def test_a_person_reads_requeues_and_discards(settings: Settings, conn: psycopg.Connection, tmp_path: Path, driver: Any) -> None:
    for doc_id in ("a", "b", "c"):
        failed_document(conn, doc_id)
    with served(tmp_path / "serve.log") as address:
        driver.get(address + "/")
        click(driver, "nav a[href='/dead-letters']")
        assert "cannot be read" in text(driver)
        click(driver, "tbody tr:last-child a.name")
        assert "failed for good" in text(driver, "#timeline") or "changed by" in text(driver, "#timeline")
        driver.back()
        click(driver, "tbody tr:last-child input[name=id]")
        click(driver, "button[value=requeue]")
        assert text(driver, ".flash") == "1 requeued."
        assert resolutions(conn) == [("a", "requeued"), ("b", None), ("c", None)]
        click(driver, "tbody tr:last-child th a")
        click(driver, "button[value=discard]")
        driver.switch_to.alert.dismiss()
        assert resolutions(conn)[1] == ("b", None), "who says no to the question discards nothing"
        click(driver, "button[value=discard]")
        driver.switch_to.alert.accept()
        wait_for(lambda: resolutions(conn)[1] == ("b", "discarded"), "the letter to be discarded")
        click(driver, "#choose-all")
        assert driver.find_element("css selector", "input[name=id]").is_selected()


def test_who_has_not_signed_in_sees_nothing_and_who_has_does(
    settings: Settings, conn: psycopg.Connection, tmp_path: Path, driver: Any
) -> None:
    failed_document(conn, "secret-plan")
    with served(tmp_path / "serve.log", SERVE_TOKEN=TOKEN) as address:
        driver.get(address + "/dead-letters")
        assert "secret-plan" not in driver.page_source
        for token, outcome in (("wrong-wrong-wrong", "That is not the token."), (TOKEN, "secret-plan")):
            field = driver.find_element("css selector", "#token")
            field.send_keys(token)
            click(driver, "main button")
            wait_for(lambda outcome=outcome: outcome in text(driver), outcome)  # type: ignore[misc]  # a default is what binds it
        assert driver.execute_script("return document.cookie") == "", "scripts cannot read the session"
        click(driver, "footer button[type=submit]")
        # Going elsewhere at once could cut the signing out off.
        wait_for(lambda: driver.find_elements("css selector", "#token") != [], "the page that asks for the token")
        driver.get(address + "/dead-letters")
        assert "secret-plan" not in driver.page_source


def test_no_hostile_text_runs_and_no_page_is_wider_than_its_screen(
    settings: Settings, conn: psycopg.Connection, tmp_path: Path, driver: Any
) -> None:
    fill_with(conn)
    with served(tmp_path / "serve.log") as address:
        for path in every_page(conn):
            for width in (1280, 390):
                resize(driver, width, 900)
                driver.get(address + path)  # raises where an alert is open
                wide = driver.execute_script("return document.documentElement.scrollWidth")
                assert wide <= width, (path, wide)
        complaints = [entry["message"] for entry in driver.get_log("browser") if "404" not in entry["message"]]
        assert complaints == [], "nothing on any page breaks the content security policy"


def test_a_page_renews_itself_unless_it_is_paused(settings: Settings, conn: psycopg.Connection, tmp_path: Path, driver: Any) -> None:
    with served(tmp_path / "serve.log") as address:
        driver.get(address + "/documents")
        conn.execute("SELECT submit_document('uploads/x', doc_id => 'first', file_name => 'first.txt')")
        wait_for(lambda: "first.txt" in text(driver), "the new document to show by itself")
        click(driver, "#live-switch")
        wait_for(lambda: "go on" in text(driver, "footer"), "updates to be paused")
        conn.execute("SELECT submit_document('uploads/y', doc_id => 'second', file_name => 'second.txt')")
        driver.implicitly_wait(0)
        assert "second.txt" not in text(driver)
        click(driver, "#live-switch")
        wait_for(lambda: "second.txt" in text(driver), "updates to go on")


def test_an_alert_that_opens_later_shows_by_itself_and_goes_when_it_is_over(
    settings: Settings, conn: psycopg.Connection, tmp_path: Path, driver: Any
) -> None:
    with served(tmp_path / "serve.log", SERVE_READ_ONLY="true") as address:
        driver.get(address + "/")
        assert text(driver, "#alerts") == ""
        conn.execute(
            """INSERT INTO alert_conditions (rule, subject, message, first_seen_at, last_seen_at, opened_at)
            SELECT rule, '', 'the pumps stand still', now(), now(), now() FROM alert_rules WHERE rule = 'no_worker'"""
        )
        wait_for(lambda: "the pumps stand still" in text(driver, "#alerts"), "the alert to show by itself")
        conn.execute("DELETE FROM alert_conditions")
        wait_for(lambda: text(driver, "#alerts") == "", "the alert to go")


def test_a_page_says_so_when_its_server_is_lost(settings: Settings, conn: psycopg.Connection, tmp_path: Path, driver: Any) -> None:
    with served(tmp_path / "serve.log") as address:
        driver.get(address + "/documents")
        assert text(driver, ".lost") == "", "not while it answers"
    wait_for(lambda: "does not answer" in text(driver, ".lost"), "the page to say so")
    assert "No document" in text(driver), "what it showed is still there"


def test_without_scripts_everything_can_be_read_and_done(settings: Settings, conn: psycopg.Connection, tmp_path: Path) -> None:
    failed_document(conn, "a")
    with served(tmp_path / "serve.log") as address, browser(script=False) as driver:
        driver.get(address + "/queues")
        assert driver.find_elements("css selector", "svg.plot rect, svg.plot path") != []
        driver.get(address + "/dead-letters")
        click(driver, "input[name=id]")
        click(driver, "button[value=requeue]")
        assert text(driver, ".flash") == "1 requeued."
        assert resolutions(conn) == [("a", "requeued")]
