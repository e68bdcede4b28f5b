"""The field that a scenario plays on: a database, documents, workers with faults in them, and the count at the end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psycopg

from jobs import submit_document
from models.settings import load_settings
from tests.faults.cluster import Cluster
from tests.faults.invariant import Rows, check_invariant, passages
from tests.running import REPOSITORY

QUICK = {
    "LEASE_SECONDS": "2", "RECONCILE_SECONDS": "0.2", "WORKER_POLL_SECONDS": "0.1", "EMBEDDING_PROVIDER": "hash",
    "RETRY_BASE_DELAY_SECONDS": "0.1", "RETRY_MAX_DELAY_SECONDS": "2", "PARSE_PROCESSES": "1", "SHUTDOWN_GRACE_SECONDS": "5",
}  # fmt: skip
WORDS = "pump valve pressure notice delivery penalty contract filter seal bearing inspection oil manual warranty invoice".split()  # noqa: SIM905
STILL_OPEN = """SELECT count(*) FROM file_extractions WHERE state IN ('queued', 'working', 'retrying')"""
LIVE_JOBS = """SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing') AND stage_queue(task_name) IS NOT NULL"""

SITUATION = """SELECT d.doc_id, d.milestone, d.state, d.claim, d.lease_until - now() AS lease, d.crash_count, d.lone_crash_count,
    d.requeue_count, d.retry_count, d.error_message, j.id, j.task_name, j.status, j.scheduled_at - now()
    FROM file_extractions d LEFT JOIN procrastinate_jobs j ON j.args->>'doc_id' = d.doc_id AND j.status IN ('todo', 'doing')
    WHERE d.state IN ('queued', 'working', 'retrying') OR j.id IS NOT NULL ORDER BY d.id, j.id LIMIT 20"""


def text_document(number: int, variant: int = 0, paragraphs: int = 6) -> bytes:
    """A small document of its own, the same in every run."""
    lines = [f"# Report {number}, edition {variant}"]
    for p in range(paragraphs):
        words = (WORDS[(number * 7 + variant * 3 + p * 5 + i * (number % 5 + 1)) % len(WORDS)] for i in range(60))
        lines += [f"## Section {p} of {number}", f"Paragraph {p} of report {number}.{variant}: {' '.join(words)}."]
    return "\n\n".join(lines).encode()


def documents(count: int, prefix: str = "d", variant: int = 0) -> dict[str, bytes]:
    """Documents of a series, whose contents no other series has: equals would wait for each other."""
    series = b"" if prefix == "d" else f"\n\nSeries {prefix}.".encode()
    return {f"{prefix}{number:04}": text_document(number, variant) + series for number in range(count)}


def samples() -> dict[str, bytes]:
    """Real files of several types; the name tells the type."""
    names = ("supply-contract.pdf", "warranty-policy.docx", "preisliste-2026.xlsx", "complaint-lot-2.eml", "onboarding-guide.md")
    return {name: (REPOSITORY / "samples" / name).read_bytes() for name in names}


class Place(Protocol):
    """Where a worker runs, if not simply here."""

    def command(self, *command: str) -> list[str]:
        """Return the command that runs another one there; the process id stays the same."""
        ...


