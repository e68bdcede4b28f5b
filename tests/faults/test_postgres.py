"""Trouble with Postgres: restarts, crashes, outages, freezes, cut connections, and what it refuses at a checkpoint."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psycopg
import pytest

from tests.faults.cluster import Cluster, Wire, has_root
from tests.faults.harness import Arena, Reference, Worker, documents, every

PLACES = ["stage_done:embed", "in_checkpoint:complete", "before_acknowledge", "committed:complete"]
LISTENERS = """SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND (query ILIKE 'listen%%' OR query = 'SELECT 1')"""
"""Listening connections; one that has heard nothing for half a minute asks whether it is still there."""


def outage(cluster: Cluster, how: str) -> None:
    match how:
        case "fast restart" | "immediate crash":
            cluster.restart(how.split(maxsplit=1)[0])
        case "power cut":
            cluster.kill()
            cluster.start()
        case "freeze":
            cluster.freeze()
            time.sleep(4)
            cluster.thaw()
        case _:
            cluster.restart("fast", away=float(how.split(maxsplit=1)[0]))


PICK_UP = """SELECT round(extract(epoch FROM percentile_cont(0.5) WITHIN GROUP (ORDER BY processing_started_at - created_at)) * 1000)::int
    FROM file_extractions WHERE doc_id LIKE 'later%%'"""


def is_complete(arena: Arena, doc_id: str) -> bool:
    return bool(arena.one("SELECT state FROM file_extractions WHERE doc_id = %s", doc_id) == "complete")


def pick_up_works(arena: Arena, workers: list[Worker]) -> int:
    """A worker listens again and takes up what is submitted now; return the median wait until it did, in milliseconds."""
    arena.wait(lambda: arena.one(LISTENERS) >= len(workers), "every listener to be back", 60)
    for number in range(5):
        arena.submit({f"later{number}": f"# Later {number}\n\nSubmitted after the trouble.".encode()})
        arena.wait(partial(is_complete, arena, f"later{number}"), "a late document", 25)
    return int(arena.one(PICK_UP))


@pytest.mark.parametrize("how", ["fast restart", "immediate crash", "power cut", "freeze", "8 s outage", "60 s outage"])
def test_workers_outlive_trouble_with_postgres_untouched(arena: Arena, how: str) -> None:
    wanted = documents(20)
    arena.submit(wanted)
    faults = [f"sleep:3@{place};doc={doc};once={arena.mark(doc)}" for place, doc in zip(PLACES, list(wanted)[2:], strict=False)]
    workers = [arena.worker(faults=faults), arena.worker(faults=faults)]
    arena.wait(lambda: len(arena.marks()) >= 2, "documents in mid-stage and at the finish")
    outage(arena.cluster, how)
    arena.fault()
    arena.settle(120)
    pick_up_works(arena, workers)
    arena.settle()
    assert all(worker.alive() for worker in workers), [worker.exits for worker in workers]
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    arena.judge("4 Postgres away", f"{how} in mid-stage and at the finish")


def test_a_worker_that_starts_while_postgres_restarts_comes_up(arena: Arena) -> None:
    arena.submit(documents(10))
    arena.cluster.stop("fast")
    arena.fault()
    try:
        worker = arena.worker()
        time.sleep(2)
    finally:
        arena.cluster.start()
    arena.settle()
    assert worker.alive(), worker.exits
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    arena.judge("4 Postgres away", "while a worker starts")


def terminate_others(arena: Arena) -> None:
    with arena.connect() as conn:
        conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    arena.fault()


@pytest.mark.parametrize("seconds", [5, 30])
def test_a_storm_of_terminated_backends_loses_nothing_and_listening_comes_back(arena: Arena, seconds: int) -> None:
    wanted = documents(10 * seconds)
    arena.submit(wanted)
    # Who does not listen looks for work no sooner than this: longer than the late documents are waited for.
    workers = [arena.worker(WORKER_POLL_SECONDS="30") for _ in range(2)]
    arena.wait(lambda: arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'queued'") > 0, "the first claim")
    with every(0.3, lambda: terminate_others(arena)):
        time.sleep(seconds)
    arena.settle(240)
    waited = pick_up_works(arena, workers)
    arena.settle()
    assert all(worker.alive() for worker in workers), [worker.exits for worker in workers]
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    did = f"all backends terminated every 0.3 s for {seconds} s, listeners included; picked up after {waited} ms by notification alone"
    arena.judge("5 storm of pg_terminate_backend", did)


def test_a_lease_connection_that_hangs_costs_no_document_and_no_patience(arena: Arena) -> None:
    with Wire(arena.cluster.port) as wire:
        url = arena.cluster.conninfo(arena.database, wire.port)
        worker = arena.worker(restart=True, DATABASE_URL=url, WATCHDOG_SECONDS="3")
        arena.wait(lambda: arena.one("SELECT count(*) FROM worker_registry") == 1, "the worker's heartbeat")
        port = arena.one("SELECT client_port FROM pg_stat_activity WHERE query LIKE '%%worker_registry%%' AND pid <> pg_backend_pid()")
        wire.freeze(port)
        arena.fault()
        arena.submit(documents(10))
        arena.settle(60)
        arena.wait(
            lambda: arena.one("SELECT heartbeat_at > now() - interval '1 s' FROM worker_registry ORDER BY 1 DESC LIMIT 1"), "a heartbeat"
        )
        assert worker.alive()
    arena.judge("4 Postgres away", "the connection that renews leases hangs without being closed")


def refusing(arena: Arena, refusal: str) -> list[str]:
    """Faults that make the database refuse checkpoints of every kind, a few times in each of several documents."""
    return [
        f"raise:{refusal}@in_checkpoint:{milestone};doc=d000{number};once={arena.mark(f'{refusal}-{number}')};times={2 + number}"
        for number, milestone in enumerate(["complete", "complete", "chunks_stored", "*"])
    ]


@pytest.mark.parametrize("refusal", ["57014", "55P03", "40P01", "40001", "53100"])
def test_a_refused_checkpoint_is_written_in_the_end(arena: Arena, refusal: str) -> None:
    arena.submit(documents(10))
    arena.worker(faults=refusing(arena, refusal), CHECKPOINT_SECONDS="0")
    arena.settle(60)
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    arena.judge("10 refused checkpoints", f"SQLSTATE {refusal} raised in the checkpoint, repeatedly")


@pytest.mark.parametrize("refusal", ["53100", "57014"])
def test_a_refusal_that_lasts_is_not_taken_for_a_crash(arena: Arena, refusal: str) -> None:
    arena.submit(documents(6))
    marks = arena.mark("lasting")
    tries = "0" if refusal == "53100" else "100"  # a full disk counts as no attempt
    arena.worker(faults=[f"raise:{refusal}@in_checkpoint:*;doc=d000[0-2];once={marks};times=30"], MAX_RETRY_ATTEMPTS=tries)
    arena.settle(180)
    assert arena.all("SELECT doc_id, error_message FROM file_extractions WHERE state <> 'complete'") == []
    assert arena.one("SELECT count(*) FROM document_events WHERE event = 'rescued'") == 0
    arena.judge("10 refused checkpoints", f"SQLSTATE {refusal} for three documents, 30 times")


@pytest.mark.parametrize("limit", ["statement_timeout", "lock_timeout"])
def test_a_checkpoint_behind_somebodys_lock_runs_into_the_limit_and_is_written_later(arena: Arena, limit: str) -> None:
    with arena.connect() as conn:
        conn.execute(f"ALTER DATABASE {arena.database} SET {limit} = '300ms'")
    arena.submit(documents(10))
    arena.worker(faults=[f"sleep:1@before_checkpoint:complete;doc=d0003;once={arena.mark('d0003')}"])
    arena.wait(lambda: len(arena.marks()) == 1, "the document to come to its checkpoint")
    job = arena.one("SELECT claim_job_id FROM file_extractions WHERE doc_id = 'd0003'")
    with arena.connect() as conn, conn.transaction():
        conn.execute("SELECT FROM procrastinate_jobs WHERE id = %s FOR UPDATE", [job])
        arena.fault()
        time.sleep(6)
    arena.settle(90)
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    arena.judge("10 refused checkpoints", f"a real {limit} behind a lock held for 6 s")


def test_a_deadlock_with_a_checkpoint_passes(arena: Arena) -> None:
    arena.submit(documents(6))
    arena.worker(faults=[f"sleep:1@before_checkpoint:complete;doc=d0003;once={arena.mark('d0003')}"])
    arena.wait(lambda: len(arena.marks()) == 1, "the document to come to its checkpoint")
    job = arena.one("SELECT claim_job_id FROM file_extractions WHERE doc_id = 'd0003'")
    try:
        with arena.connect() as conn, conn.transaction():
            conn.execute("SET LOCAL deadlock_timeout = '1min'")  # so that the checkpoint is the one that is told
            conn.execute("SELECT FROM procrastinate_jobs WHERE id = %s FOR UPDATE", [job])
            arena.wait(
                lambda: (
                    arena.one("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()") > 0
                ),
                "the checkpoint to wait for the job",
            )
            conn.execute("SELECT FROM file_extractions WHERE doc_id = 'd0003' FOR UPDATE")
    except psycopg.errors.DeadlockDetected:
        pass
    arena.fault()
    arena.settle(60)
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    arena.judge("10 refused checkpoints", "a real deadlock between a checkpoint and another transaction")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = Path("/tmp") / f"docmill-disk-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    if (
        not has_root()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=220m", "tmpfs", folder], check=False, capture_output=True).returncode
    ):
        pytest.skip("only root may mount a small disk")
    yield folder / "data"
    subprocess.run(["umount", "-l", folder], check=False)
    folder.rmdir()


@pytest.fixture
def small_cluster(small_disk: Path) -> Iterator[Cluster]:
    cluster = Cluster(small_disk, max_wal_size="32MB", min_wal_size="32MB", wal_recycle="off")
    yield cluster
    cluster.close()


def fill(disk: Path) -> Callable[[], object]:
    """Take all the space there is; the returned function gives it back."""
    hog = disk / "hog"
    with contextlib.suppress(OSError), hog.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 100_000)
    return hog.unlink


@pytest.mark.parametrize("seconds", [8, 40])
def test_a_full_disk_costs_time_and_nothing_else(
    small_cluster: Cluster, reference: Reference, mode: str, tmp_path: Path, seconds: int
) -> None:
    with Arena(small_cluster, tmp_path / "arena", reference, mode) as arena:
        arena.submit(documents(40))
        worker = arena.worker(faults=["sleep:0.3@stage_done:parse"])
        arena.wait(lambda: arena.one("SELECT count(*) FROM file_extractions WHERE state = 'complete'") > 2, "the first documents")
        give_back = fill(small_cluster.folder)
        time.sleep(seconds)
        give_back()
        arena.fault()
        if not small_cluster.running():  # without room for its journal Postgres panics and may not come up by itself
            small_cluster.start()
        arena.settle(240)
        assert worker.alive(), worker.exits
        assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
        arena.judge("10 refused checkpoints", f"the disk of the database full for {seconds} s")


@pytest.fixture
def small_tablespace(cluster: Cluster, small_disk: Path) -> Iterator[str]:
    """A tablespace of the cluster on a disk of its own."""
    small_disk.mkdir()
    shutil.chown(small_disk, cluster.system_user or os.getuid())
    with psycopg.connect(cluster.conninfo(), autocommit=True) as conn:
        conn.execute(f"CREATE TABLESPACE small LOCATION '{small_disk}'")
        yield "small"
        conn.execute("DROP TABLESPACE small")


LEAST_TRIES = """SELECT min((SELECT count(*) FROM document_events e WHERE e.doc_id = d.doc_id AND e.event = 'retry_scheduled'))
    FROM file_extractions d"""


def test_a_disk_with_room_for_claims_and_failures_but_not_for_passages_makes_no_dead_letters(
    small_tablespace: str, small_disk: Path, arena: Arena
) -> None:
    """As where rows have gone, so that pages of small tables have room, and none can be added to the largest."""
    with arena.connect() as conn:
        conn.execute(f"ALTER TABLE document_chunks SET TABLESPACE {small_tablespace}")
    give_back = fill(small_disk)
    arena.submit(documents(6))
    worker = arena.worker(MAX_RETRY_ATTEMPTS="1")
    arena.wait(lambda: arena.one(LEAST_TRIES) > 2, "more tries of each document than may count")
    give_back()
    arena.fault()
    arena.settle(60)
    assert worker.alive(), worker.exits
    assert arena.all("SELECT doc_id, error_message FROM file_extractions WHERE state <> 'complete'") == []
    assert arena.one("SELECT count(*) FROM document_events WHERE detail->>'counts' = 'true'") == 0
    arena.judge("10 refused checkpoints", "no room for passages on a full disk, and for all else enough")


def test_a_worker_stuck_in_its_event_loop_ends_itself_so_that_a_supervisor_can_act(arena: Arena) -> None:
    arena.submit(documents(6))
    worker = arena.worker(
        faults=[f"block:60@stage_started:chunk;doc=d0003;once={arena.mark('d0003')}"],
        restart=True,
        WATCHDOG_SECONDS="2",
        STAGE_TIMEOUT_SECONDS="5",
    )
    arena.settle(90)
    assert worker.exits == [70]
    arena.judge("4 Postgres away", "an event loop blocked for good; the watchdog ends the worker")


def test_a_worker_waits_for_a_database_that_is_not_there_yet(arena: Arena) -> None:
    arena.submit(documents(3))
    arena.cluster.stop()
    worker = arena.worker(restart=True)
    time.sleep(3)
    arena.cluster.start()
    arena.fault()
    arena.settle(60)
    assert signal.SIGKILL not in worker.exits
    arena.judge("4 Postgres away", "workers started before the database (their supervisor starts them again)")
