"""A server over TCP with passwords, and a database in which users are kept apart: what a login sees is tried as that login."""

from __future__ import annotations

from functools import cached_property
from typing import Any, LiteralString

import psycopg
from psycopg import errors, sql
from psycopg.conninfo import make_conninfo
from psycopg.types.json import Jsonb
from pydantic import SecretStr

from jobs.roles import create_roles, grant_as, grant_to_person
from models.settings import Settings
from tests.faults.cluster import Cluster

PEOPLE = ("alice", "bob")
MODEL = "m"


class Walls:
    """The server. Logins have their name as a password; `postgres` is its superuser."""

    def __init__(self) -> None:
        self._cluster = Cluster(fsync="off", password_encryption="scram-sha-256")
        self.database = ""
        with psycopg.connect(self._cluster.conninfo(), autocommit=True) as conn:
            conn.execute("ALTER ROLE postgres PASSWORD 'postgres'")
        (self._cluster.folder / "pg_hba.conf").write_text("host all all 127.0.0.1/32 scram-sha-256\n", encoding="ascii")
        with psycopg.connect(self._cluster.conninfo(), autocommit=True) as conn:
            conn.execute("SELECT pg_reload_conf()")

    def close(self) -> None:
        self._cluster.close()

    @cached_property
    def admin(self) -> psycopg.Connection[Any]:
        """A connection of the superuser to the database, kept."""
        return self.as_login("postgres")

    def url(self, login: str, database: str = "") -> str:
        """Where a login finds the database."""
        return make_conninfo(self._cluster.conninfo(database or self.database), user=login, password=login)

    def as_login(self, login: str, database: str = "") -> psycopg.Connection[Any]:
        """An autocommit connection of a login."""
        return psycopg.connect(self.url(login, database), autocommit=True)

    def new_database(self, template: str = "docmill_template") -> str:
        """Make a database and go over to it."""
        with self.as_login("postgres", "postgres") as conn:
            self.database = f"walls_{len(conn.execute('SELECT FROM pg_database').fetchall())}"
            conn.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(self.database), sql.Identifier(template)))
        return self.database

    def new_login(self, name: str, attributes: LiteralString = "") -> str:
        """Make a login unless there is one."""
        with self.as_login("postgres", "postgres") as conn:
            if conn.execute("SELECT FROM pg_roles WHERE rolname = %s", [name]).fetchone() is None:
                made = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {} " + attributes).format(sql.Identifier(name), sql.Literal(name))
                conn.execute(made)
        return name

    def settings(self, login: str = "postgres", **more: Any) -> Settings:
        """Settings that connect as a login."""
        return Settings(database_url=SecretStr(self.url(login)), **more)

    def raise_walls(self) -> None:
        """Make the roles, and a login for each person, a worker, an operator and an application."""
        settings = self.settings()
        create_roles(settings)
        for name in PEOPLE:
            grant_to_person(settings, self.new_login(name), name)
        for name, kind in (("worker", "worker"), ("operator", "operator"), ("web", "app")):
            grant_as(settings, self.new_login(name), kind)
        for name in ("nobody", "unmapped"):
            self.new_login(name)
        with self.as_login("postgres") as conn:
            conn.execute("GRANT docmill_reader TO unmapped")


def fill(conn: psycopg.Connection[Any], user: str) -> None:
    """Put rows of a user, each of which holds the user's name, into every table that holds rows of users."""
    doc, batch = f"{user}-doc", f"{user}-batch"
    run = conn.execute("SELECT begin_batch(%s, %s, %s, %s)", [batch, user, f"/{user}", user]).fetchone()
    assert run is not None
    conn.execute("SELECT submit_document(%s, doc_id => %s, user_id => %s)", [f"uploads/{user}", doc, user])
    conn.execute("UPDATE file_extractions SET batch_id = %s, run_id = %s, raw_extraction = %s WHERE doc_id = %s",
                 [batch, run[0], Jsonb({"title": user}), doc])  # fmt: skip
    conn.execute("SELECT submit_document(%s, doc_id => %s, user_id => %s)", [f"uploads/{user}-2", f"{user}-failed", user])
    conn.execute("SELECT fail_document(d, 'PERMANENT', %s, '{}') FROM file_extractions AS d WHERE d.doc_id = %s",
                 [f"secret of {user}", f"{user}-failed"])  # fmt: skip
    vector = "[" + ",".join(str(0.1 + number / 10 + PEOPLE.index(user) / 100) for number in range(3)) + "]"
    text = f"secret of {user}"
    values = {"doc": doc, "user": user, "batch": batch, "run": run[0], "vector": vector, "text": text, "model": MODEL}
    for statement in _ROWS.strip().split(";\n"):
        conn.execute(statement, values)


