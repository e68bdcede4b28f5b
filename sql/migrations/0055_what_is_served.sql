-- What is said of a document while a newer version of it waits, or once another document is gone: searches name the file that the text they
-- show comes from, a cut text is listed for as long as it is served, and the document that another one is called a duplicate of is there. And
-- a batch is through to 100 percent only when all of its files have ended.

-- The name of what is served

DO $$
-- The names are looked up first: from the ALTER to the end of the transaction, nobody else can read the table.
DECLARE
    ids bigint[];
    served integer[];
    names text[];
BEGIN
    SELECT array_agg(s.id), array_agg(s.served_version), array_agg(s.file_name)
    INTO ids, served, names
    FROM (
        SELECT f.id, f.served_version, (
            SELECT e.detail ->> 'file_name'
            FROM document_events AS e
            WHERE e.doc_id = f.doc_id AND e.version = f.served_version AND e.event IN ('submitted', 'resubmitted')
            ORDER BY e.id DESC
            LIMIT 1
        ) AS file_name
        FROM file_extractions AS f
        WHERE f.served_version < f.version
    ) AS s
    WHERE s.file_name IS NOT NULL;
    ALTER TABLE file_extractions ADD COLUMN served_file_name text;
    UPDATE file_extractions AS d
    SET served_file_name = s.file_name
    FROM unnest(ids, served, names) AS s (id, served_version, file_name)
    WHERE d.id = s.id AND d.served_version = s.served_version AND d.served_version < d.version AND d.file_name <> s.file_name;
END;
$$;
COMMENT ON COLUMN file_extractions.served_file_name IS
    'The submitter''s name for the version that searches see, while a newer one was submitted under another name; else null, and file_name holds.';

CREATE FUNCTION keep_served_name() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.served_file_name := CASE
        WHEN NEW.served_version = OLD.served_version AND NEW.served_version < NEW.version
            THEN nullif(coalesce(OLD.served_file_name, OLD.file_name), NEW.file_name)
    END;
    RETURN NEW;
END;
$$;
COMMENT ON FUNCTION keep_served_name IS 'Keeps what the file was called whose version is served, until another version is.';
-- By its name it comes after keep_display_name, and sees the new name as it will be stored.
CREATE TRIGGER keep_served_name BEFORE UPDATE ON file_extractions
    FOR EACH ROW WHEN (
        OLD.served_version IS NOT NULL AND (NEW.file_name IS DISTINCT FROM OLD.file_name OR OLD.served_file_name IS NOT NULL)
    )
    EXECUTE FUNCTION keep_served_name();

-- As before, but for the name.

CREATE OR REPLACE FUNCTION search_by_vector(
    query_vector vector, embedding_model text, user_id text DEFAULT NULL, batch_id text DEFAULT NULL, file_type text DEFAULT NULL,
    metadata jsonb DEFAULT NULL, limit_to integer DEFAULT 10
) RETURNS TABLE (
    chunk_id uuid, doc_id text, file_name text, version integer, chunk_index integer, content text, heading_path text[],
    page_start integer, page_end integer, score double precision, vector_rank integer, text_rank integer
) LANGUAGE sql STABLE AS $$
    SELECT f.chunk_id, p.doc_id, p.file_name, p.version, p.chunk_index, p.content, p.heading_path, p.page_start, p.page_end,
        f.score, f.rank::integer, NULL::integer
    FROM nearest_chunks(query_vector, embedding_model, user_id, batch_id, file_type, metadata, limit_to)
        WITH ORDINALITY AS f (chunk_id, score, rank)
    CROSS JOIN LATERAL (
        SELECT c.doc_id, coalesce(d.served_file_name, d.file_name) AS file_name, c.version, c.chunk_index, c.content, c.heading_path, c.page_start, c.page_end
        FROM document_chunks AS c
        JOIN file_extractions AS d ON d.doc_id = c.doc_id
        WHERE c.id = f.chunk_id
        LIMIT 1
    ) AS p
    ORDER BY f.rank;
$$;