class Worker:
    """A real `procrastinate worker`, started again by a supervisor if `restart` says so."""

    def __init__(self, log: Path, environment: dict[str, str], arguments: Iterable[str], *, restart: bool, on: Place | None = None) -> None:
        self.log = log
        self.exits: list[int] = []
        command = [sys.executable, "-m", "procrastinate", "--app=procrastinate_app.app", "worker", *arguments]
        self._command = command if on is None else on.command(*command)
        # Measuring coverage would nearly double their CPU, and who is killed does not even tell what it has covered.
        own = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS_")}
        self._environment = {**own, "PYTHONPATH": str(REPOSITORY), **environment}
        self._restart = restart
        self._lock = threading.Lock()
        self.process = self._spawn()
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._thread.start()

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as file:
            return subprocess.Popen(self._command, env=self._environment, stdout=file, stderr=file, start_new_session=True)

    def _supervise(self) -> None:
        while True:
            code = self.process.wait()
            # What a dead worker leaves behind: its parsing children end when their pipe does.
            with self._lock:
                self.exits.append(code)
                if not self._restart or self.refuses():
                    return
                self.process = self._spawn()

    def refuses(self) -> bool:
        """Whether it has ended again and again without having been killed: something is wrong with the scenario."""
        return self.exits[-5:] == [1] * 5

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def alive(self) -> bool:
        return self.process.poll() is None

    def wait(self, timeout: float = 60) -> int:
        """Wait until it has ended and return its exit code; not for one that is started again."""
        self._thread.join(timeout)
        assert not self._thread.is_alive(), f"the worker did not end within {timeout} s; see {self.log}"
        return self.exits[-1]

    def stopped(self) -> bool:
        """Whether SIGSTOP holds it."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0] == "T"
        return False

    def close(self) -> None:
        with self._lock:
            self._restart = False
        for number, patience in ((signal.SIGCONT, 0.0), (signal.SIGTERM, 15.0), (signal.SIGKILL, 15.0)):
            self.signal(number)
            self._thread.join(patience)
        assert not self._thread.is_alive()


@dataclass
class Reference:
    """What an uninterrupted run gives for a doc_id with a content, found out once by one undisturbed worker."""

    cluster: Cluster
    folder: Path
    rows: Rows = field(default_factory=dict)
    ahead: dict[str, bytes] = field(default_factory=lambda: documents(40))
    """What most scenarios ask for, found out with the first of them."""

    def of(self, wanted: dict[str, bytes]) -> Rows:
        missing = {doc_id: content for doc_id, content in wanted.items() if (doc_id, sha(content)) not in self.rows}
        if missing:
            missing, self.ahead = {**self.ahead, **missing}, {}
            with Arena(self.cluster, self.folder / f"reference{len(self.rows)}", self, "inline", check=False) as arena:
                arena.submit(missing)
                arena.worker()
                arena.settle(timeout=60 + len(missing))
                with arena.connect() as conn:
                    found = passages(conn)
            failed = [doc_id for doc_id, content in missing.items() if (doc_id, sha(content)) not in found]
            assert not failed, f"the undisturbed run did not complete {failed}"
            self.rows.update(found)
        return self.rows


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Arena:
    """One scenario in one mode: submits, starts workers, waits, and holds the result against the invariant."""

    def __init__(self, cluster: Cluster, folder: Path, reference: Reference, mode: str, *, check: bool = True) -> None:
        self.cluster, self.folder, self.mode = cluster, folder, mode
        self.faults = 0
        """Faults that the scenario itself injected; those taken by workers are counted from their marks."""
        self.did = ""
        self._reference, self._check = reference, check
        self._workers: list[Worker] = []
        self._accepted: dict[str, bytes] = {}
        self._contents: list[dict[str, bytes]] = []
        self._removed: set[str] = set()
        self._last_fault = 0.0
        self._recovered: float | None = None

    def __enter__(self) -> Arena:
        self.folder.mkdir(parents=True)
        self.database = self.cluster.create_database()
        self.environment = {
            **QUICK, "DATABASE_URL": self.cluster.conninfo(self.database), "STORAGE_BASE_PATH": str(self.folder / "storage"),
            "HANDOFF": self.mode,
        }  # fmt: skip
        self._before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        load_settings.cache_clear()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        for worker in self._workers:
            worker.close()
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        load_settings.cache_clear()
        if kind is None:
            self.cluster.drop_database(self.database)

    def connect(self) -> psycopg.Connection:
        return psycopg.connect(self.cluster.conninfo(self.database), autocommit=True)

    def one(self, statement: str, *args: object) -> Any:
        with self.connect() as conn:
            row = conn.execute(statement, args).fetchone()
        return None if row is None else row[0] if len(row) == 1 else tuple(row)

    def all(self, statement: str, *args: object) -> list[tuple[Any, ...]]:
        with self.connect() as conn:
            return [tuple(row) for row in conn.execute(statement, args).fetchall()]

    def submit(self, wanted: dict[str, bytes]) -> None:
        with self.connect() as conn:
            for doc_id, content in wanted.items():
                submit_document(content, doc_id=doc_id, file_name=name_of(doc_id), connection=conn)
        self.accepted(wanted)

    def accepted(self, *offers: dict[str, bytes]) -> None:
        """Note what must end well, and every content that it may end with, where the scenario submits by itself; b"": with none."""
        for offer in offers:
            self._accepted.update(offer)
            self._contents.append(offer)

    def removed(self, doc_ids: Iterable[str]) -> None:
        """Note that the scenario has deleted these, so that they must not be there at the end."""
        self._removed.update(doc_ids)
        for doc_id in doc_ids:
            self._accepted.pop(doc_id, None)

    def mark(self, name: str) -> str:
        """A file for the `once` of a fault."""
        return str(self.folder / f"mark-{name}")

    def worker(self, *arguments: str, faults: Iterable[str] = (), restart: bool = False, **environment: str) -> Worker:
        return self.worker_on(None, *arguments, faults=faults, restart=restart, **environment)

    def worker_on(
        self, host: Place | None, *arguments: str, faults: Iterable[str] = (), restart: bool = False, **environment: str
    ) -> Worker:
        given = {**self.environment, **environment, "DOCMILL_FAULTS": "\n".join(faults)}
        worker = Worker(self.folder / f"worker{len(self._workers)}.log", given, arguments, restart=restart, on=host)
        self._workers.append(worker)
        return worker

    def reconciler(self) -> Worker:
        """A worker that listens to a queue that nobody uses: it only reconciles, and is not hit by what hits the others."""
        return self.worker("-q", "nothing")

    def fault(self, count: int = 1) -> None:
        """Note that a fault has just been injected: recovery is timed from the last one."""
        self.faults += count
        self._last_fault = time.monotonic()

    def marks(self) -> list[float]:
        """When marked faults were taken, in seconds since the epoch."""
        return sorted(path.stat().st_mtime for path in self.folder.glob("mark-*"))

    def wait(self, condition: Callable[[], bool], what: str, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while True:
            with contextlib.suppress(psycopg.OperationalError):
                if condition():
                    return
            assert not any(worker.refuses() for worker in self._workers), f"a worker does not start; see {self.folder}"
            if time.monotonic() > end:
                raise AssertionError(f"waited {timeout} s in vain for {what}; see {self.folder}\n{self.situation()}")
            time.sleep(0.05)

    def situation(self) -> str:
        """What an onlooker needs to see why it does not end."""
        with contextlib.suppress(psycopg.OperationalError):
            return "\n".join(map(str, self.all(SITUATION)))
        return "the database does not answer"

    def settle(self, timeout: float = 90) -> None:
        """Wait until every document has ended and no job of theirs is left."""
        with contextlib.ExitStack() as stack:
            held: list[psycopg.Connection] = []

            def settled() -> bool:
                if not held or held[0].closed:
                    held[:] = [stack.enter_context(self.connect())]
                return all(held[0].execute(question).fetchone() == (0,) for question in (STILL_OPEN, LIVE_JOBS))

            self.wait(settled, "every document to end", timeout)
        since = self._last_fault
        if marks := self.marks():
            since = max(since, time.monotonic() - (time.time() - marks[-1]))
        self._recovered = time.monotonic() - since if since else None

    @property
    def seconds_to_recover(self) -> float | None:
        """From the last fault to the end of the last document."""
        return None if self._recovered is None else round(self._recovered, 1)

    def judge(self, scenario: str, did: str, *, compared: bool = True) -> None:
        """Hold the database against the invariant, say in a line what was done and found, and fail if anything is broken. Rows are compared
        with those of an undisturbed run, unless a service has made their vectors."""
        reference = self._reference.rows if compared else {}
        for offer in self._contents if compared else ():
            reference = self._reference.of({doc_id: content for doc_id, content in offer.items() if content})
        with self.connect() as conn:
            findings = check_invariant(conn, set(self._accepted), reference)
            back = conn.execute("SELECT doc_id FROM file_extractions WHERE doc_id = ANY(%s)", [list(self._removed - set(self._accepted))])
            if found := [row[0] for row in back.fetchall()]:
                findings.doubled["was deleted and has come back"] = found
            states: dict[str, int] = dict(conn.execute("SELECT state::text, count(*) FROM file_extractions GROUP BY 1").fetchall())
        line = {
            "scenario": scenario, "mode": self.mode, "did": did, "documents": len(self._accepted),
            "faults": self.faults + len(self.marks()), "lost": sum(map(len, findings.lost.values())),
            "doubled": sum(map(len, findings.doubled.values())),
            "recovered_s": self.seconds_to_recover, "states": states,
        }  # fmt: skip
        print(f"\nfaults: {json.dumps(line)}", flush=True)
        if report := os.environ.get("FAULTS_REPORT"):
            with Path(report).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        assert not findings, f"{findings}\nsee {self.folder}"


def name_of(doc_id: str) -> str:
    return doc_id if Path(doc_id).suffix else f"{doc_id}.md"


@contextlib.contextmanager
def every(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    """Do something again and again beside the scenario."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(seconds):
            action()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
