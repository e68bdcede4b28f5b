"""Two worker hosts in network namespaces of their own, one Postgres over TCP with TLS and a password, one shared folder.

Usage: python -m bench.hosts [--documents 300] [--rounds 5] [--lease 60]

Documents per second of two hosts with one worker each beside one host with two, on the same cores; both through a transaction pooler;
and without any network, TLS or password (this machine's own address). Then one of two hosts is cut off in mid-work until the other has
done everything, and comes back: what was lost or doubled, and how long what it held had to wait. Needs root, iproute2 and pgbouncer,
which does the TLS, because the shipped Postgres is built without.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from bench.cpu import cpu_seconds
from bench.running import end_cleanly, environment, small_documents, submit_all, wait_until_ended
from models.settings import Settings
from tests.faults.cluster import Cluster
from tests.faults.invariant import check_invariant
from tests.servers import hosts, pgbouncer
from tests.servers.hosts import Host, address_of
from tests.servers.tls import Authority

COMMAND = [sys.executable, "-m", "procrastinate", "--app=procrastinate_app.app", "worker"]
WAYS = {
    "no network: 2 workers": ("direct", (None, None)),
    "1 host x 2 workers, TLS": ("session", (0, 0)),
    "2 hosts x 1 worker, TLS": ("session", (0, 1)),
    "2 hosts x 1 worker, TLS, transaction pooler": ("transaction", (0, 1)),
}


@dataclass
class Place:
    """A server, two hosts, and a folder that all share."""

    cluster: Cluster
    hosts: tuple[Host, Host]
    authority: Authority
    folder: Path
    pids: list[int] = field(default_factory=list)

    def settings(self, database: str, **changes: object) -> Settings:
        """Return the settings of this machine, which submits without the network."""
        quiet: dict[str, object] = {"log_level": "ERROR", "embedding_provider": "hash", **changes}
        return Settings(database_url=self.cluster.conninfo(database), storage_base_path=self.folder / database, **quiet)  # type: ignore[arg-type]  # pydantic reads strings

    @contextmanager
    def workers(self, settings: Settings, database: str, way: str, on: tuple[int | None, ...]) -> Iterator[list[subprocess.Popen[bytes]]]:
        """Yield workers that have registered; `on` says on which host each is. `self.pids`: of them, the server and the pooler."""
        with contextlib.ExitStack() as stack:
            conninfo = self.cluster.conninfo(database)
            user, address = self.cluster.system_user, self.hosts[0].address
            pooler = stack.enter_context(
                pgbouncer.PgBouncer(conninfo, system_user=user, connections=20, authority=self.authority, address=address)
            )
            started = []
            for number in on:
                env = environment(settings)
                if number is not None:
                    at = self.hosts[number].address
                    direct = pooler.session(at)
                    env |= (
                        {"DATABASE_URL": direct}
                        if way == "session"
                        else {"DATABASE_URL": pooler.transaction(at), "DATABASE_URL_DIRECT": direct}
                    )
                command = COMMAND if number is None else self.hosts[number].command(*COMMAND)
                started.append(subprocess.Popen(command, env=env, cwd=Path(__file__).parents[1]))
            try:
                self.until(database, "SELECT count(*) = %s FROM worker_registry", len(on))
                self.pids = [self.cluster.processes()[0], pooler.pid, *(process.pid for process in started)]
                yield started
            finally:
                for process in started:
                    process.terminate()
                for process in started:
                    process.wait(timeout=120)

    def until(self, database: str, question: str, *args: object, timeout: float = 300) -> None:
        """Wait until a question is answered with true."""
        end = time.perf_counter() + timeout
        with psycopg.connect(self.cluster.conninfo(database), autocommit=True) as conn:
            while conn.execute(question.encode(), args).fetchone() != (True,):
                if time.perf_counter() > end:
                    raise TimeoutError(f"waited {timeout} s for: {question} {args}")
                time.sleep(0.02)


@contextmanager
def place() -> Iterator[Place]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="docmill-bench-")))
        cluster = Cluster(shared_buffers="256MB", max_wal_size="1GB")
        stack.callback(cluster.close)
        made = stack.enter_context(Host(0)), stack.enter_context(Host(1))
        yield Place(cluster, made, Authority(folder, *(address_of(n) for n in range(2))), folder)


def throughput(at: Place, paths: list[Path], way: str, on: tuple[int | None, ...]) -> tuple[float, float]:
    """Return documents per second from the first submission to the last end, with workers that are up and have parsed something, and
    milliseconds of CPU a document of all workers, the server and the pooler together."""
    database = at.cluster.create_database()
    settings = at.settings(database)
    with at.workers(settings, database, way, on):
        warm = [at.folder / f"warm{number}.txt" for number in range(8)]
        for path in warm:
            path.write_text(f"warm up {path.name}")
        asyncio.run(submit_all(settings, warm))
        wait_until_ended(settings, len(warm), time.perf_counter())
        started, cpu = time.perf_counter(), cpu_seconds(*at.pids)
        asyncio.run(submit_all(settings, paths))
        took = wait_until_ended(settings, len(warm) + len(paths), started)
        cpu = cpu_seconds(*at.pids) - cpu
    at.cluster.drop_database(database)
    return len(paths) / took, 1000 * cpu / len(paths)


def cut_off(at: Place, paths: list[Path], lease: float) -> str:
    """Cut the second host off in mid-work, let the first one end everything, plug it in again, and say what was found."""
    database = at.cluster.create_database()
    settings = at.settings(database, lease_seconds=lease)
    mine = "FROM file_extractions WHERE claimed_by LIKE %s AND state = 'working'"
    with at.workers(settings, database, "session", (0, 1)) as (_, second):
        name = f"%:{second.pid}"
        asyncio.run(submit_all(settings, paths))
        at.until(database, f"SELECT count(*) > 1 {mine}", name)
        at.hosts[1].pull_cable()
        cut = time.perf_counter()
        with psycopg.connect(at.cluster.conninfo(database), autocommit=True) as conn:
            held = [row[0] for row in conn.execute(f"SELECT doc_id {mine}".encode(), [name]).fetchall()]
        at.until(
            database,
            "SELECT bool_and(claimed_by NOT LIKE %s OR state = 'complete') FROM file_extractions WHERE doc_id = ANY(%s)",
            name,
            held,
        )
        rescued = time.perf_counter() - cut
        at.until(database, "SELECT bool_and(state = 'complete') FROM file_extractions")
        ended = time.perf_counter() - cut
        at.hosts[1].plug_in()
        back = time.perf_counter()
        worked = "SELECT count(*) > 0 FROM document_events WHERE event = 'completed' AND worker LIKE %s AND at > %s::timestamptz"
        with psycopg.connect(at.cluster.conninfo(database), autocommit=True) as conn:
            (now,) = conn.execute("SELECT now()::text").fetchone() or ("",)
            while conn.execute(worked.encode(), [name, now]).fetchone() != (True,):
                more = at.folder / f"more{time.perf_counter_ns()}.txt"
                more.write_text(more.name * 300)
                asyncio.run(submit_all(settings, [more]))
                time.sleep(0.05)
            works = time.perf_counter() - back
            at.until(database, "SELECT bool_and(state = 'complete') FROM file_extractions")
            findings = check_invariant(conn, set(), {})
            count = (conn.execute("SELECT count(*) FROM file_extractions").fetchone() or (0,))[0]
        alive = second.poll() is None
    return (
        f"{len(held)} documents in the hands of the host that was cut off, lease {lease:g} s: all with the other after {rescued:.1f} s; "
        f"{len(paths)} documents ended {ended:.1f} s after the cut; back, it completed a document after {works:.1f} s, "
        f"the same process: {alive}. Of {count} documents lost: {sum(map(len, findings.lost.values()))}, "
        f"doubled: {sum(map(len, findings.doubled.values()))}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lease", type=float, default=60)
    given = parser.parse_args()
    end_cleanly()
    if reason := hosts.missing() or pgbouncer.missing():
        print(f"Not measured: {reason}.")
        return
    with place() as at:
        paths = small_documents(at.folder / "documents", given.documents)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
        for number in range(given.rounds):
            for name in list(WAYS) if number % 2 == 0 else list(WAYS)[::-1]:  # the machine's mood falls on all alike
                found[name].append(throughput(at, paths, *WAYS[name]))
                print(f"round {number + 1}: {name}: {found[name][-1]}", file=sys.stderr, flush=True)
        medians = {name: [statistics.median(column) for column in zip(*rounds, strict=True)] for name, rounds in found.items()}
        base = medians["1 host x 2 workers, TLS"]
        print("| what | documents/s | of one host with two | CPU ms a document | of one host with two |\n|---|---|---|---|---|")
        for name, (rate, cpu) in medians.items():
            print(f"| {name} | {rate:.1f} | {rate / base[0]:.2f} | {cpu:.1f} | {cpu / base[1]:.2f} |", flush=True)
        print("\n" + cut_off(at, paths, given.lease))


if __name__ == "__main__":
    main()