CREATE OR REPLACE FUNCTION search_by_text(
    query_text text, user_id text DEFAULT NULL, batch_id text DEFAULT NULL, file_type text DEFAULT NULL, metadata jsonb DEFAULT NULL,
    limit_to integer DEFAULT 10, language text DEFAULT NULL
) RETURNS TABLE (
    chunk_id uuid, doc_id text, file_name text, version integer, chunk_index integer, content text, heading_path text[],
    page_start integer, page_end integer, score double precision, vector_rank integer, text_rank integer
) LANGUAGE sql STABLE AS $$
    SELECT f.chunk_id, p.doc_id, p.file_name, p.version, p.chunk_index, p.content, p.heading_path, p.page_start, p.page_end,
        f.score, NULL::integer, f.rank::integer
    FROM matching_chunks(query_text, user_id, batch_id, file_type, metadata, limit_to, language)
        WITH ORDINALITY AS f (chunk_id, score, rank)
    CROSS JOIN LATERAL (
        SELECT c.doc_id, coalesce(d.served_file_name, d.file_name) AS file_name, c.version, c.chunk_index, c.content, c.heading_path, c.page_start, c.page_end
        FROM document_chunks AS c
        JOIN file_extractions AS d ON d.doc_id = c.doc_id
        WHERE c.id = f.chunk_id
        LIMIT 1
    ) AS p
    ORDER BY f.rank;
$$;

CREATE OR REPLACE FUNCTION search_hybrid(
    query_text text, query_vector vector, embedding_model text, user_id text DEFAULT NULL, batch_id text DEFAULT NULL,
    file_type text DEFAULT NULL, metadata jsonb DEFAULT NULL, limit_to integer DEFAULT 10, language text DEFAULT NULL
) RETURNS TABLE (
    chunk_id uuid, doc_id text, file_name text, version integer, chunk_index integer, content text, heading_path text[],
    page_start integer, page_end integer, score double precision, vector_rank integer, text_rank integer
) LANGUAGE sql STABLE AS $$
    SELECT f.chunk_id, p.doc_id, p.file_name, p.version, p.chunk_index, p.content, p.heading_path, p.page_start, p.page_end,
        f.score, f.vector_rank, f.text_rank
    FROM (
        SELECT chunk_id, coalesce(1.0 / (60 + v.rank), 0)::double precision + coalesce(1.0 / (60 + t.rank), 0)::double precision AS score,
            v.rank::integer AS vector_rank, t.rank::integer AS text_rank
        FROM nearest_chunks(
            query_vector, embedding_model, user_id, batch_id, file_type, metadata, greatest(100, check_search_limit(limit_to))
        ) WITH ORDINALITY AS v (chunk_id, score, rank)
        FULL JOIN matching_chunks(
            query_text, user_id, batch_id, file_type, metadata, greatest(100, check_search_limit(limit_to)), language
        ) WITH ORDINALITY AS t (chunk_id, score, rank) USING (chunk_id)
        ORDER BY score DESC, v.rank, chunk_id
        LIMIT limit_to
    ) AS f
    CROSS JOIN LATERAL (
        SELECT c.doc_id, coalesce(d.served_file_name, d.file_name) AS file_name, c.version, c.chunk_index, c.content, c.heading_path, c.page_start, c.page_end
        FROM document_chunks AS c
        JOIN file_extractions AS d ON d.doc_id = c.doc_id
        WHERE c.id = f.chunk_id
        LIMIT 1
    ) AS p
    ORDER BY f.score DESC, f.vector_rank, f.chunk_id;
$$;

-- Cut texts

CREATE OR REPLACE VIEW incomplete_documents WITH (security_invoker = true) AS
SELECT d.doc_id, d.batch_id, d.user_id,
    CASE m.version WHEN d.served_version THEN coalesce(d.served_file_name, d.file_name) ELSE d.file_name END AS file_name,
    d.state, m.version, m.parser,
    coalesce(m.parse_metadata ->> 'cut_by', 'some pages could not be read') AS reason,
    (m.parse_metadata ->> 'pages_kept')::integer AS pages_kept,
    (m.parse_metadata ->> 'pages_of')::integer AS pages_of,
    coalesce(m.parse_metadata -> 'failed_pages', m.parse_metadata -> 'pages_failed') AS failed_pages,
    m.created_at AS parsed_at,
    m.version IS NOT DISTINCT FROM d.served_version AS is_served
