-- The runner's statements. Each is one step of claim, load, checkpoint; see jobs/pipeline.

-- name: claim_document
-- The fencing token is a new one with every claim. A row that somebody's open transaction holds is skipped, not waited for. An expired lease
-- is for the reconciler to judge. `serialise`: of equals that nobody has completed yet one owns the content, the others are not claimed
-- for parse before it has ended; two that would become the owner at once meet at the unique index.
UPDATE file_extractions AS d
SET state = 'working',
    claim = d.claim + 1,
    claim_job_id = %(job_id)s,
    claimed_by = %(worker)s,
    lease_until = now() + make_interval(secs => %(lease_seconds)s),
    alone = FALSE,
    owns_content = d.owns_content OR (
        %(serialise)s AND d.content_sha256 IS NOT NULL
        AND NOT EXISTS (
            SELECT FROM file_extractions AS o
            WHERE o.user_id = d.user_id AND o.content_sha256 = d.content_sha256 AND o.owns_content
        )
        AND NOT EXISTS (
            SELECT FROM file_extractions AS o
            WHERE o.user_id = d.user_id AND o.content_sha256 = d.content_sha256 AND o.state = 'complete'
        )
    ),
    not_before = NULL,
    processing_started_at = coalesce(d.processing_started_at, now()),
    updated_at = now()
FROM (
    SELECT f.id
    FROM file_extractions AS f
    WHERE f.doc_id = %(doc_id)s AND f.state IN ('queued', 'retrying') AND coalesce(f.not_before, now()) <= now()
        AND (NOT %(serialise)s OR f.owns_content OR f.milestone <> 'upload_validated' OR NOT EXISTS (
            SELECT FROM file_extractions AS o
            WHERE o.user_id = f.user_id AND o.content_sha256 = f.content_sha256 AND o.owns_content
        ))
    FOR NO KEY UPDATE SKIP LOCKED
) AS free
WHERE d.id = free.id
RETURNING d.doc_id, d.version, d.served_version, d.user_id, d.batch_id, d.correlation_id, d.file_name, d.file_path, d.metadata,
    d.milestone, d.file_size, d.content_sha256, d.file_type, d.mime_type, d.duplicate_of, d.priority, d.retry_count,
    d.crash_count, d.claim, extract(epoch FROM now() - d.waiting_since)::float8 AS waited_seconds,
    NOT %(serialise)s OR d.owns_content OR d.milestone <> 'uploaded' OR EXISTS (
        SELECT FROM file_extractions AS o
        WHERE o.user_id = d.user_id AND o.content_sha256 = d.content_sha256 AND o.state = 'complete'
    ) AS may_parse,
    -- Who owns its content since an earlier claim may have been passed by one that was through with parse.
    %(serialise)s AND d.owns_content AND NOT EXISTS (
        SELECT FROM file_extractions AS o
        WHERE o.user_id = d.user_id AND o.content_sha256 = d.content_sha256 AND o.state = 'complete'
    ) AS is_sole;

-- name: claim_alone
-- Says that the document has its worker to itself from now on, so that the next crash is its own.
UPDATE file_extractions AS d SET alone = TRUE
WHERE d.doc_id = %(doc_id)s AND d.claim = %(claim)s AND d.state = 'working';

-- name: look_at_document
SELECT d.state, d.milestone, d.claim, d.claim_job_id, extract(epoch FROM d.lease_until - now())::float8 AS lease_seconds_left,
    extract(epoch FROM d.not_before - now())::float8 AS wait_seconds_left
FROM file_extractions AS d
WHERE d.doc_id = %(doc_id)s;

-- name: look_at_owner
-- The equal document that this one waits for, and for how long it has waited.
SELECT o.doc_id, extract(epoch FROM now() - d.updated_at)::float8 AS seconds
FROM file_extractions AS d
JOIN file_extractions AS o ON o.user_id = d.user_id AND o.content_sha256 = d.content_sha256 AND o.owns_content AND o.id <> d.id
WHERE d.doc_id = %(doc_id)s AND d.milestone = 'upload_validated';

-- name: was_deleted
SELECT EXISTS (
    SELECT FROM document_events AS e WHERE e.doc_id = %(doc_id)s AND e.event = 'deleted'
) AS deleted;

-- name: put_off_stage
SELECT defer_stage(d.doc_id, %(stage)s, d.priority, now() + make_interval(secs => %(delay)s)) AS job_id
FROM file_extractions AS d
WHERE d.doc_id = %(doc_id)s;

