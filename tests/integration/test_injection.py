"""Hostile text in every argument of every SQL function that there is, over rows that hold the same text: it stays text everywhere.

The functions are those of the catalogue, so one that a migration adds is tried without a change here.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
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
NEW_TYPES = "Say in VALUES what a hostile value of the type is."
TRAP = """
CREATE TABLE canary (sung boolean NOT NULL);
CREATE FUNCTION spring() RETURNS text LANGUAGE sql AS $$ INSERT INTO canary VALUES (TRUE); SELECT 'true' $$;
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
        places = sql.SQL(", ").join(sql.SQL("%s::{}").format(sql.SQL(kind.encode().decode())) for kind in self.types)
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
def trapped(conn: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """A transaction-ready connection whose database has the trap."""
    conn.execute(TRAP)
    conn.execute("SET statement_timeout = '20s'")
    conn.autocommit = False
    yield conn
    conn.rollback()


def sung(conn: psycopg.Connection) -> bool:
    return conn.execute("SELECT count(*) FROM canary").fetchone() != (0,)


def test_the_trap_springs_where_text_becomes_part_of_a_statement(trapped: psycopg.Connection) -> None:
    """Else the next test could not fail."""
    trapped.execute("CREATE FUNCTION careless(word text) RETURNS text LANGUAGE plpgsql AS $$ DECLARE o text; BEGIN "
                    "EXECUTE 'SELECT ''' || word || '''' INTO o; RETURN o; END $$")  # fmt: skip
    assert "careless(text)" in [function.signature for function in functions(trapped)]
    trapped.execute("SELECT careless(%s)", [PAYLOADS[1]])
    assert sung(trapped)


@pytest.mark.parametrize("strings", ["on", "off"])
def test_no_text_becomes_part_of_a_statement_in_any_function(trapped: psycopg.Connection, strings: str) -> None:
    trapped.execute(f"SET standard_conforming_strings = {strings}".encode())
    trapped.execute("SET escape_string_warning = off")
    trapped.commit()
    known = functions(trapped)
    assert len(known) > 100
    worked, complaints = set(), []
    for evil in PAYLOADS if strings == "on" else PAYLOADS[:4]:
        with trapped.transaction(force_rollback=True):
            fill_with(trapped, evil)
            for function in known:
                for number in (1, 2, 3):
                    arguments = [value_for(*part, evil, number, trapped) for part in zip(function.names, function.types, strict=True)]
                    try:
                        with trapped.transaction(force_rollback=True):
                            trapped.execute(function.call, arguments).fetchall() if not function.is_procedure else trapped.execute(
                                function.call, arguments
                            )
                            if sung(trapped):
                                complaints.append((function.signature, evil, "the trap sprang"))
                            worked.add(function.signature)
                    except psycopg.Error as error:
                        state = error.sqlstate or "?"
                        if state.startswith(("42", "XX", "26", "?")):
                            complaints.append((function.signature, evil, f"{state} {error}"))
    assert complaints == []
    lazy = {function.signature for function in known} - worked
    print(len(known), len(worked), sorted(lazy))
