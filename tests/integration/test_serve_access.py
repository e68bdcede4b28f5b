"""Who may see and do what: sign-in, forms, names of the server, read-only mode, and where it may listen at all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx2
import psycopg
import pytest

from models.settings import Settings
from tests.running import REPOSITORY, served, wait_for
from tests.sites import client, failed_document, form_token, letters_on

TOKEN = "correct-horse-battery-staple"
PRIVATE = ("/", "/queues", "/batches", "/batch?id=x", "/documents", "/document?id=x", "/dead-letters", "/dead-letter?id=1", "/workers",
           "/providers", "/search?q=x", "/nowhere")  # fmt: skip


@pytest.fixture
def open_site(settings: Settings, tmp_path: Path) -> Iterator[httpx2.Client]:
    """A server on this machine, without sign-in."""
    with served(tmp_path / "serve.log") as address, client(address) as visitor:
        yield visitor


@pytest.fixture
def closed_site(settings: Settings, tmp_path: Path) -> Iterator[httpx2.Client]:
    """A server that other machines can reach, with its token in a file."""
    secret = tmp_path / "token"
    secret.write_text(TOKEN + "\n")
    given = {"SERVE_HOST": "0.0.0.0", "SERVE_TOKEN_FILE": str(secret)}
    with served(tmp_path / "serve.log", **given) as address, client(address.replace("0.0.0.0", "127.0.0.1")) as visitor:
        yield visitor
    assert TOKEN not in (tmp_path / "serve.log").read_text()


def sign_in(visitor: httpx2.Client, token: str = TOKEN, following: str = "/") -> httpx2.Response:
    return visitor.post("/login", data={"csrf": form_token(visitor.get("/login").text), "token": token, "next": following})


def state_of(conn: psycopg.Connection, doc_id: str) -> tuple[str, str | None]:
    row = conn.execute(
        """SELECT d.state, (SELECT l.resolution FROM dead_letters l WHERE l.doc_id = d.doc_id ORDER BY l.id DESC LIMIT 1)
        FROM file_extractions d WHERE d.doc_id = %s""",
        [doc_id],
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def test_without_signing_in_nothing_is_told_but_whether_it_is_up(closed_site: httpx2.Client) -> None:
    for path in PRIVATE:
        answer = closed_site.get(path)
        assert (answer.status_code, answer.headers["location"].partition("?")[0]) == (303, "/login"), path
        assert answer.text == ""
    assert closed_site.get("/metrics").status_code == 401
    assert closed_site.get("/healthz").status_code == 200
    assert set(closed_site.get("/readyz").json()) == {"ready"}
    assert closed_site.post("/dead-letters/resolve", data={"action": "discard", "id": "1"}).status_code == 303
    assert closed_site.get("/", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 303, "a header is for machines"
    login = closed_site.get("/login")
    assert "Dead letters" not in login.text


def test_the_token_opens_all_pages_until_one_signs_out(closed_site: httpx2.Client) -> None:
    answer = sign_in(closed_site, following="/workers")
    assert (answer.status_code, answer.headers["location"]) == (303, "/workers")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN not in cookie
    assert closed_site.get("/workers").status_code == 200
    assert "components" in closed_site.get("/readyz").json()
    stolen = closed_site.cookies["docmill_session"]
    assert closed_site.post("/logout", data={"csrf": form_token(closed_site.get("/").text)}).status_code == 303
    closed_site.cookies.set("docmill_session", stolen, domain="127.0.0.1")
    assert closed_site.get("/workers").status_code == 303, "a session that was signed out is worth nothing"


def test_a_scraper_comes_in_with_the_token_in_its_header(closed_site: httpx2.Client) -> None:
    assert closed_site.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert "components" in closed_site.get("/readyz", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    assert closed_site.get("/metrics", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert closed_site.get("/metrics", headers={"Authorization": f"Basic {TOKEN}"}).status_code == 401


def test_who_guesses_the_token_is_made_to_wait_and_not_even_the_right_one_counts_meanwhile(closed_site: httpx2.Client) -> None:
    for _ in range(20):
        last = sign_in(closed_site, "wrong-wrong-wrong-wrong")
        if last.status_code == 429:
            break
        assert last.status_code == 403
    assert last.status_code == 429
    assert int(last.headers["retry-after"]) >= 1
    # The pause is 5 s from the last wrong token; the next two questions follow within it.
    assert sign_in(closed_site).status_code == 429
    assert closed_site.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 429
    assert closed_site.get("/healthz").status_code == 200


def test_a_link_from_another_site_neither_ends_a_session_nor_leads_astray(closed_site: httpx2.Client) -> None:
    sign_in(closed_site)
    session = closed_site.cookies["docmill_session"]
    closed_site.cookies.clear()  # what SameSite=Strict does on the way
    foreign = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    for path, target in (("/document?id=a%22%3E%3Cb", "/document?id=a%22%3E%3Cb"), ("//evil.example/x", "/")):
        answer = closed_site.get(f"{closed_site.base_url}{path}" if path.startswith("//") else path, headers=foreign)
        assert (answer.status_code, "set-cookie" in answer.headers) == (200, False)
        assert f'content="0;url={target}"' in answer.text
    closed_site.cookies.set("docmill_session", session, domain="127.0.0.1")
    assert closed_site.get("/documents").status_code == 200


def test_a_wrong_token_a_foreign_form_and_a_made_up_cookie_do_not_sign_in(closed_site: httpx2.Client) -> None:
    assert sign_in(closed_site, "").status_code == 403
    token = form_token(closed_site.get("/login").text)
    assert closed_site.post("/login", data={"token": TOKEN}).status_code == 403
    assert closed_site.post("/login", data={"token": TOKEN, "csrf": token}, headers={"Origin": "http://evil.example"}).status_code == 403
    assert closed_site.post("/login", data={"token": TOKEN, "csrf": token}, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    before = closed_site.cookies["docmill_session"]
    closed_site.cookies.set("docmill_session", "A" * 43, domain="127.0.0.1")
    assert closed_site.get("/").status_code == 303
    closed_site.cookies.set("docmill_session", before, domain="127.0.0.1")
    assert sign_in(closed_site).status_code == 303
    assert closed_site.cookies["docmill_session"] != before, "signing in begins a session that nobody knew before"


def test_one_is_not_sent_to_another_site_after_signing_in(closed_site: httpx2.Client) -> None:
    for target in ("//evil.example/", "https://evil.example/", "/\\evil.example"):
        assert sign_in(closed_site, following=target).headers["location"] == "/"
        closed_site.cookies.clear()


def test_a_form_that_was_made_elsewhere_changes_nothing(open_site: httpx2.Client, conn: psycopg.Connection) -> None:
    number = failed_document(conn, "a")
    token = form_token(open_site.get("/dead-letters").text)
    good = {"action": "discard", "id": str(number), "csrf": token}
    with client(str(open_site.base_url)) as somebody_else:
        attempts = [
            open_site.post("/dead-letters/resolve", data={**good, "csrf": ""}),
            open_site.post("/dead-letters/resolve", data={**good, "csrf": token[:-1] + "x"}),
            open_site.post("/dead-letters/resolve", data=good, headers={"Origin": "http://evil.example"}),
            open_site.post("/dead-letters/resolve", data=good, headers={"Origin": "null"}),
            open_site.post("/dead-letters/resolve", data=good, headers={"Sec-Fetch-Site": "same-site"}),
            somebody_else.post("/dead-letters/resolve", data=good),
        ]
    assert [attempt.status_code for attempt in attempts] == [403] * 6
    for path in ("/dead-letters/resolve", "/logout"):
        assert open_site.get(path, params=good).status_code == 405
    assert state_of(conn, "a") == ("failed", None)
    origin = {"Origin": str(open_site.base_url).rstrip("/"), "Sec-Fetch-Site": "same-origin"}
    assert open_site.post("/dead-letters/resolve", data=good, headers=origin).status_code == 303
    assert state_of(conn, "a") == ("failed", "discarded")


def test_chosen_dead_letters_are_requeued_and_what_cannot_be_is_told(open_site: httpx2.Client, conn: psycopg.Connection) -> None:
    numbers = [failed_document(conn, doc_id) for doc_id in ("a", "b", "c")]
    page = open_site.get("/dead-letters").text
    assert letters_on(page) == [str(n) for n in sorted(numbers, reverse=True)]
    form = {"action": "requeue", "csrf": form_token(page)}
    done = open_site.post("/dead-letters/resolve", data={**form, "id": [str(n) for n in numbers[:2]]})
    assert (done.status_code, done.headers["location"]) == (303, "/dead-letters?requeued=2")
    assert "2 requeued" in open_site.get(done.headers["location"]).text
    assert [state_of(conn, doc_id) for doc_id in ("a", "b", "c")] == [("queued", "requeued"), ("queued", "requeued"), ("failed", None)]
    again = open_site.post("/dead-letters/resolve", data={**form, "id": [str(n) for n in (*numbers, 999)]})
    assert again.status_code == 409
    assert "1 done, 3 refused" in again.text
    assert "was requeued at" in again.text
    assert "there is no dead letter 999" in again.text
    assert state_of(conn, "c") == ("queued", "requeued")
    wrongs: list[dict[str, str | list[str]]] = [{"action": "drop"}, {"id": "x"}, {"id": []}, {"id": [str(n) for n in range(501)]}]
    for wrong in wrongs:
        assert open_site.post("/dead-letters/resolve", data={**form, "id": "1", **wrong}).status_code == 400


def test_a_session_that_has_ended_leads_back_to_a_page_and_not_to_a_form(closed_site: httpx2.Client) -> None:
    for path in ("/dead-letters/resolve", "/logout"):
        answer = closed_site.post(path, data={"csrf": "of an older session", "action": "requeue", "id": "1"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/login"), path


def test_a_connection_that_breaks_between_dead_letters_leaves_a_list_of_what_was_not_done(
    open_site: httpx2.Client, conn: psycopg.Connection
) -> None:
    numbers = [failed_document(conn, doc_id) for doc_id in ("a", "b", "c")]
    conn.execute(
        f"""CREATE FUNCTION break_off() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END $$;
        CREATE TRIGGER breaks BEFORE UPDATE ON dead_letters FOR EACH ROW
            WHEN (NEW.id = {numbers[1]}) EXECUTE FUNCTION break_off()""".encode()
    )
    form = {"action": "requeue", "csrf": form_token(open_site.get("/dead-letters").text), "id": [str(n) for n in numbers]}
    answer = open_site.post("/dead-letters/resolve", data=form)
    assert answer.status_code == 409
    assert "1 done, 2 refused" in answer.text
    assert [state_of(conn, doc_id)[1] for doc_id in ("a", "b", "c")] == ["requeued", None, None]


def test_batches_that_cannot_be_reopened_now_hide_nothing_of_what_was_requeued(
    open_site: httpx2.Client, conn: psycopg.Connection, tmp_path: Path
) -> None:
    number = failed_document(conn, "a")
    conn.execute("ALTER FUNCTION reopen_batches RENAME TO not_there")
    form = {"action": "requeue", "csrf": form_token(open_site.get("/dead-letters").text), "id": str(number)}
    done = open_site.post("/dead-letters/resolve", data=form)
    assert (done.status_code, done.headers["location"]) == (303, "/dead-letters?requeued=1")
    assert "reopen_batches" in (tmp_path / "serve.log").read_text()


def test_connections_that_ask_for_nothing_do_not_keep_others_out(closed_site: httpx2.Client) -> None:
    address = (str(closed_site.base_url.host), int(closed_site.base_url.port or 0))
    form = b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 9\r\n\r\ncsrf="
    with ExitStack() as held:
        for beginning in (form, b"", b"GET /healthz HTTP/1.1\r\nHost: "):
            for _ in range(70):
                held.enter_context(socket.create_connection(address)).sendall(beginning)
            closed_site.get("/healthz")  # all of these are accepted by now
        wait_for(lambda: closed_site.get("/healthz").status_code == 503, "all places to be taken")
        wait_for(lambda: closed_site.get("/healthz").status_code == 200, "places to be free", 30)


def test_another_sites_page_cannot_reach_it_by_giving_it_another_name(open_site: httpx2.Client) -> None:
    for host in ("evil.example", "evil.example:8700", "127.0.0.1.evil.example", "", "localhost@evil.example"):
        answer = open_site.get("/documents", headers={"Host": host})
        assert answer.status_code == 421, host
        assert set(open_site.get("/readyz", headers={"Host": host}).json()) == {"ready"}
        assert open_site.get("/metrics", headers={"Host": host}).status_code == 421
    assert open_site.get("/documents", headers={"Host": "localhost:1234"}).status_code == 200


def test_in_read_only_mode_no_form_is_offered_and_none_is_taken(settings: Settings, conn: psycopg.Connection, tmp_path: Path) -> None:
    number = failed_document(conn, "a")
    with served(tmp_path / "serve.log", SERVE_READ_ONLY="true") as address, client(address) as visitor:
        assert "<button" not in visitor.get(f"/dead-letter?id={number}").text.partition("<main")[2].partition("</main>")[0]
        assert letters_on(visitor.get("/dead-letters").text) == []
        token = form_token(visitor.get("/dead-letters").text)
        answer = visitor.post("/dead-letters/resolve", data={"action": "requeue", "id": str(number), "csrf": token})
        assert answer.status_code == 403
        assert "SERVE_READ_ONLY" in answer.text
    assert state_of(conn, "a") == ("failed", None)


@pytest.mark.parametrize("arguments", [["--host", "0.0.0.0"], ["--host", "::"]])
def test_it_refuses_to_serve_other_machines_without_a_token(settings: Settings, tmp_path: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "jobs.cli", "serve", "--port", "0", *arguments]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "SERVE_TOKEN is not set" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_named(open_site: httpx2.Client) -> None:
    port = str(open_site.base_url.port)
    command = [sys.executable, "-m", "jobs.cli", "serve", "--port", port]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert f"SERVE_PORT={port}" in done.stderr


@pytest.mark.parametrize("read_only", [False, True])
def test_with_no_worker_left_the_server_tells_of_it_unless_it_only_shows(
    settings: Settings, conn: psycopg.Connection, tmp_path: Path, read_only: bool
) -> None:
    conn.execute("UPDATE alert_rules SET threshold = 0, for_seconds = 0 WHERE rule = 'no_worker'")
    conn.execute("SELECT submit_document('uploads/a', doc_id => 'a', content_sha256 => repeat('1', 64))")
    log = tmp_path / "serve.log"
    with served(log, SERVE_READ_ONLY=str(read_only)) as address, client(address) as visitor:
        if read_only:
            assert visitor.get("/readyz").status_code == 503
            assert conn.execute("SELECT count(*) FROM alerts").fetchone() == (0,)
            return
        wait_for(lambda: conn.execute("SELECT kind FROM alerts").fetchall() == [("no_worker",)], f"an alert; see {log}")
        wait_for(lambda: "Alert no_worker: documents wait in queue cpu" in log.read_text(), f"a line in {log}")
