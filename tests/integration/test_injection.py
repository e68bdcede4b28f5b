"""Hostile text in every argument of every SQL function that there is, over rows that hold the same text: it stays text everywhere.

The functions are those of the catalogue, so one that a migration adds is tried without a change here.
"""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

from tests.sites import fill_with

PAYLOADS = (
    "'; SELECT spring(); --",
    "' || spring() || '",
    "x' OR spring()::boolean OR 'x' = 'x",
    "\\'; SELECT spring(); --",
    '"; SELECT spring(); --',
    "$$; SELECT spring(); --",
    "%s %I %L %1$s %%",
    "{spring()}",
    "', spring(), '",
    ") OR spring()::boolean --",
    "a & | ! <-> :* ' b",
    "$.** ? (@ == spring())",
)
"""What would call the trap if it became part of a statement, in each place where text can stand; or break the statement's syntax."""
ROWS = frozenset({"file_extractions", "processing_jobs", "dead_letters"})
KEYWORDS = {"content_sha256": "a" * 64, "stage": "parse", "switch": "auto", "end_status": "failed", "file_path": "uploads/x",
            "relation": "document_chunks"}  # fmt: skip
"""What lets a function go on where hostile text would only be refused; every second time."""
REFUSALS = frozenset({"42501", "42602", "42704"})
"""Errors of the class for wrong statements that text brings about without becoming part of one: no right, no name, no such thing."""
TRAP = """
CREATE FUNCTION spring() RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE WARNING 'the trap sprang'; RETURN 'true'; END $$;
"""
FUNCTIONS = """
SELECT p.oid, p.oid::regprocedure::text, p.prokind = 'p', coalesce(p.proargnames, '{}'),
    array(SELECT format_type(t.oid, NULL) FROM unnest(p.proargtypes) WITH ORDINALITY AS t (oid, place) ORDER BY t.place),
    coalesce(p.proargmodes, '{}')
FROM pg_proc AS p
WHERE p.pronamespace = 'public'::regnamespace AND p.prokind IN ('f', 'p') AND p.prorettype <> 'trigger'::regtype
    AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = p.oid AND d.deptype = 'e') AND p.proname <> 'spring'
ORDER BY 2
"""


@dataclass(frozen=True)
class Function:
    """A function of the schema and what its arguments are called and of which types they are."""

    signature: str
    is_procedure: bool
    names: list[str]
    types: list[str]

    @property
    def call(self) -> sql.Composed:
        name = sql.Identifier(self.signature.partition("(")[0])
        # A row is taken from its table, where there is one.
        row = "(SELECT r FROM {0} AS r WHERE %s::text IS NULL ORDER BY r.id DESC LIMIT 1)"
        kinds = [sql.SQL(row if kind in ROWS else "%s::{0}").format(sql.SQL(kind)) for kind in self.types]
        places = sql.SQL(", ").join(kinds)
        return sql.SQL("CALL {}({})" if self.is_procedure else "SELECT * FROM {}({})").format(name, places)


def functions(conn: psycopg.Connection) -> list[Function]:
    found = []
    for _, signature, is_procedure, names, types, modes in conn.execute(FUNCTIONS).fetchall():
        inputs = [name for name, mode in zip(names, modes, strict=True) if mode in ("i", "b", "v")] if modes else names
        found.append(Function(signature, is_procedure, inputs or [""] * len(types), types))
    return found


def value_for(name: str, kind: str, evil: str, number: int, conn: psycopg.Connection) -> object:
    """Return an argument: text as hostile as it gets that names rows which are there, and for other types what leads furthest."""
    text = f"{evil}{number}" if "doc" in name else evil
    if kind in ROWS or (name in KEYWORDS and number % 2 == 0):
        return KEYWORDS.get(name)
    if kind.endswith("[]"):
        return None if (one := value_for(name, kind[:-2], evil, number, conn)) is None else [one]
    match kind:
        case "text" | "character varying" | "name":
            return text
        case "jsonb" | "json":
            return Jsonb({text: [text, {text: text}], "doc_id": text, "error_message": text})
        case "integer" | "bigint" | "smallint" | "numeric" | "double precision" | "real":
            return number
        case "boolean":
            return True
        case "uuid":
            row = conn.execute("SELECT run_id FROM processing_jobs LIMIT 1").fetchone()
            return row[0] if row else uuid.uuid4()
        case "timestamp with time zone":
            return "now"
        case "interval":
            return "1 hour"
        case "vector":
            return "[1,0]"
        case "regclass":
            return "file_extractions"
        case "tsquery":
            return "pressure"
    labels = conn.execute(
        "SELECT e.enumlabel FROM pg_enum AS e WHERE e.enumtypid = to_regtype(%s) ORDER BY e.enumsortorder", [kind]
    ).fetchall()
    return labels[0][0] if labels else None


@pytest.fixture
def sprung(conn: psycopg.Connection) -> list[str]:
    """What the trap says, which is there from now on."""
    said: list[str] = []

    def listen(notice: psycopg.errors.Diagnostic) -> None:
        if "sprang" in (notice.message_primary or ""):
            said.append(str(notice.message_primary))

    conn.execute(TRAP)
    conn.execute("SET statement_timeout = '60s'")
    conn.add_notice_handler(listen)
    return said


