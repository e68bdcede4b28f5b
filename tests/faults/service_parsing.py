"""Parsing by a service that fails while it has jobs under way: what was sent, what has been paid for, and what came of it."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from tests.faults.services import Service
from tests.servers import LlamaParseServer, LocalServer

BEFORE, MEANWHILE = 6, 10
"""Files that are sent before it goes away, and files that come while it is away."""
AFTER = 4
"""Files that come when it is well again."""
SAID = """SELECT d.doc_id, d.parse_metadata->>'parsed_locally', e.detail->>'parsed_locally'
    FROM document_markdown AS d JOIN document_events AS e ON e.doc_id = d.doc_id AND e.stage = 'parse' AND e.event = 'stage_completed'
    WHERE NOT starts_with(d.parser, 'llamaparse ')"""


def uploads(server: LocalServer) -> Counter[str]:
    """Return how often each file was sent and taken, by its first page."""
    assert isinstance(server, LlamaParseServer)
    return Counter(job.pages[0] for job in server.jobs.values())


def states(outside: Service, doc_ids: set[str]) -> set[str]:
    return {row[0] for row in outside.arena.all("SELECT state::text FROM file_extractions WHERE doc_id = ANY(%s)", list(doc_ids))}


def have_jobs_under_way(outside: Service, trusting: Path | None = None) -> LlamaParseServer:
    """Submit BEFORE files and start workers; once all files are sent and the ids of their jobs stored, return the server.

    The jobs go on for an hour, or until `finish_jobs`. `trusting` is a certificate authority that the workers know.
    """
    server = outside.server
    assert isinstance(server, LlamaParseServer)
    server.seconds = 3600
    outside.submit(BEFORE)
    trust = {"SSL_CERT_FILE": str(trusting)} if trusting else {}
    outside.work(2, WORKER_CONCURRENCY=str(BEFORE), **trust)
    outside.arena.wait(lambda: outside.arena.one("SELECT count(*) FROM hosted_jobs") == BEFORE, "all files to be sent")
    return server


def finish_jobs(server: LlamaParseServer) -> None:
    """Have the jobs that are under way done, and others at once: at the service work goes on, which only does not answer.

    Not before those are answered who asked before it failed, unless it lets them hang: they would be told that their job is done.
    """
    until = time.monotonic() + 1
    while server.tally.in_flight and time.monotonic() < until:
        time.sleep(0.001)
    for job in server.jobs.values():
        job.ready_at = 0
    server.seconds = 0


def meet_new_files(outside: Service, server: LlamaParseServer) -> set[str]:
    """Have new files come while the service is of no use; return them once they are all parsed here, and those sent before wait."""
    paid_for = set(outside.documents)
    finish_jobs(server)
    outside.submit(MEANWHILE)
    new = set(outside.documents) - paid_for
    outside.hold(lambda: states(outside, new) == {"complete"}, "new files to be parsed here", 120)
    before = states(outside, paid_for)
    assert before <= {"retrying", "working", "queued"}, before
    assert outside.parsed_there() == 0
    return new


def well_again(outside: Service) -> None:
    """Be well, and have files come that show it, at the time of the next try."""
    if outside.recovered is None:
        outside.recover()
    outside.arena.wait(lambda: outside.arena.one("SELECT coalesce(max(try_at) < now(), true) FROM circuit_breakers"), "the time to probe")
    outside.submit(AFTER)
    outside.arena.settle(240)