FROM document_markdown AS m
JOIN file_extractions AS d ON d.doc_id = m.doc_id AND m.version IN (d.version, d.served_version)
WHERE m.parse_metadata ?| ARRAY['cut_by', 'failed_pages', 'pages_failed'];
COMMENT ON VIEW incomplete_documents IS
    'Documents whose text is not whole: a limit cut it off (PARTIAL_PARSE=keep), or pages could not be read. Two rows where that is so of the version that searches see and of a newer one.';
COMMENT ON COLUMN incomplete_documents.file_name IS 'The submitter''s name for the file of that version.';
COMMENT ON COLUMN incomplete_documents.state IS 'Where the document stands with its newest version.';
COMMENT ON COLUMN incomplete_documents.is_served IS 'Whether this is the version that searches see.';

-- Duplicates

CREATE FUNCTION original_of(doc_id text, user_id text, content_sha256 text, duplicate_of text) RETURNS text
LANGUAGE sql STABLE STRICT PARALLEL SAFE
RETURN coalesce(
    (
        SELECT o.doc_id FROM file_extractions AS o
        WHERE o.doc_id = original_of.duplicate_of AND o.user_id = original_of.user_id AND o.content_sha256 = original_of.content_sha256
    ),
    -- Of those that it leaves behind when it goes, the first takes its place.
    (
        SELECT nullif(o.doc_id, original_of.doc_id)
        FROM (
            SELECT e.doc_id FROM file_extractions AS e
            WHERE e.user_id = original_of.user_id AND e.content_sha256 = original_of.content_sha256 AND e.state = 'complete'
            ORDER BY e.processing_completed_at, e.id
            LIMIT 1
        ) AS o
    )
);
COMMENT ON FUNCTION original_of IS
    'Of which document one that was found to be a duplicate is one now: of the same, while that has the content, else of the first that is left with it; null where that is itself.';
COMMENT ON COLUMN file_extractions.duplicate_of IS
    'doc_id of the same user''s document with the same content that was complete first; it may be gone since, or have other content: original_of() knows.';

CREATE OR REPLACE VIEW document_status WITH (security_invoker = true) AS
SELECT
    d.doc_id, d.user_id, d.batch_id, d.run_id, d.file_name, d.file_type, d.file_size, d.version, d.served_version,
    CASE
        WHEN d.state IN ('complete', 'failed', 'duplicate', 'cancelled', 'retrying') THEN d.state::text
        WHEN d.milestone = 'upload_validated' THEN CASE d.state WHEN 'queued' THEN 'parse_queued' ELSE 'parsing' END
        WHEN d.milestone = 'chunks_stored' THEN CASE d.state WHEN 'queued' THEN 'embedding_queued' ELSE 'embedding_in_progress' END
        ELSE d.milestone::text
    END AS status,
    d.milestone, d.state, due_stage(d.milestone) AS stage_due, d.page_count, d.chunk_count, d.retry_count, d.crash_count,
    d.error_type, d.error_message, d.correlation_id, d.claimed_by, d.lease_until, d.created_at, d.updated_at,
    d.processing_started_at, d.processing_completed_at, d.processing_duration_ms,
    stage_queue(due_stage(d.milestone)) AS queue_due, d.not_before AS next_try_at,
    original_of(d.doc_id, d.user_id, d.content_sha256, d.duplicate_of) AS duplicate_of, d.priority
FROM file_extractions AS d;
COMMENT ON COLUMN document_status.duplicate_of IS
    'doc_id of the document with the same content that was complete first; null where there is no such document any more.';

