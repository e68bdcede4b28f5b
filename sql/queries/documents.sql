-- What a stage has to know of a document, and what it keeps while it goes on. See jobs/pipeline.

-- name: load_markdown
SELECT m.markdown, m.markdown_sha256, m.page_map, m.parser, m.parse_metadata
FROM document_markdown AS m
WHERE m.doc_id = %(doc_id)s AND m.version = %(version)s;

-- name: load_digest
SELECT m.markdown_sha256 FROM document_markdown AS m WHERE m.doc_id = %(doc_id)s AND m.version = %(version)s;

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
-- Also those of a set that is being made, or waits to be moved. One a text: a user may have a passage thousands of times. It lies between two
-- equal bounds because the planner would read the whole table for each text where it takes most passages for equal.
SELECT h.content_sha256, k.embedding
FROM unnest(%(hashes)s::text[]) AS h (content_sha256)
CROSS JOIN LATERAL (
    SELECT coalesce(s.embedding, c.embedding) AS embedding
    FROM document_chunks AS c
    LEFT JOIN chunk_embeddings AS s ON s.chunk_id = c.id AND s.embedding_model = %(embedding_model)s
    WHERE c.user_id = %(user_id)s AND c.content_sha256 BETWEEN h.content_sha256 AND h.content_sha256
        AND (c.embedding_model = %(embedding_model)s OR s.chunk_id IS NOT NULL)
    ORDER BY c.content_sha256
    LIMIT 1
) AS k;

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
-- The newest that did not fail: earlier ones may have been extracted without the model, or with another schema.
SELECT d.doc_id, d.file_name, d.raw_extraction
FROM file_extractions AS d
JOIN document_markdown AS m ON m.doc_id = d.doc_id AND m.version = d.version
WHERE d.user_id = %(user_id)s AND d.content_sha256 = %(content_sha256)s AND d.state = 'complete' AND d.doc_id <> %(doc_id)s
    AND m.markdown_sha256 = %(markdown_sha256)s AND NOT d.raw_extraction ? 'failure'
ORDER BY d.processing_completed_at DESC, d.id DESC
LIMIT 1;

-- name: lock_claim
-- First statement of what is stored while a stage goes on. No row: the claim has moved on and nothing may be written. A document that
-- somebody's open transaction holds is an error at once, as in `advance_documents`.
SELECT d.doc_id
FROM file_extractions AS d
WHERE d.doc_id = %(doc_id)s AND d.claim = %(claim)s AND d.state = 'working'
FOR NO KEY UPDATE NOWAIT;

-- name: find_kept_vectors
SELECT b.chunk_index, b.embedding
FROM vector_buffer AS b
WHERE b.doc_id = %(doc_id)s AND b.version = %(version)s AND b.embedding_model = %(embedding_model)s;

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

-- name: find_kept_answers
SELECT a.asked_sha256, a.data, a.model, a.repairs, a.tokens_in, a.tokens_out
FROM extraction_answers AS a
WHERE a.doc_id = %(doc_id)s AND a.version = %(version)s;

-- name: store_answer
INSERT INTO extraction_answers AS a (doc_id, version, part, asked_sha256, data, model, repairs, tokens_in, tokens_out)
VALUES (
    %(doc_id)s, %(version)s, %(part)s, %(asked_sha256)s, %(data)s, %(model)s, %(repairs)s, %(tokens_in)s, %(tokens_out)s
)
ON CONFLICT (doc_id, version, part) DO UPDATE
SET asked_sha256 = EXCLUDED.asked_sha256, data = EXCLUDED.data, model = EXCLUDED.model, repairs = EXCLUDED.repairs,
    tokens_in = EXCLUDED.tokens_in, tokens_out = EXCLUDED.tokens_out;

-- name: drop_answers
DELETE FROM extraction_answers AS a
WHERE a.doc_id = %(doc_id)s AND a.version = %(version)s;

-- name: store_vectors
-- Vectors of passages of one document or of several, in the place of what may lie there of another model, or of an attempt of which it is
-- not known that it was written. `whose` says whose they are by the place in `doc_ids`.
INSERT INTO vector_buffer AS b (doc_id, version, chunk_index, embedding_model, embedding)
SELECT d.doc_id, d.version, v.chunk_index, %(embedding_model)s, v.embedding
FROM unnest(%(indexes)s::integer[], %(embeddings)b::vector[], %(whose)s::integer[]) AS v (chunk_index, embedding, whose)
JOIN unnest(%(doc_ids)b::text[], %(versions)b::integer[]) WITH ORDINALITY AS d (doc_id, version, place) ON d.place = v.whose
ON CONFLICT (doc_id, version, chunk_index) DO UPDATE
SET embedding_model = EXCLUDED.embedding_model, embedding = EXCLUDED.embedding;

-- name: has_documents
SELECT EXISTS (SELECT FROM file_extractions);
