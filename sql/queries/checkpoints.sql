-- The one transaction that makes completed stages durable. See jobs/pipeline/checkpoint.py.

-- name: advance_documents
-- First statement of every checkpoint but the last, of one document or, once they are held, of several that go on alike. Whose doc_id is not
-- returned: its claim has moved on and nothing of it may be written. One that somebody's open transaction holds is an error at once: who
-- waited in the statement would keep a connection from all others for as long. The job ends with the work that it was for, so that no crash
-- can come between the two, and names its worker no longer: who removes a worker's row has to rewrite whatever names it.
WITH given AS (
    SELECT g.*
    FROM unnest(
        %(doc_ids)b::text[], %(claims)b::bigint[], %(job_ids)b::bigint[], %(gained)b::boolean[], %(file_sizes)b::bigint[], %(hashes)b::text[],
        %(file_types)b::text[], %(mime_types)b::text[], %(page_counts)b::integer[], %(chunk_counts)b::integer[], %(duplicates_of)b::text[],
        %(events)b::text[]::jsonb[]
    ) AS g (
        doc_id, claim, job_id, gained, file_size, content_sha256, file_type, mime_type, page_count, chunk_count, duplicate_of, events
    )
), held AS MATERIALIZED (
    SELECT d.id, d.milestone = %(milestone)s::document_milestone AS stays, g.*
    FROM given AS g
    JOIN file_extractions AS d ON d.doc_id = g.doc_id
    WHERE d.claim = g.claim AND d.state = 'working'
    ORDER BY d.id
    FOR NO KEY UPDATE OF d NOWAIT
), fenced AS (
    UPDATE file_extractions AS d
    SET milestone = %(milestone)s,
        state = %(state)s::document_state,
        lease_until = CASE WHEN %(state)s = 'working' THEN d.lease_until END,
        retry_count = %(retry_count)s,
        not_before = CASE WHEN %(state)s = 'retrying' THEN now() + make_interval(secs => %(next_delay)s) END,
        waiting_for = CASE WHEN %(state)s = 'working' THEN d.waiting_for ELSE %(waiting_for)s END,
        waiting_revision = CASE WHEN %(state)s = 'working' THEN d.waiting_revision ELSE %(waiting_revision)s END,
        waiting_place = CASE WHEN %(state)s = 'working' THEN d.waiting_place ELSE %(waiting_place)s END,
        waiting_since = CASE
            WHEN %(state)s = 'retrying' AND %(waits)s THEN CASE
                WHEN h.stays AND NOT h.gained THEN coalesce(d.waiting_since, now())
                ELSE now()
            END
            WHEN %(state)s IN ('working', 'queued') AND NOT h.gained THEN d.waiting_since
        END,
        crash_count = CASE WHEN h.stays THEN d.crash_count ELSE 0 END,
        lone_crash_count = CASE WHEN h.stays THEN d.lone_crash_count ELSE 0 END,
        requeue_count = CASE WHEN h.stays THEN d.requeue_count ELSE 0 END,
        alone = d.alone AND %(state)s = 'working',
        error_type = %(error_type)s::document_error_type,
        error_message = %(error_message)s,
        file_size = coalesce(h.file_size, d.file_size),
        content_sha256 = coalesce(h.content_sha256, d.content_sha256),
        file_type = coalesce(h.file_type, d.file_type),
        mime_type = coalesce(h.mime_type, d.mime_type),
        page_count = coalesce(h.page_count, d.page_count),
        chunk_count = coalesce(h.chunk_count, d.chunk_count),
        duplicate_of = coalesce(h.duplicate_of, d.duplicate_of),
        served_version = CASE WHEN %(state)s <> 'duplicate' THEN d.served_version END,
        raw_extraction = CASE WHEN %(state)s <> 'duplicate' THEN d.raw_extraction END,
        processing_completed_at = CASE WHEN %(state)s IN ('failed', 'duplicate') THEN clock_timestamp() END,
        updated_at = now()
    FROM held AS h
    WHERE d.id = h.id
    RETURNING d.doc_id, d.version, d.batch_id, d.user_id, d.correlation_id, d.priority, d.claim, h.job_id, h.events
), finished AS (
    UPDATE procrastinate_jobs AS j
    SET status = 'succeeded', attempts = j.attempts + 1, abort_requested = FALSE, worker_id = NULL
    FROM fenced AS f
    WHERE j.id = f.job_id AND j.status = 'doing' AND %(state)s <> 'working'
), told AS (
    INSERT INTO document_events (
        doc_id, version, batch_id, user_id, correlation_id, stage, event, attempt, duration_ms, cpu_ms, peak_memory_mb, worker, claim, detail
    )
    SELECT f.doc_id, f.version, f.batch_id, f.user_id, f.correlation_id, e.stage, e.event, e.attempt, e.duration_ms, e.cpu_ms,
        e.peak_memory_mb, %(worker)s, f.claim, e.detail
    FROM fenced AS f,
        jsonb_to_recordset(f.events) AS e (
            stage text, event text, attempt integer, duration_ms float8, cpu_ms float8, peak_memory_mb float8, detail jsonb
        )
)
SELECT f.doc_id, CASE WHEN %(next_stage)s::text IS NOT NULL THEN
    defer_stage(f.doc_id, %(next_stage)s, f.priority, now() + make_interval(secs => %(next_delay)s))
