-- The right to work on a document: claimed, looked at, put off, renewed. See jobs/pipeline.

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

-- name: take_along
-- More documents for a worker that has claimed one: the columns of `claim_document`, and the job that each was fetched with.
SELECT d.doc_id, d.version, d.served_version, d.user_id, d.batch_id, d.correlation_id, d.file_name, d.file_path, d.metadata,
    d.milestone, d.file_size, d.content_sha256, d.file_type, d.mime_type, d.duplicate_of, d.priority, d.retry_count,
    d.crash_count, d.claim, extract(epoch FROM now() - d.waiting_since)::float8 AS waited_seconds, TRUE AS may_parse,
    %(serialise)s AND (d.milestone = 'uploaded' OR NOT EXISTS (
        SELECT FROM file_extractions AS o
        WHERE o.user_id = d.user_id AND o.content_sha256 = d.content_sha256 AND o.state = 'complete'
    )) AS is_sole,
    d.claim_job_id
FROM take_along(
    %(job_id)s, %(worker)s, %(lease_seconds)s, %(serialise)s, %(at_most)s, %(max_bytes)s, %(max_documents)s
) AS d;

-- name: claim_alone
-- Says that the document has its worker to itself from now on, so that the next crash is its own. One that somebody's open transaction
-- holds is an error at once: nobody else could work here meanwhile.
UPDATE file_extractions AS d SET alone = TRUE
FROM (
    SELECT f.id
    FROM file_extractions AS f
    WHERE f.doc_id = %(doc_id)s AND f.claim = %(claim)s AND f.state = 'working'
    FOR NO KEY UPDATE NOWAIT
) AS held
WHERE d.id = held.id;

-- name: look_at_document
SELECT d.state, d.milestone, d.claim, d.claim_job_id, extract(epoch FROM d.lease_until - now())::float8 AS lease_seconds_left,
    extract(epoch FROM d.not_before - now())::float8 AS wait_seconds_left,
    extract(epoch FROM now() - d.updated_at)::float8 AS unchanged_seconds
FROM file_extractions AS d
WHERE d.doc_id = %(doc_id)s;

-- name: look_at_owner
-- The equal document that this one waits for, for how long it has waited, and for how long the other one waits still.
SELECT o.doc_id, extract(epoch FROM now() - d.updated_at)::float8 AS waited_seconds,
    extract(epoch FROM o.not_before - now())::float8 AS wait_seconds_left
FROM file_extractions AS d
JOIN file_extractions AS o ON o.user_id = d.user_id AND o.content_sha256 = d.content_sha256 AND o.owns_content AND o.id <> d.id
WHERE d.doc_id = %(doc_id)s AND d.milestone = 'upload_validated';

-- name: was_deleted
SELECT EXISTS (
    SELECT FROM document_events AS e WHERE e.doc_id = %(doc_id)s AND e.event = 'deleted'
) AS deleted;

-- name: limit_lock_waits
-- For the rest of the transaction: whoever submits, cancels or seals in an open transaction may be in no hurry.
SELECT set_config('lock_timeout', %(milliseconds)s::text, TRUE);

-- name: put_off_stage
-- Waits for a transaction that is putting the same job into the queue.
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
