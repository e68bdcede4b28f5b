-- Cancelling and deleting documents and batches, and removing the files of the deleted.

-- name: batch_of_document
SELECT d.batch_id FROM file_extractions AS d WHERE d.doc_id = %(doc_id)s;

-- name: claim_of_document
-- Cancelling an unfinished document changes it.
SELECT d.claim FROM file_extractions AS d WHERE d.doc_id = %(doc_id)s;

-- name: settle_cancelled
-- A settled batch is summed up again only where the document has not been as it is for its summary already.
SELECT settle_batch(b.batch_id)
FROM file_extractions AS d
JOIN processing_jobs AS b ON b.batch_id = d.batch_id
WHERE d.doc_id = %(doc_id)s AND (b.settled_at IS NULL OR d.claim IS DISTINCT FROM %(claim)s::bigint);

-- name: settle_bereft
-- Of a settled batch the deletion has left a note: its summary is made again by a reconciler, once for all that were deleted meanwhile.
SELECT settle_batch(b.batch_id) FROM processing_jobs AS b WHERE b.batch_id = %(batch_id)s AND b.settled_at IS NULL;

-- name: cancel_document
SELECT cancel_document(%(doc_id)s, %(lock_timeout_ms)s) AS state;

-- name: delete_document
SELECT delete_document(%(doc_id)s, %(lock_timeout_ms)s) AS deleted;

-- name: cancel_batch
SELECT cancel_batch(%(batch_id)s) AS cancelled;

-- name: mark_batch_cancelled
SELECT mark_batch_cancelled(%(batch_id)s, %(lock_timeout_ms)s) AS marked;

-- name: cancel_documents
SELECT cancel_documents(%(batch_id)s, %(max_count)s, %(lock_timeout_ms)s) AS cancelled;

-- name: delete_documents
SELECT delete_documents(%(batch_id)s, %(max_count)s, %(lock_timeout_ms)s) AS deleted;

-- name: delete_batch
SELECT delete_batch(%(batch_id)s, %(lock_timeout_ms)s) AS deleted;

-- name: noted_files
SELECT n.path, n.doc_id
FROM files_to_remove AS n
ORDER BY n.noted_at
LIMIT %(most)s;

-- name: noted_files_since
SELECT n.path, n.doc_id
FROM files_to_remove AS n
WHERE n.noted_at >= %(since)s
ORDER BY n.noted_at
LIMIT %(most)s;

-- name: noted_files_of
SELECT n.path, n.doc_id
FROM files_to_remove AS n
WHERE n.doc_id = %(doc_id)s
ORDER BY n.noted_at
LIMIT %(most)s;

-- name: note_unneeded_file
-- Where somebody's open transaction has noted it too, that one's end decides. Should it be undone, the next look at the storage finds the file.
SELECT note_file_unless_held(%(path)s, %(doc_id)s) AS noted;

-- name: judge_file
SELECT judge_file(%(path)s) AS verdict;

-- name: put_off_file
-- Behind all others, so that files that have to wait keep none from being looked at.
UPDATE files_to_remove AS n SET noted_at = clock_timestamp()
WHERE n.path = (SELECT f.path FROM files_to_remove AS f WHERE f.path = %(path)s FOR NO KEY UPDATE SKIP LOCKED);

-- name: forget_file
DELETE FROM files_to_remove AS n WHERE n.path = %(path)s;