END AS job_id
FROM fenced AS f;

-- name: hold_documents
-- Those of several documents that may be written together: ours still, and in nobody's open transaction. To wait for one while holding
-- others would keep these from everybody, and who submits or cancels several of them in a transaction of his own could wait for us.
SELECT d.doc_id
FROM unnest(%(doc_ids)s::text[], %(claims)s::bigint[]) AS g (doc_id, claim)
JOIN file_extractions AS d ON d.doc_id = g.doc_id
WHERE d.claim = g.claim AND d.state = 'working'
ORDER BY d.id
FOR NO KEY UPDATE OF d SKIP LOCKED;

-- name: complete_documents
-- First statement of the last checkpoint, of one document or of several at once. Whose doc_id is not returned: its claim has moved on and
-- nothing of it may be written. Documents are locked in the order of their ids, and before their jobs, as everywhere, and not waited for.
WITH given AS MATERIALIZED (
    SELECT g.*
    FROM unnest(
        %(doc_ids)b::text[], %(claims)b::bigint[], %(job_ids)b::bigint[], %(file_sizes)b::bigint[], %(hashes)b::text[], %(file_types)b::text[],
        %(mime_types)b::text[], %(page_counts)b::integer[], %(chunk_counts)b::integer[], %(duplicates_of)b::text[], %(extractions)b::jsonb[],
        %(events)b::text[]::jsonb[]
    ) AS g (
        doc_id, claim, job_id, file_size, content_sha256, file_type, mime_type, page_count, chunk_count, duplicate_of, raw_extraction, events
    )
), held AS MATERIALIZED (
    SELECT d.id, g.*
    FROM given AS g
    JOIN file_extractions AS d ON d.doc_id = g.doc_id
    WHERE d.claim = g.claim AND d.state = 'working'
    ORDER BY d.id
    FOR NO KEY UPDATE OF d NOWAIT
), fenced AS (
    UPDATE file_extractions AS d
    SET milestone = 'complete',
        state = 'complete',
        lease_until = NULL,
        retry_count = 0,
        not_before = NULL,
        waiting_for = NULL,
        waiting_revision = NULL,
        waiting_place = NULL,
        waiting_since = NULL,
        crash_count = 0,
        lone_crash_count = 0,
        requeue_count = 0,
        alone = FALSE,
        error_type = NULL,
        error_message = NULL,
        file_size = coalesce(h.file_size, d.file_size),
        content_sha256 = coalesce(h.content_sha256, d.content_sha256),
        file_type = coalesce(h.file_type, d.file_type),
        mime_type = coalesce(h.mime_type, d.mime_type),
        page_count = coalesce(h.page_count, d.page_count),
        chunk_count = coalesce(h.chunk_count, d.chunk_count),
        duplicate_of = coalesce(h.duplicate_of, d.duplicate_of),
        served_version = d.version,
        raw_extraction = h.raw_extraction,
        processing_completed_at = clock_timestamp(),
        updated_at = now()
    FROM held AS h
    WHERE d.id = h.id
    RETURNING d.doc_id, d.version, d.batch_id, d.user_id, d.correlation_id, d.claim, h.job_id, h.events
), finished AS (
    -- The job ends with the work that it was for, so that no crash can come between the two.
    UPDATE procrastinate_jobs AS j
    SET status = 'succeeded', attempts = j.attempts + 1, abort_requested = FALSE, worker_id = NULL
    FROM fenced AS f
    WHERE j.id = f.job_id AND j.status = 'doing'
), told AS (
    INSERT INTO document_events (
        doc_id, version, batch_id, user_id, correlation_id, stage, event, attempt, duration_ms, cpu_ms, peak_memory_mb, worker, claim, detail
    )
    SELECT f.doc_id, f.version, f.batch_id, f.user_id, f.correlation_id, e.stage, e.event, e.attempt, e.duration_ms, e.cpu_ms,
        e.peak_memory_mb, %(worker)s, f.claim, e.detail
    FROM fenced AS f,
        jsonb_to_recordset(f.events) AS e (
            stage text, event text, attempt integer, duration_ms float8, cpu_ms float8, peak_memory_mb float8, detail jsonb
        )
)
SELECT f.doc_id FROM fenced AS f;

