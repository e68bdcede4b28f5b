"""24: everything that the public offers, at once: several who submit, cancel, delete and retry the same few names, beside real workers.

Each draws what it does from a seed; who comes first is up to the machine. Every call ends as its docstring says, also in transactions of
the caller's own and while workers and sessions die, no two single statements of docmill's SQL end in a deadlock, and what is there in the
end is whole.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest

import jobs
from jobs.front import close_async, close_sync
from models.errors import DocmillError
from tests.archives import zip_bytes
from tests.faults.harness import Arena, text_document

SCENARIO = "24 races"
CONTENTS = [*(text_document(number, paragraphs=2) for number in range(4)), b"\x00\x01\xff" * 40]
"""Few, so that they are equals and of each document a new version; the last one is no document and fails."""
NAMES = [f"d{number}" for number in range(5)]
BATCHES = ["b0", "b1"]
REFUSED = (
    psycopg.errors.NoDataFound,
    psycopg.errors.ObjectNotInPrerequisiteState,
    psycopg.errors.LockNotAvailable,
)
"""What the SQL functions say on purpose of one that is not there, is in another state, or is held for too long."""
CALLERS_OWN = (*REFUSED, psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure, psycopg.errors.InFailedSqlTransaction)
"""What whoever takes several locks in one transaction brings about himself."""
CUT_OFF: set[type[Exception]] = {psycopg.OperationalError, psycopg.errors.AdminShutdown}
"""What anybody sees whose connection the server has ended; not those that are special cases of it, as a deadlock is."""
LEVELS: list[LiteralString] = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
UNSETTLED = """SELECT batch_id, status FROM processing_jobs b WHERE settled_at IS NULL AND (sealed_at IS NOT NULL OR status = 'cancelled')
    OR EXISTS (SELECT FROM summaries_to_renew n WHERE n.batch_id = b.batch_id)"""
DISAGREE = """SELECT b.batch_id, b.status, v.status, r.success_count, s.success_count FROM processing_jobs b
    CROSS JOIN LATERAL run_verdict(b) v CROSS JOIN LATERAL build_run_summary(b.batch_id) s LEFT JOIN run_summaries r ON r.run_id = b.run_id
    WHERE b.settled_at IS NOT NULL AND (v.unfinished > 0 OR v.files = b.total_files AND (v.status <> b.status
        OR (r.success_count, r.error_count) IS DISTINCT FROM (s.success_count, s.error_count)))"""
FILES = """SELECT file_path FROM file_extractions WHERE content_sha256 IS NOT NULL
    UNION SELECT file_path FROM batch_archives WHERE state IN ('waiting', 'unpacking')"""

Deed = tuple[LiteralString, list[Any]]


class Caller:
    """One of those who call at once."""

    def __init__(self, arena: Arena, place: Path, seed: str, *, transactions: bool = False, cut_off: bool = False) -> None:
        self.arena, self.chance, self.place = arena, random.Random(seed), place
        self.transactions = transactions
        # Of two transactions that meet in a deadlock Postgres may end a third, which waits for the same row and holds nothing.
        self.refused = (*REFUSED, psycopg.errors.DeadlockDetected) if transactions else REFUSED
        self.allowed = CUT_OFF if cut_off else set()
        self.wrong: list[str] = []
        self.done = 0

    def run(self, calls: int) -> None:
        deeds = [self._call] * 5 + [self._statement] * 3 + [self._at_once, self._change]
        deeds += [self._transaction] * 2 + [self._in_own_transaction] if self.transactions else []
        for _ in range(calls):
            try:
                self.chance.choice(deeds)()
            except Exception as error:  # all of them are told of in the end
                if type(error) not in self.allowed:
                    self.wrong.append(repr(error)[:600])
            self.done += 1

    def _python(self, connection: psycopg.Connection | None = None) -> Callable[[], object]:
        """Return a call of the front door."""
        chance = self.chance
        given: dict[str, Any] = {} if connection is None else {"connection": connection}
        name, batch, user = chance.choice(NAMES), chance.choice(BATCHES), chance.choice(["ann", "ann", "ben"])
        files, folder = [self.place / f"f{number}.md" for number in chance.sample(range(4), 3)], self.place / "folder"
        made: dict[str, Callable[[], object]] = {
            "submit": lambda: jobs.submit_document(chance.choice(CONTENTS), doc_id=name, user_id=user, file_name="a.md", **given),
            "path": lambda: jobs.submit_document(files[0], user_id=user, **given),
            "list": lambda: jobs.submit_batch(files, batch_id=batch, user_id=user, **given),
            "folder": lambda: jobs.submit_batch(folder, user_id=user, **given),
            "zip": lambda: jobs.submit_batch(self.place / "a.zip", batch_id=batch, user_id=user, **given),
            "cancel": lambda: jobs.cancel_document(name, **given),
            "delete": lambda: jobs.delete_document(name, **given),
            "cancel batch": lambda: jobs.cancel_batch(batch, **given),
            "delete batch": lambda: jobs.delete_batch(batch, **given),
            "retry": lambda: jobs.retry_document(name, **given),
            "fail": lambda: jobs.fail_document(name, "no", **given),
            "update": lambda: jobs.update_document(name, metadata={"n": chance.random()}, priority=chance.randint(0, 2), **given),
            "get": lambda: (jobs.get_document(name, **given), jobs.batch_statistics(batch, **given), jobs.run_summary(batch, **given)),
        }
        if connection is None:
            made["sync"] = lambda: jobs.sync_folder(folder, user_id="ann", allow_empty=True)
        often = ["list", "folder", "delete batch"]  # where most can meet
        return made[chance.choice([*made, *often, *often])]

    def _sql(self) -> Deed:
        """Return a statement of the SQL that is public."""
        chance = self.chance
        name, batch = chance.choice(NAMES), chance.choice(BATCHES)
        return chance.choice(
            [
                ("SELECT submit_document('inbox/a.md', doc_id => %s, user_id => 'ann')", [name]),
                ("SELECT submit_batch('inbox/a.zip', batch_id => 'sql', user_id => 'ann')", []),
                ("SELECT cancel_document(%s)", [name]),
                ("SELECT delete_document(%s)", [name]),
                ("SELECT cancel_batch(%s)", [batch]),
                ("SELECT delete_batch(%s)", [batch]),
                ("SELECT delete_batch('sql')", []),
                ("SELECT requeue_document(%s)", [name]),
                ("SELECT requeue_dead_letters()", []),
                ("SELECT discard_dead_letter((SELECT max(id) FROM dead_letters))", []),
                ("SELECT update_document(%s, priority => 1)", [name]),
                ("SELECT fail_document_by_operator(%s, 'no')", [name]),
                ("SELECT settle_batch(%s)", [batch]),
                ("SELECT reopen_batches()", []),
                ("SELECT count(*) FROM explain_document(%s)", [name]),
            ]
        )

    def _call(self) -> None:
        self._promised(self._python())

    def _promised(self, call: Callable[[], object]) -> None:
        try:
            call()
        except DocmillError:
            return

    def _statement(self) -> None:
        with self.arena.connect() as conn:
            self._expecting(self.refused, lambda: conn.execute(*self._sql()))

    def _expecting(self, expected: tuple[type[Exception], ...], act: Callable[[], object]) -> bool:
        try:
            act()
        except expected:
            return False
        except psycopg.errors.UniqueViolation as error:
            if "is taken; choose another" not in str(error):
                raise
            return False
        return True

    def _transaction(self) -> None:
        """Several statements, some in savepoints, in any order of names."""
        with self.arena.connect() as conn:
            conn.execute(b"BEGIN ISOLATION LEVEL " + self.chance.choice(LEVELS).encode())
            for _ in range(self.chance.randint(2, 3)):
                save = self.chance.random() < 0.4
                if save:
                    conn.execute("SAVEPOINT here")
                if not self._expecting(CALLERS_OWN, lambda: conn.execute(*self._sql())):
                    if not save:
                        break
                    conn.execute("ROLLBACK TO here")
            self._expecting(CALLERS_OWN, lambda: conn.execute(self.chance.choice(["COMMIT", "COMMIT", "ROLLBACK"])))

    def _in_own_transaction(self) -> None:
        """Calls that join the caller's transaction."""
        with self.arena.connect() as conn, conn.transaction(force_rollback=self.chance.random() < 0.3):
            for _ in range(2):
                try:
                    self._python(conn)()
                except DocmillError:
                    raise psycopg.Rollback from None

    def _at_once(self) -> None:
        """Coroutines of one event loop."""

        async def several() -> None:
            calls = [
                jobs.submit_document_async(self.chance.choice(CONTENTS), doc_id=self.chance.choice(NAMES), user_id="ann", file_name="a.md"),
                jobs.submit_batch_async([self.place / "f0.md", self.place / "f1.md"], batch_id="b0", user_id="ann"),
                jobs.delete_batch_async(self.chance.choice(BATCHES)),
            ]
            try:
                ended = await asyncio.gather(*calls, return_exceptions=True)
            finally:
                await close_async()
            for one in ended:
                if isinstance(one, BaseException) and not isinstance(one, DocmillError):
                    raise one

        asyncio.run(several())

    def _change(self) -> None:
        """Let files change, come and go."""
        write(self.place / f"f{self.chance.randrange(4)}.md", self.chance.choice(CONTENTS))
        write(self.place / "a.zip", some_zip(self.chance))
        file = self.place / "folder" / f"g{self.chance.randrange(4)}.md"
        if self.chance.random() < 0.3:
            file.unlink(missing_ok=True)
        else:
            write(file, self.chance.choice(CONTENTS))