-- name: renew_leases
-- One statement for all claims of a worker, in the order of ids. A row that somebody's open transaction holds is tried again at the next
-- tick, so that it keeps no other from being renewed. `gone`: the claim has moved on.
WITH mine AS (
    SELECT m.doc_id, m.claim FROM unnest(%(doc_ids)s::text[], %(claims)s::bigint[]) AS m (doc_id, claim)
), free AS (
    SELECT d.id
    FROM file_extractions AS d
    JOIN mine AS m ON m.doc_id = d.doc_id AND m.claim = d.claim
    WHERE d.state = 'working'
    ORDER BY d.id
    FOR NO KEY UPDATE OF d SKIP LOCKED
), renewed AS (
    UPDATE file_extractions AS d
    SET lease_until = now() + make_interval(secs => %(lease_seconds)s)
    FROM free
    WHERE d.id = free.id
    RETURNING d.doc_id
)
SELECT m.doc_id, m.claim, r.doc_id IS NOT NULL AS renewed,
    NOT EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = m.doc_id AND d.claim = m.claim AND d.state = 'working') AS gone
FROM mine AS m
LEFT JOIN renewed AS r USING (doc_id);

-- name: load_markdown
SELECT m.markdown, m.markdown_sha256, m.page_map, m.parser, m.parse_metadata
FROM document_markdown AS m
WHERE m.doc_id = %(doc_id)s AND m.version = %(version)s;

-- name: load_chunks
SELECT b.id, b.chunk_index, b.content, b.content_sha256, b.heading_path, b.page_start, b.page_end, b.char_start, b.char_end, b.metadata
FROM chunk_buffer AS b
WHERE b.doc_id = %(doc_id)s AND b.version = %(version)s
ORDER BY b.chunk_index;

-- name: load_vectors
SELECT b.embedding, b.embedding_model
FROM vector_buffer AS b
WHERE b.doc_id = %(doc_id)s AND b.version = %(version)s
ORDER BY b.chunk_index;

-- name: load_extraction
SELECT b.raw_extraction
FROM extraction_buffer AS b
WHERE b.doc_id = %(doc_id)s AND b.version = %(version)s;

-- name: find_known_vectors
-- Also those of a set that is being made, or waits to be moved.
SELECT DISTINCT ON (c.content_sha256) c.content_sha256, coalesce(s.embedding, c.embedding) AS embedding
FROM document_chunks AS c
LEFT JOIN chunk_embeddings AS s ON s.chunk_id = c.id AND s.embedding_model = %(embedding_model)s
WHERE c.user_id = %(user_id)s AND c.content_sha256 = ANY(%(hashes)s)
    AND (c.embedding_model = %(embedding_model)s OR s.chunk_id IS NOT NULL)
ORDER BY c.content_sha256;

-- name: find_original
-- Not one that is about to be deleted because its file has been moved.
SELECT d.doc_id
FROM file_extractions AS d
WHERE d.user_id = %(user_id)s AND d.content_sha256 = %(content_sha256)s AND d.state = 'complete' AND d.doc_id <> %(doc_id)s
    AND d.replaced_by IS NULL
ORDER BY d.processing_completed_at, d.id
LIMIT 1;

-- name: find_original_text
SELECT d.doc_id, m.markdown, m.page_map, m.parser, m.parse_metadata
FROM file_extractions AS d
JOIN document_markdown AS m ON m.doc_id = d.doc_id AND m.version = d.version
WHERE d.user_id = %(user_id)s AND d.content_sha256 = %(content_sha256)s AND d.state = 'complete' AND d.doc_id <> %(doc_id)s
    AND d.file_type = %(file_type)s AND d.mime_type = %(mime_type)s
ORDER BY d.processing_completed_at, d.id
LIMIT 1;

-- name: find_original_extraction
SELECT d.doc_id, d.file_name, d.raw_extraction
FROM file_extractions AS d
JOIN document_markdown AS m ON m.doc_id = d.doc_id AND m.version = d.version
WHERE d.user_id = %(user_id)s AND d.content_sha256 = %(content_sha256)s AND d.state = 'complete' AND d.doc_id <> %(doc_id)s
    AND m.markdown_sha256 = %(markdown_sha256)s AND d.raw_extraction IS NOT NULL
ORDER BY d.processing_completed_at, d.id
LIMIT 1;