-- name: tell_event
-- Says something about a document outside a checkpoint, such as having been fenced off.
INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, stage, event, worker, claim, detail)
VALUES (%(doc_id)s, %(version)s, %(batch_id)s, %(user_id)s, %(correlation_id)s, %(stage)s, %(event)s, %(worker)s, %(claim)s, %(detail)s);

-- name: find_told_event
SELECT e.id
FROM document_events AS e
WHERE e.doc_id = %(doc_id)s AND e.claim = %(claim)s AND e.stage IS NOT DISTINCT FROM %(stage)s AND e.event = %(event)s
LIMIT 1;

-- The text comes as UTF-8 in bytes, because a text that the client sends as such lies in its memory once more from then on.

-- name: store_markdown
INSERT INTO document_markdown AS m (doc_id, version, markdown, markdown_sha256, page_map, parser, parse_metadata)
VALUES (%(doc_id)s, %(version)s, convert_from(%(markdown)s, 'UTF8'), %(markdown_sha256)s, %(page_map)s, %(parser)s, %(parse_metadata)s)
ON CONFLICT (doc_id, version) DO UPDATE
SET markdown = EXCLUDED.markdown, markdown_sha256 = EXCLUDED.markdown_sha256, page_map = EXCLUDED.page_map,
    parser = EXCLUDED.parser, parse_metadata = EXCLUDED.parse_metadata;

-- name: store_digest
-- Of a markdown that `check` has left as it was stored: it is not sent and written a second time.
UPDATE document_markdown AS m SET markdown_sha256 = %(markdown_sha256)s WHERE m.doc_id = %(doc_id)s AND m.version = %(version)s;

-- name: store_small_markdowns
-- Of several documents, a list a column.
INSERT INTO document_markdown AS m (doc_id, version, markdown, markdown_sha256, page_map, parser, parse_metadata)
SELECT g.doc_id, g.version, g.markdown, g.markdown_sha256, g.page_map, g.parser, g.parse_metadata
FROM unnest(
    %(doc_ids)b::text[], %(versions)b::integer[], %(markdowns)b::text[], %(hashes)b::text[], %(page_maps)b::jsonb[], %(parsers)b::text[],
    %(parse_metadata)b::jsonb[]
) AS g (doc_id, version, markdown, markdown_sha256, page_map, parser, parse_metadata)
ON CONFLICT (doc_id, version) DO UPDATE
SET markdown = EXCLUDED.markdown, markdown_sha256 = EXCLUDED.markdown_sha256, page_map = EXCLUDED.page_map,
    parser = EXCLUDED.parser, parse_metadata = EXCLUDED.parse_metadata;

-- name: store_extraction
INSERT INTO extraction_buffer AS b (doc_id, version, raw_extraction)
VALUES (%(doc_id)s, %(version)s, %(raw_extraction)s)
ON CONFLICT (doc_id, version) DO UPDATE SET raw_extraction = EXCLUDED.raw_extraction;

-- Rows come as one array a column: integers as the text of that array, an array or JSON in a column as its text, vectors as a VectorArray.
-- Why not by COPY: docs/decisions/0016-insert-not-copy.md.

-- name: store_chunks
-- Passages of one document or of several; `whose` says which of them by its place in `doc_ids`.
INSERT INTO document_chunks (
    id, doc_id, user_id, version, chunk_index, content, content_sha256, heading_path, page_start, page_end, char_start, char_end,
    language, metadata, embedding, embedding_model
)
SELECT c.id, d.doc_id, d.user_id, d.version, c.chunk_index, c.content, c.content_sha256,
    c.heading_path::text[], c.page_start, c.page_end, c.char_start, c.char_end, d.language, c.metadata, c.embedding, d.embedding_model
