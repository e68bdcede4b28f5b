-- What re-embedding asks and does beside the functions of 0010_reembedding.

-- name: serving_model
SELECT s.embedding_model, s.dimensions FROM serving_embeddings AS s;

-- name: where_served_vectors_lie
SELECT embedding_table(%(embedding_model)s) AS table_name;

-- name: reembedding_steps
SELECT s.step, s.embedding_model, s.reembedding_id FROM reembedding_steps() AS s;

-- name: queue_reembedding
SELECT queue_reembedding(%(delay)s, %(job_id)s) AS job_id;

-- name: await_passage_writers
SELECT await_passage_writers();

-- name: list_documents_to_embed
SELECT list_documents_to_embed(%(reembedding_id)s);

-- name: passages_to_embed
-- The documents of a part of the list, in order, with the passages that have no vector of the model where it is to lie: in document_chunks if
-- it serves, aside if a run goes over to it. A document that lacks none, or is gone, has a row of nulls.
SELECT l.doc_id, c.id, c.user_id, c.content_sha256, c.content
FROM (
    SELECT %(embedding_model)s = serving_model() AS is_serving, embedding_table(%(embedding_model)s) = 'chunk_embeddings' AS is_aside OFFSET 0
) AS w
CROSS JOIN (
    SELECT e.doc_id
    FROM embeddings_to_make AS e
    WHERE e.embedding_model = %(embedding_model)s AND e.doc_id > %(after)s AND (e.is_urgent OR NOT %(only_urgent)s)
        AND (coalesce(e.not_before, now()) <= now() OR NOT EXISTS (
            SELECT FROM file_extractions AS f WHERE f.doc_id = e.doc_id OFFSET 0
        ))
    ORDER BY e.doc_id
    LIMIT %(documents)s
) AS l
LEFT JOIN LATERAL (
    SELECT p.id, p.user_id, p.content_sha256, p.content
    FROM document_chunks AS p
    WHERE p.doc_id = l.doc_id AND (w.is_serving AND p.embedding_model <> %(embedding_model)s OR w.is_aside AND NOT EXISTS (
        SELECT FROM chunk_embeddings AS s WHERE s.chunk_id = p.id AND s.embedding_model = %(embedding_model)s
    ))
    ORDER BY p.chunk_index
    LIMIT %(passages)s
) AS c ON TRUE
ORDER BY l.doc_id
LIMIT %(passages)s;

-- name: held_documents
-- Those that somebody's transaction holds at this moment: embedding them would be for nothing.
WITH free AS MATERIALIZED (
    SELECT d.doc_id FROM file_extractions AS d WHERE d.doc_id = ANY(%(doc_ids)s) ORDER BY d.id FOR NO KEY UPDATE SKIP LOCKED
)
SELECT d.doc_id FROM file_extractions AS d WHERE d.doc_id = ANY(%(doc_ids)s) AND d.doc_id NOT IN (SELECT f.doc_id FROM free AS f);

-- name: store_embeddings
SELECT s.stored, s.settled, s.got_on
FROM store_embeddings(%(embedding_model)s, %(doc_ids)s, %(chunk_ids)s, %(embeddings)b::vector[]) AS s;

-- name: note_reembedding_progress
-- Of its own, after what it tells of: a crash in between costs the count something, and nothing else. A set that has grown since it was ready
-- may be large enough for an index now: it is called ready again once that has been looked at.
UPDATE reembeddings AS r
SET state = CASE r.state WHEN 'ready' THEN 'running' ELSE r.state END, ready_at = CASE r.state WHEN 'ready' THEN NULL ELSE r.ready_at END,
    done = CASE WHEN r.switched_at IS NULL THEN r.done + %(got_on)s ELSE r.done END, error_message = NULL, worker = %(worker)s,
    updated_at = clock_timestamp(), dimensions = coalesce(r.dimensions, %(dimensions)s)
WHERE r.to_model = %(embedding_model)s AND r.state IN ('running', 'paused', 'ready', 'switched');

-- name: put_off_embeddings
SELECT put_off_embeddings(%(embedding_model)s, %(doc_ids)s, %(message)s, %(delay)s) AS attempts;

-- name: move_embeddings
SELECT m.moved, m.last_doc FROM move_embeddings(%(after)s, %(most)s) AS m;

-- name: settle_embeddings
SELECT settle_embeddings(%(reembedding_id)s);

-- name: clear_embeddings
SELECT clear_embeddings(%(most)s) AS cleared;

-- name: note_reembedding_trouble
UPDATE reembeddings AS r SET error_message = %(message)s, worker = %(worker)s
WHERE r.to_model = %(embedding_model)s AND r.state IN ('running', 'paused', 'ready', 'switched');

-- name: set_reembedding_dimensions
UPDATE reembeddings AS r SET dimensions = %(dimensions)s WHERE r.id = %(reembedding_id)s AND r.dimensions IS DISTINCT FROM %(dimensions)s;

-- name: make_reembedding_ready
UPDATE reembeddings AS r
SET state = 'ready', ready_at = coalesce(r.ready_at, clock_timestamp()), error_message = NULL, updated_at = clock_timestamp()
WHERE r.id = %(reembedding_id)s AND r.state = 'running'
    AND NOT EXISTS (SELECT FROM embeddings_to_make AS l WHERE l.embedding_model = r.to_model);

-- name: find_reembedding
SELECT r.from_model, r.from_dimensions, r.to_model, r.dimensions, r.switched_at FROM reembeddings AS r WHERE r.id = %(reembedding_id)s;

-- name: switch_reembedding
SELECT switch_reembedding(%(despite_lacking)s) AS state;

-- name: complete_reembedding
UPDATE reembeddings AS r SET state = 'complete', ended_at = clock_timestamp(), updated_at = clock_timestamp(), error_message = NULL
WHERE r.id = %(reembedding_id)s AND r.state = 'switched';

-- name: forget_reembedding
UPDATE reembeddings AS r SET ended_at = clock_timestamp(), updated_at = clock_timestamp()
WHERE r.id = %(reembedding_id)s AND r.state = 'cancelled' AND r.ended_at IS NULL;

-- name: start_reembedding
SELECT start_reembedding(%(to_model)s, %(switch)s, %(priority)s) AS id;

-- name: pause_reembedding
SELECT pause_reembedding() AS state;

-- name: resume_reembedding
SELECT resume_reembedding() AS state;

-- name: cancel_reembedding
SELECT cancel_reembedding() AS state;

-- name: show_reembeddings
SELECT s.id, s.state, s.from_model, s.to_model, s.switch, s.priority, s.done, s.total, s.lacking, s.failing, s.to_move, s.rate,
    s.seconds_left, s.error_message, s.worker, s.started_at, r.listed_at, s.updated_at, s.ready_at, s.switched_at, s.ended_at
FROM reembedding_status AS s
JOIN reembeddings AS r ON r.id = s.id
ORDER BY s.id DESC
LIMIT %(limit)s;