def test_the_trap_springs_where_text_becomes_part_of_a_statement(conn: psycopg.Connection, sprung: list[str]) -> None:
    """Else the next test could not fail."""
    conn.execute("CREATE FUNCTION careless(word text) RETURNS text LANGUAGE plpgsql AS $$ DECLARE o text; BEGIN "
                    "EXECUTE 'SELECT ''' || word || '''' INTO o; RETURN o; END $$")  # fmt: skip
    assert "careless(text)" in [function.signature for function in functions(conn)]
    conn.execute("SELECT careless(%s)", [PAYLOADS[1]])
    assert sprung


def test_no_text_becomes_part_of_a_statement_in_any_function(conn: psycopg.Connection, sprung: list[str]) -> None:
    known = functions(conn)
    assert len(known) > 100
    worked, complaints = set(), []
    for evil in PAYLOADS:
        with conn.transaction(force_rollback=True):
            fill_with(conn, evil)
            for function in known:
                # Three documents there are: one waits, one is in work, one has failed.
                for number in (1, 2, 3, 4) if {"doc_id", "stage"} & set(function.names) else (1, 2):
                    arguments = [value_for(*part, evil, number, conn) for part in zip(function.names, function.types, strict=True)]
                    try:
                        with conn.transaction(force_rollback=True):
                            conn.execute(function.call, arguments)
                            worked.add(function.signature)
                    except psycopg.Error as error:
                        state = error.sqlstate or "XX"
                        is_name = state in REFUSALS or f'relation "{evil}" does not exist' in str(error)
                        if state.startswith(("42", "XX", "26")) and not is_name:
                            complaints.append((function.signature, evil, f"{state} {error}"))
                    if sprung:
                        complaints.append((function.signature, evil, sprung.pop()))
    assert complaints == []
    idle = {function.signature for function in known} - worked
    assert len(idle) < len(known) // 10, f"too few functions got to their end for this to prove anything: {sorted(idle)}"


def test_a_roles_name_is_only_a_name(conn: psycopg.Connection, sprung: list[str]) -> None:
    """Granting is the one thing that puts names of others into statements."""
    name = f'x"; SELECT spring(); -- {uuid.uuid4().hex[:8]}'
    conn.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(name)))
    try:
        conn.execute(sql.SQL("GRANT SELECT ON document_chunks TO {}").format(sql.Identifier(name)))
        conn.execute("SELECT share_embeddings_with_readers()")
        granted = conn.execute("SELECT has_table_privilege(%s, 'chunk_embeddings', 'SELECT')", [name]).fetchone()
        assert granted == (True,) and not sprung
    finally:
        conn.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
        conn.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


SHADOWS = """
SELECT c.relname FROM pg_class AS c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v')
"""
STEAL = """
CREATE TEMP TABLE loot (rights text NOT NULL);
CREATE FUNCTION pg_temp.steal() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN INSERT INTO pg_temp.loot VALUES (current_user); RETURN TRUE; END $$;
GRANT ALL ON pg_temp.loot TO PUBLIC;
"""


def test_nobodys_temporary_table_stands_in_for_one_of_ours(conn: psycopg.Connection) -> None:
    """A function with its owner's rights that read a view of the caller's own would run the caller's code with these rights."""
    fill_with(conn, "x")
    role = f"thief_{uuid.uuid4().hex[:8]}"
    trusted = [function for function in functions(conn) if function.signature in trusted_functions(conn)]
    assert {"embedding_table(text)", "event_id_since(timestamp with time zone)"} <= {function.signature for function in trusted}
    conn.execute(f"CREATE ROLE {role}".encode())
    try:
        conn.execute(f"SET ROLE {role}".encode())
        conn.execute(STEAL)
        for (name,) in conn.execute(SHADOWS).fetchall():
            view = "CREATE TEMP VIEW {0} AS SELECT (NULL::public.{0}).* WHERE pg_temp.steal()"
            conn.execute(sql.SQL(view).format(sql.Identifier(name)))
        for function in trusted:
            with contextlib.suppress(psycopg.Error):
                conn.execute(function.call, [value_for(*part, "x", 1, conn) for part in zip(function.names, function.types, strict=True)])
        conn.execute("SELECT * FROM document_events")  # the trap itself works
        assert {row[0] for row in conn.execute("SELECT rights FROM pg_temp.loot")} == {role}
    finally:
        conn.execute("RESET ROLE")
        conn.execute(f"DROP OWNED BY {role}".encode())
        conn.execute(f"DROP ROLE {role}".encode())


def trusted_functions(conn: psycopg.Connection) -> set[str]:
    """The functions that run with their owner's rights."""
    found = "SELECT oid::regprocedure::text FROM pg_proc WHERE prosecdef AND pronamespace = 'public'::regnamespace"
    return {row[0] for row in conn.execute(found)}
