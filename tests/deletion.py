"""A stand-in for delete_document, for as long as the schema has none."""

from __future__ import annotations

import psycopg

_STAND_IN = """CREATE FUNCTION delete_document(doc_id text) RETURNS boolean LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE d file_extractions;
BEGIN
    SELECT f.* INTO d FROM file_extractions AS f WHERE f.doc_id = delete_document.doc_id FOR UPDATE;
    IF NOT FOUND THEN RETURN FALSE; END IF;
    PERFORM drop_waiting_jobs(d.doc_id);
    DELETE FROM file_extractions AS f WHERE f.id = d.id;
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, event, claim)
    VALUES (d.doc_id, d.version, d.batch_id, d.user_id, d.correlation_id, 'deleted', d.claim);
    RETURN TRUE;
END; $$"""


def provide_deletion(conn: psycopg.Connection) -> None:
    if conn.execute("SELECT FROM pg_proc WHERE proname = 'delete_document'").fetchone() is None:
        conn.execute(_STAND_IN)