_ROWS = """
INSERT INTO document_markdown (doc_id, version, markdown, parser) VALUES (%(doc)s, 1, %(text)s, 'p');
INSERT INTO document_chunks (id, doc_id, user_id, version, chunk_index, content, content_sha256, char_start, char_end, language, embedding,
    embedding_model)
SELECT gen_random_uuid(), %(doc)s, %(user)s, 1, 0, %(text)s, repeat('0', 64), 0, 1, 'en', %(vector)s, %(model)s;
INSERT INTO chunk_embeddings (chunk_id, embedding_model, doc_id, user_id, embedding)
SELECT c.id, 'other', c.doc_id, c.user_id, c.embedding FROM document_chunks AS c WHERE c.doc_id = %(doc)s;
INSERT INTO chunk_buffer (doc_id, version, chunk_index, id, content, content_sha256, heading_path, char_start, char_end, metadata)
VALUES (%(doc)s, 1, 0, gen_random_uuid(), %(text)s, '', '{}', 0, 1, '{}');
INSERT INTO vector_buffer (doc_id, version, chunk_index, embedding_model, embedding) VALUES (%(doc)s, 1, 0, 'm', %(vector)s);
INSERT INTO extraction_buffer (doc_id, version, raw_extraction) VALUES (%(doc)s, 1, '{}');
INSERT INTO hosted_jobs (doc_id, version, part, job_id, service) VALUES (%(doc)s, 1, 'file', %(user)s, 's');
INSERT INTO extraction_answers (doc_id, version, part, asked_sha256, data, model, repairs, tokens_in, tokens_out)
VALUES (%(doc)s, 1, 1, '', '{}', 'm', 0, 1, 1);
INSERT INTO embeddings_to_make (embedding_model, doc_id, passages, is_urgent) VALUES ('other', %(doc)s, 1, TRUE);
INSERT INTO run_summaries (run_id, batch_id, user_id, ui_json, nested_summary, file_count, success_count, error_count)
VALUES (%(run)s, %(batch)s, %(user)s, '{}', '{}', 1, 1, 0);
INSERT INTO batch_archives (batch_id, run_id, user_id, entry_path, source_prefix, file_path)
VALUES (%(batch)s, %(run)s, %(user)s, '', '', %(user)s);
INSERT INTO folder_files (batch_id, path_id, seen_as, content_sha256) VALUES (%(batch)s, gen_random_uuid(), 'x', repeat('0', 64));
INSERT INTO provider_usage (id, service, kind, doc_ids, batch_ids, user_ids, shares, cost, outcome, give_up_at, finished_at)
SELECT gen_random_uuid(), 's', 'embedding', ARRAY[%(doc)s], ARRAY[%(batch)s], ARRAY[%(user)s], ARRAY[1], 1, 'ok', now(), now();
INSERT INTO worker_registry (worker, host, pid, concurrency, version, documents)
VALUES ('h:' || length(%(user)s), 'h', 1, 1, '1', ARRAY[%(doc)s]);
INSERT INTO files_to_remove (path, doc_id) VALUES ('gone-' || %(user)s, %(doc)s);
INSERT INTO alert_conditions (rule, subject, message, first_seen_at, last_seen_at) VALUES ('x', %(user)s, %(text)s, now(), now())
"""


OF_USERS = (
    "processing_jobs", "file_extractions", "document_chunks", "chunk_embeddings", "document_events", "dead_letters", "run_summaries",
    "batch_archives", "provider_usage", "procrastinate_jobs", "document_markdown", "cost_totals",
)  # fmt: skip
"""Of which a person sees rows of their own."""
IN_FLIGHT = (
    "chunk_buffer",
    "vector_buffer",
    "extraction_buffer",
    "hosted_jobs",
    "extraction_answers",
    "folder_files",
    "embeddings_to_make",
)
OF_ALL = ("alerts", "alert_conditions", "files_to_remove", "circuit_breakers", "provider_budgets", "reembeddings", "user_logins",
          "relation_rights", "alert_rules", "procrastinate_periodic_defers", "summaries_to_renew")  # fmt: skip


def rows(conn: psycopg.Connection[Any], statement: str, *args: object) -> list[tuple[Any, ...]]:
    return conn.execute(statement, args).fetchall()


def contents(conn: psycopg.Connection[Any], relation: str) -> str | None:
    """All that a login sees of a relation, as text; None where it may not look."""
    try:
        found = conn.execute(sql.SQL("SELECT t::text FROM {} AS t").format(sql.Identifier(relation))).fetchall()
    except errors.InsufficientPrivilege:
        return None
    return "\n".join(row[0] for row in found)


def digest(walls: Walls) -> list[str | None]:
    """Everything that is in the tables, to see that it stays."""
    return [contents(walls.admin, relation) for relation in (*OF_USERS, *IN_FLIGHT, "user_logins", "relation_rights", "alerts")]
