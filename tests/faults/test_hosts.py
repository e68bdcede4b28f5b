"""Two hosts that share a disk and reach Postgres over the network alone, with TLS and a password; one of them is cut off for a while."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.cluster import Cluster
from tests.faults.harness import Arena, Worker, documents
from tests.servers import hosts, pgbouncer
from tests.servers.hosts import Host, address_of
from tests.servers.tls import Authority

PLACES = ["stage_started:parse", "stage_done:embed", "before_checkpoint:complete", "in_checkpoint:complete", "committed:complete"]
TOOK_PART = "SELECT count(DISTINCT worker) FROM document_events WHERE event = 'completed' AND doc_id LIKE 'late%%'"


@dataclass
class Network:
    """Two hosts, and the way of each to the database."""

    arena: Arena
    pooler: pgbouncer.PgBouncer
    hosts: tuple[Host, Host]

    def worker(self, number: int, faults: tuple[str, ...] | list[str] = ()) -> Worker:
        """A worker on a host; in the mode `queue` through a transaction pooler, with a way around it."""
        address = self.hosts[number].address
        ways = {"DATABASE_URL": self.pooler.session(address)}
        if self.arena.mode == "queue":
            ways = {"DATABASE_URL": self.pooler.transaction(address), "DATABASE_URL_DIRECT": self.pooler.session(address)}
        return self.arena.worker_on(self.hosts[number], faults=faults, restart=False, WORKER_CONCURRENCY="4", **ways)


@pytest.fixture
def network(arena: Arena, tmp_path: Path) -> Iterator[Network]:
    if reason := pgbouncer.missing() or hosts.missing():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(Host(0)), stack.enter_context(Host(1))
        authority = Authority(tmp_path, *(address_of(number) for number in range(2)))
        cluster: Cluster = arena.cluster
        pooler = stack.enter_context(
            pgbouncer.PgBouncer(
                cluster.conninfo(arena.database),
                system_user=cluster.system_user,
                connections=20,
                authority=authority,
                address=made[0].address,
            )
        )
        yield Network(arena, pooler, made)


def both_work(arena: Arena) -> None:
    """Of documents that are submitted now, a few at a time, each host completes some before long."""
    rounds = iter(range(40))

    def submitted_until_both_took_part() -> bool:
        arena.submit(documents(6, f"late{next(rounds)}-"))
        arena.settle(60)
        return bool(arena.one(TOOK_PART) == 2)

    arena.wait(submitted_until_both_took_part, "both hosts to complete documents", 120)


@pytest.mark.parametrize("away", ["until TCP gives up", "until its work is rescued"])
def test_a_host_that_is_cut_off_loses_nothing_and_works_again_by_itself(network: Network, away: str) -> None:
    arena, host = network.arena, network.hosts[1]
    wanted = documents(12, "cut")
    faults = [f"sleep:4@{place};doc={doc};once={arena.mark(doc)}" for place, doc in zip(PLACES, wanted, strict=False)]
    slow = "sleep:0.5@stage_done:parse;doc=late*"  # or one host is done with all before the other has fetched any
    cut = network.worker(1, [*faults, slow])
    arena.submit(wanted)
    arena.wait(lambda: len(arena.marks()) >= 3, "documents in mid-stage and at the finish on the host")
    host.pull_cable()
    arena.fault()
    stays = network.worker(0, [slow])
    arena.settle(60)
    rescued = arena.seconds_to_recover
    assert arena.one("SELECT count(*) FROM document_events WHERE event = 'rescued'") > 0
    if away == "until TCP gives up":
        time.sleep(35)  # tcp_user_timeout is 30 s
    host.plug_in()
    both_work(arena)
    arena.settle()
    assert cut.alive()
    assert stays.alive()
    assert (cut.exits, stays.exits) == ([], [])
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete' OR crash_count > 1") == 0
    arena.judge("16 two hosts", f"one of two hosts cut off, {away}; the other had ended its documents {rescued} s after the cut")
