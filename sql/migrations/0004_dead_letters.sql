-- Dead letters come back or are put away, and alerts are kept until somebody has been told.
--
-- Requeue takes a failed document up again at the stage that failed: its milestone stays, so nothing before it is run again. Whoever
-- resolves a letter holds its document's lock, so of two who requeue at once one is refused. The batch row is never locked in a document's
-- transaction: reopen_batch and reopen_batches are called afterwards, and settle_batch ends the batch again. Where nobody calls them,
-- settle_batch still sets the batch's status right when the document ends.

CREATE INDEX dead_letters_document ON dead_letters (doc_id, id);

CREATE FUNCTION lock_dead_letter(letter_id bigint) RETURNS dead_letters LANGUAGE plpgsql AS $$
DECLARE
    letter dead_letters;
BEGIN
    SELECT l.* INTO letter FROM dead_letters AS l WHERE l.id = letter_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no dead letter %', coalesce(letter_id::text, 'null') USING ERRCODE = 'no_data_found';
    END IF;
    PERFORM FROM file_extractions AS f WHERE f.doc_id = letter.doc_id FOR UPDATE;
    -- A statement of its own: it sees what was done to the letter while the one before waited for the lock.
    SELECT l.* INTO letter FROM dead_letters AS l WHERE l.id = letter_id;
    IF letter.resolved_at IS NOT NULL THEN
        RAISE EXCEPTION 'dead letter % (document "%", version %) was % at %', letter.id, letter.doc_id, letter.version,
            CASE letter.resolution
                WHEN 'superseded' THEN 'superseded by new content'
                WHEN 'deleted' THEN 'closed because the document was deleted'
                ELSE letter.resolution
            END, letter.resolved_at
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    RETURN letter;
END;
$$;
COMMENT ON FUNCTION lock_dead_letter IS 'Locks the document of an open dead letter and returns the letter; an error if the number is unknown or the letter resolved.';

CREATE FUNCTION resume_failed_document(d file_extractions, letter dead_letters) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    UPDATE dead_letters AS l SET resolved_at = now(), resolution = 'requeued' WHERE l.id = letter.id;
    UPDATE file_extractions AS f
    SET state = 'queued', claim = f.claim + 1, claim_job_id = NULL, retry_count = 0, crash_count = 0, lone_crash_count = 0, not_before = NULL,
        requeue_count = 0, error_type = NULL, error_message = NULL, processing_completed_at = NULL, updated_at = now()
    WHERE f.id = d.id;
    PERFORM drop_waiting_jobs(d.doc_id);
    PERFORM defer_stage(d.doc_id, due_stage(d.milestone), d.priority);
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, stage, event, claim, detail)
    VALUES (d.doc_id, d.version, d.batch_id, d.user_id, d.correlation_id, due_stage(d.milestone), 'requeued_by_operator', d.claim + 1,
        jsonb_build_object('dead_letter', letter.id, 'failed_as', letter.error_type, 'role', session_user));
    RETURN due_stage(d.milestone);
END;
$$;
COMMENT ON FUNCTION resume_failed_document IS 'Queues a failed document, whose lock is held, at the stage that failed; resolves its open letter.';

CREATE FUNCTION requeue_dead_letter(id bigint) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    letter dead_letters := lock_dead_letter(id);
    d file_extractions;
BEGIN
    SELECT f.* INTO d FROM file_extractions AS f WHERE f.doc_id = letter.doc_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'document "%" of dead letter % no longer exists; the letter can only be discarded', letter.doc_id, letter.id
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    IF d.version <> letter.version OR d.state <> 'failed' THEN
        RAISE EXCEPTION 'dead letter % is of version % of document "%", which is now % at version %',
            letter.id, letter.version, d.doc_id, d.state, d.version
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    RETURN resume_failed_document(d, letter);
END;
$$;
COMMENT ON FUNCTION requeue_dead_letter IS
    'Takes a failed document up again at the stage that failed and returns that stage. Then, if it has a batch: SELECT reopen_batch(batch_id).';