FROM unnest(
    %(ids)b::uuid[], %(indexes)s::integer[], %(contents)b::text[], %(hashes)b::text[], %(heading_paths)b::text[],
    %(page_starts)s::integer[], %(page_ends)s::integer[], %(char_starts)s::integer[], %(char_ends)s::integer[], %(metadata)b::text[]::jsonb[],
    %(embeddings)b::vector[], %(whose)s::integer[]
) AS c (id, chunk_index, content, content_sha256, heading_path, page_start, page_end, char_start, char_end, metadata, embedding, whose)
JOIN unnest(
    %(doc_ids)b::text[], %(user_ids)b::text[], %(versions)b::integer[], %(languages)b::text[], %(embedding_models)b::text[]
) WITH ORDINALITY AS d (doc_id, user_id, version, language, embedding_model, place) ON d.place = c.whose;

-- name: store_chunk_buffer
-- Passages of one document or of several, as `store_chunks` takes them.
INSERT INTO chunk_buffer (
    doc_id, version, chunk_index, id, content, content_sha256, heading_path, page_start, page_end, char_start, char_end, metadata
)
SELECT d.doc_id, d.version, c.chunk_index, c.id, c.content, c.content_sha256,
    c.heading_path::text[], c.page_start, c.page_end, c.char_start, c.char_end, c.metadata
FROM unnest(
    %(ids)b::uuid[], %(indexes)s::integer[], %(contents)b::text[], %(hashes)b::text[], %(heading_paths)b::text[],
    %(page_starts)s::integer[], %(page_ends)s::integer[], %(char_starts)s::integer[], %(char_ends)s::integer[], %(metadata)b::text[]::jsonb[],
    %(whose)s::integer[]
) AS c (id, chunk_index, content, content_sha256, heading_path, page_start, page_end, char_start, char_end, metadata, whose)
JOIN unnest(%(doc_ids)b::text[], %(versions)b::integer[]) WITH ORDINALITY AS d (doc_id, version, place) ON d.place = c.whose;

-- name: going_over_to
-- The model of a re-embedding whose vectors lie aside; nothing while there is none.
SELECT r.to_model AS embedding_model
FROM reembeddings AS r
WHERE r.state IN ('running', 'paused', 'ready', 'switched');

-- name: find_vectors_aside
SELECT c.content_sha256, s.embedding
FROM document_chunks AS c
JOIN chunk_embeddings AS s ON s.chunk_id = c.id AND s.embedding_model = %(embedding_model)s
WHERE c.doc_id = %(doc_id)s AND c.content_sha256 = ANY(%(hashes)s);

-- name: drop_served_chunks
DELETE FROM document_chunks AS c WHERE c.doc_id = %(doc_id)s;

-- name: drop_other_markdown
DELETE FROM document_markdown AS m WHERE m.doc_id = %(doc_id)s AND m.version <> %(version)s RETURNING m.markdown_sha256;

-- name: clear_buffers
WITH chunks AS (
    DELETE FROM chunk_buffer AS b WHERE b.doc_id = %(doc_id)s
), vectors AS (
    DELETE FROM vector_buffer AS b WHERE b.doc_id = %(doc_id)s
), hosted AS (
    DELETE FROM hosted_jobs AS h WHERE h.doc_id = %(doc_id)s
), answers AS (
    DELETE FROM extraction_answers AS a WHERE a.doc_id = %(doc_id)s
)
DELETE FROM extraction_buffer AS b WHERE b.doc_id = %(doc_id)s;

-- name: bury_document
-- Writes the dead letter of a document that has just been failed in the same transaction.
INSERT INTO dead_letters (doc_id, version, batch_id, user_id, correlation_id, stage, error_type, error_message, traceback, context)
VALUES (
    %(doc_id)s, %(version)s, %(batch_id)s, %(user_id)s, %(correlation_id)s, %(stage)s, %(error_type)s, %(error_message)s,
    %(traceback)s, %(context)s
)
ON CONFLICT (doc_id) WHERE resolved_at IS NULL DO UPDATE
SET version = EXCLUDED.version, stage = EXCLUDED.stage, error_type = EXCLUDED.error_type, error_message = EXCLUDED.error_message,
    traceback = EXCLUDED.traceback, context = EXCLUDED.context, created_at = now();

-- name: end_job
UPDATE procrastinate_jobs AS j SET status = 'succeeded', attempts = j.attempts + 1, worker_id = NULL
WHERE j.id = %(job_id)s AND j.status = 'doing';

-- name: settle_batch
SELECT settle_batch(%(batch_id)s);
