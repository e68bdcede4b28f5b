"""What one Postgres is asked for by many workers: connections, commits and queries while idle, with a transaction pooler and without.

Usage: python -m bench.pooling [--documents 200] [--rounds 3] [--idle 1,4,10] [--seconds 20]

1. Documents per second of two workers over TCP, straight and through PgBouncer in transaction mode, and connections of the server in use.
2. What idle workers cost the server: transactions a second, its CPU, connections, each with so many workers.
3. Commits a second of small transactions by 1, 4 and 16 clients (pgbench, fsync on): the ceiling of one primary on this disk.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
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

from bench.running import small_documents, submit_all, wait_until_ended, workers
from models.settings import Settings
from tests.faults.cluster import Cluster
from tests.servers import pgbouncer

CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
TRANSACTIONS = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"


@contextmanager
def way(cluster: Cluster, database: str, pooled: bool) -> Iterator[dict[str, str]]:
    """Yield the settings of a way to the database."""
    if not pooled:
        yield {"database_url": cluster.conninfo(database)}
        return
    with pgbouncer.PgBouncer(cluster.conninfo(database), system_user=cluster.system_user, connections=8) as pooler:
        yield {"database_url": pooler.transaction(), "database_url_direct": pooler.session()}


def one(cluster: Cluster, database: str, question: str) -> float:
    with psycopg.connect(cluster.conninfo(database), autocommit=True) as conn:
        row = conn.execute(question.encode()).fetchone()
    return float(row[0]) if row else 0.0


@contextmanager
def running(cluster: Cluster, folder: Path, pooled: bool, count: int) -> Iterator[tuple[str, Settings]]:
    """Yield a new database with so many workers that are up, and the settings of a submitter beside the pooler."""
    database = cluster.create_database()
    common: dict[str, str] = {"storage_base_path": str(folder / database), "log_level": "ERROR", "embedding_provider": "hash"}
    with way(cluster, database, pooled) as urls:
        settings = Settings(**common, **urls)  # type: ignore[arg-type]  # pydantic reads strings
        with workers(settings, count):
            while one(cluster, database, "SELECT count(*) FROM worker_registry") < count:
                time.sleep(0.1)
            yield database, Settings(**common, database_url=cluster.conninfo(database))  # type: ignore[arg-type]  # pydantic reads strings
    cluster.drop_database(database)


def throughput(cluster: Cluster, folder: Path, paths: list[Path], pooled: bool) -> tuple[float, float]:
    """Return documents a second of two workers, and the most connections that were seen."""
    with running(cluster, folder, pooled, 2) as (database, settings):
        most, over = [0.0], threading.Event()

        def watch() -> None:
            while not over.wait(0.2):
                most.append(one(cluster, database, CONNECTIONS + " AND application_name LIKE 'docmill%'"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        asyncio.run(submit_all(settings, paths))
        took = wait_until_ended(settings, len(paths), started)
        over.set()
        watcher.join()
    return len(paths) / took, max(most)


def server_cpu(cluster: Cluster) -> float:
    """Return the seconds of CPU that the server's processes have used so far, those that have ended included."""
    total = 0
    for pid in cluster.processes():
        with contextlib.suppress(FileNotFoundError):
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
            total += sum(int(fields[i]) for i in ((11, 12, 13, 14) if pid == cluster.processes()[0] else (11, 12)))
    return total / 100


def idle(cluster: Cluster, folder: Path, pooled: bool, count: int, seconds: float) -> tuple[float, float, float]:
    """Return transactions a second, percent of one core, and connections, of so many workers with nothing to do."""
    with running(cluster, folder, pooled, count) as (database, _):
        time.sleep(5)
        before, cpu = one(cluster, database, TRANSACTIONS), server_cpu(cluster)
        time.sleep(seconds)
        done, used = one(cluster, database, TRANSACTIONS) - before, server_cpu(cluster) - cpu
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
    if reason := pgbouncer.missing():
        print(f"Not measured: {reason}.")
        return
    cluster = Cluster(shared_buffers="256MB", max_wal_size="1GB")
    try:
        with tempfile.TemporaryDirectory(prefix="docmill-bench-") as scratch:
            folder = Path(scratch)
            paths = small_documents(folder / "documents", given.documents)
            found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
            for number in range(given.rounds):
                for pooled in (False, True) if number % 2 == 0 else (True, False):
                    found[pooled].append(throughput(cluster, folder, paths, pooled))
                    print(f"round {number + 1}: pooled {pooled} {found[pooled][-1]}", file=sys.stderr, flush=True)
            print("| two workers | documents/s | connections of the server, at most |\n|---|---|---|")
            for pooled, rounds in found.items():
                rate, most = statistics.median(r for r, _ in rounds), max(m for _, m in rounds)
                print(f"| {'through the pooler (8 to share)' if pooled else 'straight'} | {rate:.1f} | {most:.0f} |")
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
