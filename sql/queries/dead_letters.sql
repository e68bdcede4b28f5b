-- What `docmill dead` asks and does.

-- name: list_dead_letters
SELECT q.id, q.doc_id, q.file_name, q.batch_id, q.user_id, q.version, q.stage, q.error_type, q.error_message, q.created_at,
    q.how_to_requeue, count(*) OVER () AS total
FROM dead_letter_queue AS q
WHERE (%(error_type)s::document_error_type IS NULL OR q.error_type = %(error_type)s::document_error_type)
    AND (%(stage)s::text IS NULL OR q.stage = %(stage)s)
    AND (%(batch_id)s::text IS NULL OR q.batch_id = %(batch_id)s)
    AND (%(user_id)s::text IS NULL OR q.user_id = %(user_id)s)
ORDER BY q.id DESC
LIMIT %(limit)s;

-- name: find_dead_letters
-- What a person may mean by a word: the number of a dead letter, or a document, whose newest letter it is then.
SELECT l.id, l.doc_id
FROM dead_letters AS l
WHERE l.id = %(number)s::bigint OR l.id = (SELECT max(m.id) FROM dead_letters AS m WHERE m.doc_id = %(word)s)
ORDER BY l.id;

-- name: show_dead_letter
SELECT l.id, l.doc_id, d.file_name, d.state, l.version, l.batch_id, l.user_id, l.correlation_id, l.stage, l.error_type, l.error_message,
    l.traceback, l.context, l.created_at, l.resolved_at, l.resolution, q.how_to_requeue
FROM dead_letters AS l
LEFT JOIN file_extractions AS d ON d.doc_id = l.doc_id
LEFT JOIN dead_letter_queue AS q ON q.id = l.id
WHERE l.id = %(id)s;

-- name: look_at_dead_letters
SELECT now() AS at, max(l.id) AS last_id FROM dead_letters AS l;

-- name: requeue_dead_letter
SELECT requeue_dead_letter(%(id)s, %(priority)s::integer) AS stage;

-- name: discard_dead_letter
SELECT discard_dead_letter(%(id)s);

-- name: requeue_dead_letters
SELECT requeue_dead_letters(
    error_type => %(error_type)s::document_error_type, stage => %(stage)s::text, batch_id => %(batch_id)s::text,
    user_id => %(user_id)s::text, max_count => %(max_count)s, up_to_id => %(up_to_id)s, priority => %(priority)s::integer
) AS requeued;

-- name: reopen_batches
SELECT reopen_batches(%(since)s) AS batches;