def some_zip(chance: random.Random) -> bytes:
    entries = {f"e{number}.md": chance.choice(CONTENTS) for number in chance.sample(range(4), 2)}
    return zip_bytes({**entries, "inner.zip": zip_bytes(entries)} if chance.random() < 0.5 else entries)


def write(path: Path, content: bytes) -> None:
    """Have it there as a whole, for whoever reads it meanwhile."""
    made = path.with_name(f".{threading.get_ident()}")
    made.write_bytes(content)
    made.replace(path)


@contextmanager
def disturbed(arena: Arena, workers: list[Any], seed: int) -> Iterator[None]:
    """Kill, stop and pause workers, and end sessions of theirs and of callers, every now and then."""
    over, chance = threading.Event(), random.Random(seed)

    def disturb() -> None:
        while not over.wait(chance.uniform(0.5, 2)):
            worker = chance.choice(workers)
            match chance.choice(["kill", "stop", "pause", "session"]):
                case "kill":
                    worker.signal(signal.SIGKILL)
                case "stop":
                    worker.signal(signal.SIGTERM)
                case "pause":
                    worker.signal(signal.SIGSTOP)
                    over.wait(chance.uniform(0.5, 4))
                    worker.signal(signal.SIGCONT)
                case "session":
                    arena.all(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                        "AND pid <> pg_backend_pid() ORDER BY random() LIMIT 2"
                    )
            arena.fault()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def race(arena: Arena, tmp_path: Path, seed: int, *, callers: int, calls: int, transactions: bool, disturb: bool = False) -> None:
    place, storage = tmp_path / "given", Path(os.environ["STORAGE_BASE_PATH"])
    for folder in (place / "folder", storage / "inbox"):
        folder.mkdir(parents=True)
    setting = Caller(arena, place, f"{seed}")
    for _ in range(20):
        setting._change()
    for number in range(4):
        write(place / f"f{number}.md", CONTENTS[number])
    write(storage / "inbox" / "a.md", CONTENTS[0])
    write(storage / "inbox" / "a.zip", some_zip(setting.chance))
    workers = [arena.worker(restart=True) for _ in range(2)]
    several = [Caller(arena, place, f"{seed}:{number}", transactions=transactions, cut_off=disturb) for number in range(callers)]
    threads = [threading.Thread(target=caller.run, args=[calls]) for caller in several]
    with disturbed(arena, workers, seed) if disturb else contextmanager(lambda: iter([None]))():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    close_sync()
    assert [told for caller in several for told in caller.wrong] == []
    arena.settle()
    arena.wait(lambda: arena.all(UNSETTLED) == [], "every batch to end and its summary to be made", 60)
    arena.wait(lambda: all(worker.alive() for worker in workers), "the workers", 30)
    assert disturb or [worker.log for worker in workers if "Traceback" in worker.log.read_text()] == []
    assert arena.all(DISAGREE) == []
    assert [path for (path,) in arena.all(FILES) if not (storage / path).exists()] == []
    time.sleep(1)  # duplicates whose original has just gone are found by the next pass
    arena.settle()
    arena.judge(SCENARIO, f"{sum(caller.done for caller in several)} calls of {callers} callers at once, seed {seed}", compared=False)


@pytest.mark.parametrize("transactions", [False, True])
def test_whoever_calls_at_once_hears_what_was_promised_and_all_is_whole(arena: Arena, tmp_path: Path, transactions: bool) -> None:
    race(arena, tmp_path, 1, callers=8, calls=15 if transactions else 40, transactions=transactions)


@pytest.mark.parametrize("seed", range(2, 5))
def test_so_it_is_while_workers_and_sessions_die(arena: Arena, tmp_path: Path, seed: int) -> None:
    race(arena, tmp_path, seed, callers=12, calls=150, transactions=True, disturb=True)