CREATE FUNCTION requeue_document(doc_id text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    letter dead_letters;
    known file_extractions;
BEGIN
    SELECT l.* INTO letter FROM dead_letters AS l WHERE l.doc_id = requeue_document.doc_id ORDER BY l.id DESC LIMIT 1;
    IF letter.id IS NOT NULL AND letter.resolved_at IS NULL THEN
        RETURN requeue_dead_letter(letter.id);
    END IF;
    SELECT f.* INTO known FROM file_extractions AS f WHERE f.doc_id = requeue_document.doc_id;
    IF known.id IS NULL THEN
        RAISE EXCEPTION 'there is no document "%"', requeue_document.doc_id USING ERRCODE = 'no_data_found';
    END IF;
    RAISE EXCEPTION 'document "%" is % and has no open dead letter%', known.doc_id, known.state,
        coalesce(format(' (the last one, %s, was %s)', letter.id, letter.resolution), '')
        USING ERRCODE = 'object_not_in_prerequisite_state';
END;
$$;
COMMENT ON FUNCTION requeue_document IS 'Requeues the open dead letter of a document; see requeue_dead_letter.';

CREATE FUNCTION discard_dead_letter(id bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    letter dead_letters := lock_dead_letter(id);
BEGIN
    UPDATE dead_letters AS l SET resolved_at = now(), resolution = 'discarded' WHERE l.id = letter.id;
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, stage, event, detail)
    VALUES (letter.doc_id, letter.version, letter.batch_id, letter.user_id, letter.correlation_id, letter.stage, 'discarded_by_operator',
        jsonb_build_object('dead_letter', letter.id, 'failed_as', letter.error_type, 'role', session_user));
END;
$$;
COMMENT ON FUNCTION discard_dead_letter IS 'Puts a dead letter away; its document stays failed until new content is submitted.';

CREATE FUNCTION requeue_dead_letters(
    error_type document_error_type DEFAULT NULL, stage text DEFAULT NULL, batch_id text DEFAULT NULL, user_id text DEFAULT NULL,
    max_count integer DEFAULT 1000, up_to_id bigint DEFAULT NULL
) RETURNS integer LANGUAGE plpgsql AS $$
-- Documents that somebody else holds are passed over rather than waited for: this transaction locks many, and whoever else does so may
-- take them in another order.
DECLARE
    candidate record;
    letter dead_letters;
    d file_extractions;
    done integer := 0;
BEGIN
    FOR candidate IN
        SELECT f.id AS document, l.id AS letter
        FROM dead_letters AS l
        JOIN file_extractions AS f ON f.doc_id = l.doc_id AND f.version = l.version AND f.state = 'failed'
        WHERE l.resolved_at IS NULL
            AND (requeue_dead_letters.error_type IS NULL OR l.error_type = requeue_dead_letters.error_type)
            AND (requeue_dead_letters.stage IS NULL OR l.stage = requeue_dead_letters.stage)
            AND (requeue_dead_letters.batch_id IS NULL OR f.batch_id = requeue_dead_letters.batch_id)
            AND (requeue_dead_letters.user_id IS NULL OR l.user_id = requeue_dead_letters.user_id)
            AND (up_to_id IS NULL OR l.id <= up_to_id)
        ORDER BY f.id
    LOOP
        EXIT WHEN done >= max_count;
        SELECT f.* INTO d FROM file_extractions AS f WHERE f.id = candidate.document FOR UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND;
        SELECT l.* INTO letter FROM dead_letters AS l WHERE l.id = candidate.letter;
        IF letter.resolved_at IS NULL AND d.state = 'failed' AND d.version = letter.version THEN
            PERFORM resume_failed_document(d, letter);
            done := done + 1;
        END IF;
    END LOOP;
    RETURN done;
END;
$$;
COMMENT ON FUNCTION requeue_dead_letters IS
    'Requeues open dead letters that match all filters given, at most max_count (null: all), and returns how many; call it until it returns 0. Then SELECT reopen_batches().';

CREATE FUNCTION reopen_batch(batch_id text) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    batch processing_jobs;
BEGIN
    SELECT b.* INTO batch FROM processing_jobs AS b WHERE b.batch_id = reopen_batch.batch_id FOR NO KEY UPDATE;
    -- A batch that is not sealed could not be ended again.
    IF NOT FOUND OR batch.completed_at IS NULL OR batch.sealed_at IS NULL OR batch.status = 'cancelled' THEN
        RETURN NULL;
    END IF;
    -- A statement of its own: what ended while the one before waited for the lock is no reason to reopen. What ends from now on calls
    -- settle_batch, which waits for this transaction.
    UPDATE processing_jobs AS b
    SET status = 'processing', completed_at = NULL, error_message = NULL, updated_at = now()
    WHERE b.id = batch.id AND EXISTS (
        SELECT FROM file_extractions AS d
        WHERE d.batch_id = batch.batch_id AND d.run_id = batch.run_id AND d.state IN ('queued', 'working', 'retrying')
    )
    RETURNING b.status INTO batch.status;
    RETURN CASE WHEN FOUND THEN batch.status END;
END;
$$;
COMMENT ON FUNCTION reopen_batch IS
    'Sets an ended batch back to processing if a document of its run is unfinished again, and returns its status; null if nothing changed. Call it in a transaction of its own.';

CREATE FUNCTION reopen_batches(requeued_since timestamptz DEFAULT now() - interval '1 hour') RETURNS integer LANGUAGE sql AS $$
    SELECT count(reopen_batch(b.batch_id))::integer
    FROM (
        SELECT DISTINCT d.batch_id
        FROM dead_letters AS l
        JOIN file_extractions AS d ON d.doc_id = l.doc_id
        WHERE l.resolution = 'requeued' AND l.resolved_at >= requeued_since AND d.batch_id IS NOT NULL
        ORDER BY d.batch_id
    ) AS b;
$$;
COMMENT ON FUNCTION reopen_batches IS 'Does reopen_batch for every batch with a dead letter requeued since then and returns how many it reopened.';

CREATE VIEW dead_letter_queue WITH (security_invoker = true) AS
SELECT
    l.id, l.doc_id, d.file_name, d.batch_id, l.user_id, l.version, l.stage, l.error_type, l.error_message, l.created_at,
    date_trunc('second', now() - l.created_at) AS age,
    CASE WHEN d.state = 'failed' AND d.version = l.version THEN
        format('SELECT requeue_dead_letter(%s);', l.id) || coalesce(' SELECT reopen_batch(' || quote_literal(d.batch_id) || ');', '')
    END AS how_to_requeue
FROM dead_letters AS l
LEFT JOIN file_extractions AS d ON d.doc_id = l.doc_id
WHERE l.resolved_at IS NULL
ORDER BY l.id DESC;
COMMENT ON VIEW dead_letter_queue IS 'Open dead letters, the newest first.';
COMMENT ON COLUMN dead_letter_queue.id IS 'Number of the dead letter.';
COMMENT ON COLUMN dead_letter_queue.batch_id IS 'The batch that the document belongs to now.';
COMMENT ON COLUMN dead_letter_queue.age IS 'How long ago it failed.';
COMMENT ON COLUMN dead_letter_queue.how_to_requeue IS 'What to run, as two statements in two transactions if there is a batch; null if the document cannot go on.';

CREATE TABLE alerts (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    idempotency_key uuid NOT NULL UNIQUE DEFAULT gen_random_uuid(),
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    kind text NOT NULL,
    message text NOT NULL,
    detail jsonb NOT NULL DEFAULT '{}',
    forwarded_at timestamptz,
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    next_try_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_error text
);
COMMENT ON TABLE alerts IS 'Critical failures that somebody should hear of. A worker forwards them to ALERT_WEBHOOK_URL; without one they only stand here.';
COMMENT ON COLUMN alerts.id IS 'Order of writing.';
COMMENT ON COLUMN alerts.idempotency_key IS 'The same with every try to forward it, so that the receiver can tell a repetition.';
COMMENT ON COLUMN alerts.at IS 'When it was raised.';
COMMENT ON COLUMN alerts.kind IS 'dead_letter, or whatever else calls alert().';
COMMENT ON COLUMN alerts.message IS 'What happened, in plain words.';
COMMENT ON COLUMN alerts.detail IS 'More, depending on the kind.';
COMMENT ON COLUMN alerts.forwarded_at IS 'When the webhook accepted it; null before.';
COMMENT ON COLUMN alerts.attempts IS 'Tries that failed.';
COMMENT ON COLUMN alerts.next_try_at IS 'Not forwarded before.';
COMMENT ON COLUMN alerts.last_error IS 'Why the last try failed.';
CREATE INDEX alerts_unforwarded ON alerts (next_try_at, id) WHERE forwarded_at IS NULL;

CREATE OR REPLACE FUNCTION alert(kind text, message text, detail jsonb DEFAULT '{}') RETURNS void LANGUAGE plpgsql AS $$
-- The row is the alert; the notification only says that there is one, with as much of it as fits. NOTIFY takes less than 8,000 bytes and
-- more is an error, which would undo whatever the alert is about. A character takes 6 bytes at most.
DECLARE
    alert_id bigint;
    told jsonb;
BEGIN
    INSERT INTO alerts AS a (kind, message, detail) VALUES (alert.kind, alert.message, coalesce(alert.detail, '{}')) RETURNING a.id INTO alert_id;
    told := jsonb_build_object('id', alert_id, 'at', now(), 'kind', left(alert.kind, 100), 'message', left(alert.message, 1000));
    IF octet_length((told || jsonb_build_object('detail', alert.detail))::text) < 7900 THEN
        told := told || jsonb_build_object('detail', alert.detail);
    END IF;
    PERFORM pg_notify('docmill_alerts', told::text);
END;
$$;
COMMENT ON FUNCTION alert IS 'Keeps an alert in the table alerts and tells whoever listens on the channel docmill_alerts when the transaction commits.';
