"""What one Postgres is asked for by many workers: connections, commits and queries while idle, with a transaction pooler and without.

Usage: python -m bench.pooling [--documents 200] [--rounds 3] [--idle 1,4,10] [--seconds 20]

1. Documents per second of two workers over TCP, straight and through PgBouncer in transaction mode, and connections of the server in use.
2. What idle workers cost the server: transactions a second, its CPU, connections, each with so many workers.
3. Commits a second of small transactions by 1, 4 and 16 clients (pgbench, fsync on): the ceiling of one primary on this disk.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from bench.cpu import cpu_seconds
from bench.running import end_cleanly, small_documents, submit_all, wait_until_ended, workers
from models.settings import Settings
from tests.faults.cluster import Cluster
from tests.servers import pgbouncer

CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
WRITTEN = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint"  # transactions and savepoints that wrote something
TRANSACTIONS = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"


@contextmanager
def way(cluster: Cluster, database: str, pooled: bool) -> Iterator[tuple[dict[str, str], list[int]]]:
    """Yield the settings of a way to the database, and the process ids of what stands in it."""
    if not pooled:
        yield {"database_url": cluster.conninfo(database)}, []
        return
    with pgbouncer.PgBouncer(cluster.conninfo(database), system_user=cluster.system_user, connections=8) as pooler:
        yield {"database_url": pooler.transaction(), "database_url_direct": pooler.session()}, [pooler.pid]


def one(cluster: Cluster, database: str, question: str) -> float:
    with psycopg.connect(cluster.conninfo(database), autocommit=True) as conn:
        row = conn.execute(question.encode()).fetchone()
    return float(row[0]) if row else 0.0


@contextmanager
def running(cluster: Cluster, folder: Path, pooled: bool, count: int) -> Iterator[tuple[str, Settings, list[int]]]:
    """Yield a new database with so many workers that are up, the settings of a submitter beside the pooler, and all process ids."""
    database = cluster.create_database()
    common: dict[str, str] = {"storage_base_path": str(folder / database), "log_level": "ERROR", "embedding_provider": "hash"}
    with way(cluster, database, pooled) as (urls, pids):
        settings = Settings(**common, **urls)  # type: ignore[arg-type]  # pydantic reads strings
        with workers(settings, count) as started:
            while one(cluster, database, "SELECT count(*) FROM worker_registry") < count:
                time.sleep(0.1)
            all_of_it = [cluster.processes()[0], *pids, *(process.pid for process in started)]
            yield database, Settings(**common, database_url=cluster.conninfo(database)), all_of_it  # type: ignore[arg-type]  # pydantic reads strings
    cluster.drop_database(database)


def throughput(cluster: Cluster, folder: Path, paths: list[Path], pooled: bool) -> tuple[float, float, float, float]:
    """Return documents a second of two workers, milliseconds of CPU of all together and writing transactions a document, and the most
    connections that were seen."""
    with running(cluster, folder, pooled, 2) as (database, settings, pids):
        most, over = [0.0], threading.Event()

        def watch() -> None:
            while not over.wait(0.2):
                most.append(one(cluster, database, CONNECTIONS + " AND application_name LIKE 'docmill%'"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        written, cpu = one(cluster, database, WRITTEN), cpu_seconds(*pids)
        started = time.perf_counter()
        asyncio.run(submit_all(settings, paths))
        took = wait_until_ended(settings, len(paths), started)
        written, cpu = one(cluster, database, WRITTEN) - written, cpu_seconds(*pids) - cpu
        over.set()
        watcher.join()
    return len(paths) / took, 1000 * cpu / len(paths), written / len(paths), max(most)


def idle(cluster: Cluster, folder: Path, pooled: bool, count: int, seconds: float) -> tuple[float, float, float]:
    """Return transactions a second, percent of one core, and connections, of so many workers with nothing to do."""
    with running(cluster, folder, pooled, count) as (database, *_):
        time.sleep(5)
        before, cpu = one(cluster, database, TRANSACTIONS), cpu_seconds(cluster.processes()[0])
        time.sleep(seconds)
        done, used = one(cluster, database, TRANSACTIONS) - before, cpu_seconds(cluster.processes()[0]) - cpu
        return done / seconds, 100 * used / seconds, one(cluster, database, CONNECTIONS)


def commits(cluster: Cluster, folder: Path, clients: int, seconds: int) -> float:
    """Return small durable transactions a second."""
    database, script = cluster.create_database("template1"), folder / "commit.sql"
    with psycopg.connect(cluster.conninfo(database), autocommit=True) as conn:
        conn.execute("CREATE TABLE committed (id bigint GENERATED ALWAYS AS IDENTITY, text text)")
    script.write_text("INSERT INTO committed (text) VALUES (repeat('x', 500));\n")
    command = [str(cluster.bin_path / "pgbench"), "-n", "-f", str(script), "-c", str(clients), "-j", "2", "-T", str(seconds)]
    said = subprocess.run([*command, cluster.conninfo(database)], capture_output=True, text=True, check=True).stdout
    cluster.drop_database(database)
    found = re.search(r"tps = ([\d.]+)", said)
    assert found is not None, said
    return float(found[1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle", default="1,4,10")
    parser.add_argument("--seconds", type=int, default=20)
    given = parser.parse_args()
    end_cleanly()
    if reason := pgbouncer.missing():
        print(f"Not measured: {reason}.")
        return
    cluster = Cluster(shared_buffers="256MB", max_wal_size="1GB")
    try:
        with tempfile.TemporaryDirectory(prefix="docmill-bench-") as scratch:
            folder = Path(scratch)
            paths = small_documents(folder / "documents", given.documents)
            found: dict[bool, list[tuple[float, float, float, float]]] = {False: [], True: []}
            for number in range(given.rounds):
                for pooled in (False, True) if number % 2 == 0 else (True, False):
                    found[pooled].append(throughput(cluster, folder, paths, pooled))
                    print(f"round {number + 1}: pooled {pooled} {found[pooled][-1]}", file=sys.stderr, flush=True)
            print("| two workers | documents/s | CPU ms | writing transactions a document | connections of the server, at most |")
            print("|---|---|---|---|---|")
            for pooled, rounds in found.items():
                *columns, most = (list(column) for column in zip(*rounds, strict=True))
                cells = " | ".join(f"{statistics.median(column):.1f}" for column in columns)
                print(f"| {'through the pooler (8 to share)' if pooled else 'straight'} | {cells} | {max(most):.0f} |", flush=True)
            print("\n| idle workers | transactions/s | server, % of a core | connections |\n|---|---|---|---|")
            for count in map(int, given.idle.split(",")):
                for pooled in (False, True):
                    rate, cpu, connections = idle(cluster, folder, pooled, count, given.seconds)
                    print(f"| {count}{', pooled' if pooled else ''} | {rate:.1f} | {cpu:.1f} | {connections:.0f} |", flush=True)
            print("\n| clients | commits/s |\n|---|---|")
            for clients in (1, 4, 16):
                print(f"| {clients} | {commits(cluster, folder, clients, 10):.0f} |", flush=True)
    finally:
        cluster.close()


if __name__ == "__main__":
    main()