-- name: advance_document
-- First statement of every checkpoint. No row: the claim has moved on and nothing of this checkpoint may be written.
WITH fenced AS (
    UPDATE file_extractions AS d
    SET milestone = %(milestone)s::document_milestone,
        state = %(state)s::document_state,
        lease_until = CASE WHEN %(state)s = 'working' THEN d.lease_until END,
        retry_count = %(retry_count)s,
        not_before = CASE WHEN %(state)s = 'retrying' THEN now() + make_interval(secs => %(next_delay)s) END,
        waiting_for = CASE WHEN %(state)s = 'working' THEN d.waiting_for ELSE %(waiting_for)s END,
        waiting_revision = CASE WHEN %(state)s = 'working' THEN d.waiting_revision ELSE %(waiting_revision)s END,
        waiting_place = CASE WHEN %(state)s = 'working' THEN d.waiting_place ELSE %(waiting_place)s END,
        waiting_since = CASE
            WHEN %(state)s = 'retrying' AND %(waits)s THEN CASE
                WHEN d.milestone = %(milestone)s::document_milestone AND NOT %(gained)s THEN coalesce(d.waiting_since, now())
                ELSE now()
            END
            WHEN %(state)s IN ('working', 'queued') AND NOT %(gained)s THEN d.waiting_since
        END,
        crash_count = CASE WHEN d.milestone = %(milestone)s::document_milestone THEN d.crash_count ELSE 0 END,
        lone_crash_count = CASE WHEN d.milestone = %(milestone)s::document_milestone THEN d.lone_crash_count ELSE 0 END,
        requeue_count = CASE WHEN d.milestone = %(milestone)s::document_milestone THEN d.requeue_count ELSE 0 END,
        alone = d.alone AND %(state)s = 'working',
        error_type = %(error_type)s::document_error_type,
        error_message = %(error_message)s,
        file_size = coalesce(%(file_size)s, d.file_size),
        content_sha256 = coalesce(%(content_sha256)s, d.content_sha256),
        file_type = coalesce(%(file_type)s, d.file_type),
        mime_type = coalesce(%(mime_type)s, d.mime_type),
        page_count = coalesce(%(page_count)s, d.page_count),
        chunk_count = coalesce(%(chunk_count)s, d.chunk_count),
        duplicate_of = coalesce(%(duplicate_of)s, d.duplicate_of),
        served_version = CASE WHEN %(state)s = 'complete' THEN d.version WHEN %(state)s <> 'duplicate' THEN d.served_version END,
        raw_extraction = CASE
            WHEN %(state)s = 'complete' THEN %(raw_extraction)s::jsonb WHEN %(state)s <> 'duplicate' THEN d.raw_extraction
        END,
        processing_completed_at = CASE WHEN %(state)s IN ('complete', 'failed', 'duplicate') THEN clock_timestamp() END,
        updated_at = now()
    WHERE d.doc_id = %(doc_id)s AND d.claim = %(claim)s AND d.state = 'working'
    RETURNING d.doc_id, d.version, d.batch_id, d.user_id, d.correlation_id, d.priority, d.claim
), finished AS (
    -- The job ends with the work that it was for, so that no crash can come between the two.
    UPDATE procrastinate_jobs AS j
    SET status = 'succeeded', attempts = j.attempts + 1, abort_requested = FALSE
    FROM fenced AS f
    WHERE j.id = %(finished_job_id)s AND j.status = 'doing'
), told AS (
    INSERT INTO document_events (
        doc_id, version, batch_id, user_id, correlation_id, stage, event, attempt, duration_ms, cpu_ms, peak_memory_mb, worker, claim, detail
    )
    SELECT f.doc_id, f.version, f.batch_id, f.user_id, f.correlation_id, e.stage, e.event, e.attempt, e.duration_ms, e.cpu_ms,
        e.peak_memory_mb, %(worker)s, f.claim, e.detail
    FROM fenced AS f,
        jsonb_to_recordset(%(events)s::jsonb) AS e (
            stage text, event text, attempt integer, duration_ms float8, cpu_ms float8, peak_memory_mb float8, detail jsonb
        )
)
SELECT f.doc_id, CASE WHEN %(next_stage)s::text IS NOT NULL THEN
    defer_stage(f.doc_id, %(next_stage)s, f.priority, now() + make_interval(secs => %(next_delay)s))
END AS job_id
FROM fenced AS f;

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

-- name: store_extraction
INSERT INTO extraction_buffer AS b (doc_id, version, raw_extraction)
VALUES (%(doc_id)s, %(version)s, %(raw_extraction)s)
ON CONFLICT (doc_id, version) DO UPDATE SET raw_extraction = EXCLUDED.raw_extraction;

-- Rows come as one array a column, and an array in a column as its text: COPY refuses tables with row-level security, whatever the policy.

-- name: store_chunks
INSERT INTO document_chunks (
    id, doc_id, user_id, version, chunk_index, content, content_sha256, heading_path, page_start, page_end, char_start, char_end,
    language, metadata, embedding, embedding_model
)
SELECT c.id, %(doc_id)s, %(user_id)s, %(version)s, c.chunk_index, c.content, c.content_sha256,
    c.heading_path::text[], c.page_start, c.page_end, c.char_start, c.char_end, %(language)s, c.metadata, c.embedding, %(embedding_model)s
