"""LlamaParse that no connection reaches: paid jobs wait, whoever is new is parsed here, and nothing counts against a document."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.faults.harness import Arena
from tests.faults.service_checks import check_all_right, check_books
from tests.faults.service_parsing import BEFORE, MEANWHILE, SAID, have_jobs_under_way, meet_new_files, uploads, well_again
from tests.faults.services import SPENT, Service, service
from tests.servers import Authority, LlamaParseServer, blackhole, names

PAUSED = {"BREAKER_OPEN_SECONDS": "6", "BREAKER_MAX_OPEN_SECONDS": "6"}
"""Longer than a call may wait with its document in hand, as by default."""


def fail_in_vain(outside: Service, server: LlamaParseServer) -> set[str]:
    """Have new files come while nobody reaches it; return them once they are all parsed here, and those sent before wait."""
    heard = server.tally.requests
    new = meet_new_files(outside, server)
    assert server.tally.requests == heard
    return new


def judge(outside: Service, new: set[str], name: str, did: str) -> None:
    well_again(outside)
    line = outside.report(name, f"{did}; {BEFORE} jobs under way, {MEANWHILE} new files parsed here meanwhile")
    check_all_right(outside)
    check_books(outside, "failed", unheard=True)
    sent = uploads(outside.server)
    assert max(sent.values()) == 1, sent
    assert outside.parsed_there() >= BEFORE
    assert {doc_id for doc_id, *_ in outside.arena.all(SAID)} >= new
    assert (line["attempts"], line["dead_letters"], outside.arena.one(SPENT)) == (0, 0, 0)
    assert outside.breaker()[0] == "closed"
    assert line["stampede"] <= 10


def test_paid_jobs_outlast_a_host_that_takes_no_connection(arena: Arena) -> None:
    with service(arena, "parse", {**PAUSED, "PROVIDER_CONNECT_SECONDS": "0.3"}) as outside:
        server = have_jobs_under_way(outside)
        server.__exit__()
        with blackhole(urlsplit(server.root).port or 0):
            new = fail_in_vain(outside, server)
        outside.start()
        outside.recover()
        judge(outside, new, "hang at connect", "the host drops what is sent to it, then is back")


def test_paid_jobs_outlast_a_name_that_does_not_resolve(arena: Arena, tmp_path: Path) -> None:
    if why := names.missing():
        pytest.skip(why)
    with service(arena, "parse", PAUSED) as outside:
        known = names.Names(tmp_path / "hosts")
        known.know("docmill-parsing.invalid")
        outside.on = known
        outside.configure(f"http://docmill-parsing.invalid:{urlsplit(outside.server.root).port}")
        server = have_jobs_under_way(outside)
        known.forget()
        server.__exit__()  # connections that stand need no name
        outside.start()
        new = fail_in_vain(outside, server)
        known.know("docmill-parsing.invalid")
        outside.recover()
        judge(outside, new, "DNS failure", "its name does not resolve, then does again")


def test_paid_jobs_outlast_a_certificate_that_is_not_trusted(arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    authority = Authority(tmp_path)
    with service(arena, "parse", PAUSED, tls=authority.server_context) as outside:
        server = have_jobs_under_way(outside, authority.file)
        outside.work_anew()
        new = fail_in_vain(outside, server)
        outside.recover()
        outside.work_anew(SSL_CERT_FILE=str(authority.file))
        judge(outside, new, "certificate error", "a CA that workers started anew do not know; SSL_CERT_FILE names it, workers started anew")