CREATE OR REPLACE FUNCTION run_files(batch processing_jobs) RETURNS TABLE (
    kind text, doc_id text, name text, path text, file_type text, mime_type text, bytes bigint, pages integer, passages integer, state text,
    outcome text, error_type document_error_type, error_message text, duration_ms bigint, version integer, served_version integer,
    duplicate_of text, submitted_at timestamptz, started_at timestamptz, ended_at timestamptz, raw_extraction jsonb
) LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT 'document', d.doc_id, d.file_name, path_in_batch(d.source_path, (batch).source_path, d.file_name), d.file_type, d.mime_type,
        d.file_size, d.page_count, d.chunk_count, d.state::text,
        CASE WHEN d.state IN ('complete', 'duplicate') THEN 'succeeded' WHEN d.state IN ('failed', 'cancelled') THEN d.state::text
            ELSE 'unfinished' END,
        d.error_type, d.error_message, d.processing_duration_ms, d.version, d.served_version,
        original_of(d.doc_id, d.user_id, d.content_sha256, d.duplicate_of), d.created_at, d.processing_started_at, d.processing_completed_at, d.raw_extraction
    FROM file_extractions AS d
    WHERE d.batch_id = (batch).batch_id AND d.run_id = (batch).run_id
    UNION ALL
    -- An archive that was unpacked is its entries.
    SELECT 'archive', NULL, regexp_replace(p.path, '^.*/', ''), p.path, 'zip', 'application/zip', NULL, NULL, NULL, a.state,
        CASE WHEN a.state IN ('failed', 'cancelled') THEN a.state ELSE 'unfinished' END,
        CASE WHEN a.state = 'failed' THEN 'PERMANENT'::document_error_type END, a.error_message, NULL, 1, NULL, NULL, a.created_at, NULL,
        a.ended_at, NULL
    FROM batch_archives AS a
    CROSS JOIN LATERAL (
        SELECT coalesce(nullif(rtrim(a.entry_path, '/'), ''), regexp_replace((batch).source_path, '^.*/', ''), (batch).batch_id) AS path
    ) AS p
    WHERE a.run_id = (batch).run_id AND a.state <> 'unpacked';
END;

-- Progress

-- As before, and rounded down.
CREATE OR REPLACE VIEW batch_progress WITH (security_invoker = true) AS
SELECT
    b.batch_id, b.user_id, b.source_path, b.status, b.total_files, b.queued, b.working, b.retrying, b.complete, b.duplicate,
    b.documents_failed AS failed, b.documents_cancelled AS cancelled, b.archives_open,
    b.completed + b.failed AS ended, b.pending + b.processing AS unfinished,
    CASE WHEN b.status IN ('completed', 'completed_with_errors') AND b.files_unfinished = 0 THEN 100 ELSE
        trunc(100.0 * t.ended / nullif(b.files_expected, 0), 1)
    END AS percent,
    CASE WHEN t.goes_on THEN t.rate END AS per_second,
    CASE WHEN t.goes_on THEN (b.files_expected - t.ended) / t.rate END AS seconds_left,
    b.last_progress_at, b.started_at, b.sealed_at, b.completed_at, b.error_message, b.run_id,
    b.archives, b.archives_failed, b.archives_cancelled, b.archive_files, b.unpacked_files, b.documents, b.files, b.files_succeeded,
    b.files_failed, b.files_cancelled, b.files_unfinished, b.files_expected, t.ended AS files_ended
FROM batch_status AS b
CROSS JOIN LATERAL (
    SELECT b.files - b.files_unfinished AS ended,
        b.files - b.files_unfinished < b.files_expected AND b.ended_recently > 0
            AND (b.completed_at IS NULL OR b.files_unfinished > 0) AS goes_on,
        b.ended_recently / greatest(1, least(300, extract(epoch FROM now() - b.started_at)))::double precision AS rate
) AS t;
COMMENT ON COLUMN batch_progress.percent IS
    'Part of files_expected that has ended, 0 to 100, rounded down: 100 once all have. Null while there is none.';

CALL pin_search_path();