FROM unnest(
    %(ids)b::uuid[], %(indexes)b::integer[], %(contents)b::text[], %(hashes)b::text[], %(heading_paths)b::text[],
    %(page_starts)b::integer[], %(page_ends)b::integer[], %(char_starts)b::integer[], %(char_ends)b::integer[], %(metadata)b::jsonb[],
    %(embeddings)b::vector[]
) AS c (id, chunk_index, content, content_sha256, heading_path, page_start, page_end, char_start, char_end, metadata, embedding);

-- name: store_chunk_buffer
INSERT INTO chunk_buffer (
    doc_id, version, chunk_index, id, content, content_sha256, heading_path, page_start, page_end, char_start, char_end, metadata
)
SELECT %(doc_id)s, %(version)s, c.chunk_index, c.id, c.content, c.content_sha256,
    c.heading_path::text[], c.page_start, c.page_end, c.char_start, c.char_end, c.metadata
FROM unnest(
    %(ids)b::uuid[], %(indexes)b::integer[], %(contents)b::text[], %(hashes)b::text[], %(heading_paths)b::text[],
    %(page_starts)b::integer[], %(page_ends)b::integer[], %(char_starts)b::integer[], %(char_ends)b::integer[], %(metadata)b::jsonb[]
) AS c (id, chunk_index, content, content_sha256, heading_path, page_start, page_end, char_start, char_end, metadata);

-- name: lock_claim
-- First statement of what is stored while a stage goes on. No row: the claim has moved on and nothing may be written.
SELECT d.doc_id
FROM file_extractions AS d
WHERE d.doc_id = %(doc_id)s AND d.claim = %(claim)s AND d.state = 'working'
FOR NO KEY UPDATE;

-- name: find_kept_vectors
SELECT b.chunk_index, b.embedding
FROM vector_buffer AS b
WHERE b.doc_id = %(doc_id)s AND b.version = %(version)s AND b.embedding_model = %(embedding_model)s;

-- name: drop_buffered_vectors
DELETE FROM vector_buffer AS b
WHERE b.doc_id = %(doc_id)s AND b.version = %(version)s AND b.chunk_index = ANY(%(indexes)s);

-- name: drop_other_vectors
-- Those of another model, and those of which it is not known that they were written.
DELETE FROM vector_buffer AS b
WHERE b.doc_id = %(doc_id)s AND b.version = %(version)s
    AND NOT (b.embedding_model = %(embedding_model)s AND b.chunk_index = ANY(%(indexes)s));

-- name: find_hosted_jobs
SELECT h.part, h.job_id, extract(epoch FROM now() - h.started_at)::float8 AS seconds
FROM hosted_jobs AS h
WHERE h.doc_id = %(doc_id)s AND h.version = %(version)s AND h.service = %(service)s;

-- name: store_hosted_job
INSERT INTO hosted_jobs AS h (doc_id, version, part, job_id, service)
VALUES (%(doc_id)s, %(version)s, %(part)s, %(job_id)s, %(service)s)
ON CONFLICT (doc_id, version, part) DO UPDATE
SET job_id = EXCLUDED.job_id, service = EXCLUDED.service, started_at = EXCLUDED.started_at;

-- name: drop_hosted_job
DELETE FROM hosted_jobs AS h
WHERE h.doc_id = %(doc_id)s AND h.version = %(version)s AND h.part = %(part)s;

-- name: store_vectors
INSERT INTO vector_buffer (doc_id, version, chunk_index, embedding_model, embedding)
SELECT %(doc_id)s, %(version)s, v.chunk_index, %(embedding_model)s, v.embedding
FROM unnest(%(indexes)b::integer[], %(embeddings)b::vector[]) AS v (chunk_index, embedding);

-- name: drop_served_chunks
DELETE FROM document_chunks AS c WHERE c.doc_id = %(doc_id)s;

-- name: drop_other_markdown
DELETE FROM document_markdown AS m WHERE m.doc_id = %(doc_id)s AND m.version <> %(version)s;

-- name: clear_buffers
WITH chunks AS (
    DELETE FROM chunk_buffer AS b WHERE b.doc_id = %(doc_id)s
), vectors AS (
    DELETE FROM vector_buffer AS b WHERE b.doc_id = %(doc_id)s
), hosted AS (
    DELETE FROM hosted_jobs AS h WHERE h.doc_id = %(doc_id)s
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

-- name: settle_batch
SELECT settle_batch(%(batch_id)s);
