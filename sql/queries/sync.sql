-- What `docmill sync` asks and writes beside the submission of the folder.

-- name: find_stored_files
-- Documents that came in with a folder: this one, one around it or one inside it. `below`: the folder's path with a slash at its end.
-- `successor_state`: of the document that takes its place, while that has the same content.
SELECT d.doc_id, d.batch_id, d.run_id, d.source_path, d.content_sha256, d.file_size, d.version, d.state, d.duplicate_of, d.replaced_by,
    d.served_version IS NOT NULL AS served, extract(epoch FROM d.created_at)::float8 AS created_at, b.source_path AS folder, (
        SELECT s.state FROM file_extractions AS s
        WHERE d.replaced_by IS NOT NULL AND s.doc_id = d.replaced_by AND s.content_sha256 = d.content_sha256
    ) AS successor_state
FROM processing_jobs AS b
JOIN file_extractions AS d ON d.batch_id = b.batch_id AND d.user_id = b.user_id
WHERE b.user_id = %(user_id)s AND starts_with(d.source_path, %(below)s) AND (
    b.batch_id = %(batch_id)s OR starts_with(b.source_path, %(below)s) OR starts_with(%(below)s, rtrim(b.source_path, '/') || '/')
);

-- name: find_files_by_id
SELECT d.doc_id, d.batch_id, d.run_id, d.source_path, d.content_sha256, d.file_size, d.version, d.state, d.duplicate_of, d.replaced_by,
    d.served_version IS NOT NULL AS served, extract(epoch FROM d.created_at)::float8 AS created_at, NULL AS folder,
    NULL AS successor_state
FROM file_extractions AS d
WHERE d.doc_id = ANY(%(doc_ids)s) AND d.user_id = %(user_id)s;

-- name: find_archives
-- Archives of the folder, those inside of archives included, with what they last held. `in_run`: whether the batch's present run has them;
-- `ended`: it is sealed and has unpacked them, or `failed` to; `unfinished`: neither of these yet, or it was cancelled; `open`: not yet.
-- `documents`: that they should have become in that run, as far as they were unpacked; each one inside of another is an entry of that one.
SELECT a.entry_path, b.run_id, (array_agg(a.content_sha256 ORDER BY a.id DESC))[1] AS content_sha256, bool_or(a.run_id = b.run_id) AS in_run,
    b.sealed_at IS NOT NULL AND bool_or(a.run_id = b.run_id AND a.state IN ('unpacked', 'failed')) AS ended,
    bool_or(a.run_id = b.run_id AND a.state = 'failed') AS failed,
    bool_or(a.run_id = b.run_id AND a.state NOT IN ('unpacked', 'failed')) AS unfinished,
    bool_or(a.run_id = b.run_id AND a.state IN ('waiting', 'unpacking')) AS open, b.status = 'cancelled' AS cancelled,
    coalesce(sum(CASE a.state WHEN 'unpacked' THEN a.entry_count ELSE a.unpacked_count END - (a.parent_id IS NOT NULL)::integer)
        FILTER (WHERE a.run_id = b.run_id), 0)::integer AS documents
FROM batch_archives AS a
JOIN processing_jobs AS b ON b.batch_id = a.batch_id
WHERE a.batch_id = %(batch_id)s AND b.user_id = %(user_id)s
GROUP BY a.entry_path, b.id;

-- name: find_seen_files
SELECT f.path_id::text AS path_id, f.seen_as, f.content_sha256
FROM folder_files AS f
WHERE f.batch_id = %(batch_id)s;

-- name: remember_seen_files
-- The batch first: whoever deletes it takes these rows with it, and has come before or comes after.
WITH held AS MATERIALIZED (
    SELECT b.batch_id FROM processing_jobs AS b WHERE b.batch_id = %(batch_id)s FOR KEY SHARE
)
INSERT INTO folder_files AS f (batch_id, path_id, seen_as, content_sha256)
SELECT h.batch_id, s.path_id, s.seen_as, s.content_sha256
FROM unnest(%(path_ids)s::uuid[], %(seen_as)s::text[], %(hashes)s::text[]) AS s (path_id, seen_as, content_sha256)
CROSS JOIN held AS h
ON CONFLICT (batch_id, path_id) DO UPDATE
SET seen_as = EXCLUDED.seen_as, content_sha256 = EXCLUDED.content_sha256, seen_at = now();

-- name: forget_seen_files
WITH held AS MATERIALIZED (
    SELECT b.batch_id FROM processing_jobs AS b WHERE b.batch_id = %(batch_id)s FOR KEY SHARE
)
DELETE FROM folder_files AS f USING held AS h WHERE f.batch_id = h.batch_id AND f.path_id = ANY(%(path_ids)s::uuid[]);

-- name: keep_documents
-- Their files are there again.
UPDATE file_extractions AS d
SET replaced_by = NULL, updated_at = now()
FROM (
    SELECT f.id FROM file_extractions AS f
    WHERE f.doc_id = ANY(%(doc_ids)s) AND f.user_id = %(user_id)s AND f.replaced_by IS NOT NULL
    ORDER BY f.id FOR UPDATE
) AS mine
WHERE d.id = mine.id;

-- name: let_document_be_replaced
-- Not if it has been submitted again since it was looked at.
UPDATE file_extractions AS d
SET replaced_by = %(replaced_by)s, updated_at = now()
WHERE d.doc_id = %(doc_id)s AND d.version = %(version)s AND d.run_id IS NOT DISTINCT FROM %(run_id)s
    AND d.replaced_by IS DISTINCT FROM %(replaced_by)s
RETURNING d.doc_id;

-- name: delete_vanished_document
-- Not if it has been submitted again since it was looked at; the lock makes that sure.
WITH mine AS MATERIALIZED (
    SELECT d.doc_id
    FROM file_extractions AS d
    WHERE d.doc_id = %(doc_id)s AND d.version = %(version)s AND d.run_id IS NOT DISTINCT FROM %(run_id)s
    FOR UPDATE
)
SELECT delete_document(m.doc_id) AS deleted FROM mine AS m;

-- name: find_replaced_documents
SELECT d.doc_id
FROM file_extractions AS d
JOIN file_extractions AS successor ON successor.doc_id = d.replaced_by AND successor.state IN ('complete', 'duplicate')
WHERE d.replaced_by IS NOT NULL AND is_replaced(d)
ORDER BY d.id
LIMIT %(most)s;

-- name: delete_replaced_document
SELECT delete_replaced_document(%(doc_id)s) AS outcome;

-- name: try_lock_folder
SELECT pg_try_advisory_lock(hashtextextended('docmill sync ' || %(batch_id)s, 0)) AS locked;

-- name: unlock_folder
SELECT pg_advisory_unlock(hashtextextended('docmill sync ' || %(batch_id)s, 0));

-- name: limit_sync_wait
SELECT set_config('lock_timeout', %(lock_timeout_ms)s || 'ms', TRUE);
