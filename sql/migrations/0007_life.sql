-- The life of documents after their submission: cancelled, deleted, or waiting for an equal one.
--
-- A claim is a number that the installation gives out once. A worker that comes back late, after its document was deleted and submitted
-- again under the same doc_id, holds a number that no row will ever have.
--
-- Equals are documents of one user with the same content. Of those that are unfinished one owns the content and is processed; the others
-- wait before parse, until it is complete and can be copied from, or has ended otherwise and the next one takes over.
--
-- Deleting notes the files and leaves them to remove_noted_files: they go once nobody can need them any more.

CREATE SEQUENCE document_claims;
COMMENT ON SEQUENCE document_claims IS 'Fencing tokens. No number is given to two claims of an installation.';

ALTER TABLE file_extractions ADD COLUMN owns_content boolean NOT NULL DEFAULT FALSE;
COMMENT ON COLUMN file_extractions.owns_content IS
    'Whether it is the one that is processed among the user''s unfinished documents with this content; the others wait for it.';
ALTER TABLE file_extractions ADD COLUMN replaced_by text;
COMMENT ON COLUMN file_extractions.replaced_by IS 'doc_id of the document that takes this one''s place, its file having been moved; this one is deleted once that one is complete.';
ALTER TABLE file_extractions ADD CONSTRAINT file_extractions_owns_check
    CHECK (NOT owns_content OR (content_sha256 IS NOT NULL AND state IN ('queued', 'working', 'retrying')));
CREATE UNIQUE INDEX file_extractions_owner ON file_extractions (user_id, content_sha256) WHERE owns_content;
CREATE INDEX file_extractions_originals ON file_extractions (user_id, content_sha256, processing_completed_at, id) WHERE state = 'complete';
CREATE INDEX file_extractions_duplicates ON file_extractions (id) WHERE state = 'duplicate';
CREATE INDEX file_extractions_duplicates_of ON file_extractions (duplicate_of) WHERE state = 'duplicate';
CREATE INDEX processing_jobs_cancelled ON processing_jobs (completed_at) WHERE status = 'cancelled';
-- Now that the table is locked: nobody claims with a number of before any more.
SELECT setval('document_claims', 1 + greatest(
    (SELECT max(d.claim) FROM file_extractions AS d), (SELECT max(e.claim) FROM document_events AS e), 0
), FALSE);

-- As before, and: the claim is the next number whenever it changes, and who ends no longer owns its content.
CREATE OR REPLACE FUNCTION refuse_invalid_transition() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    allowed boolean;
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.milestone <> 'uploaded' OR NEW.state <> 'queued' THEN
            RAISE EXCEPTION 'document %: a new document starts uploaded and queued, not % and %', NEW.doc_id, NEW.milestone, NEW.state
                USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END IF;
    IF NEW.version > OLD.version THEN
        allowed := NEW.milestone = 'uploaded' AND NEW.state = 'queued' AND NEW.claim > OLD.claim;
    ELSE
        allowed := NEW.version = OLD.version AND NEW.milestone >= OLD.milestone AND NEW.claim >= OLD.claim AND (
            NEW.state = OLD.state
            OR CASE OLD.state
                WHEN 'queued' THEN NEW.state IN ('working', 'failed', 'cancelled')
                WHEN 'working' THEN TRUE
                WHEN 'retrying' THEN NEW.state IN ('working', 'queued', 'failed', 'cancelled')
                WHEN 'failed' THEN NEW.state IN ('queued', 'cancelled')
                WHEN 'duplicate' THEN NEW.state = 'queued'
                WHEN 'cancelled' THEN NEW.state = 'queued'
                ELSE FALSE
            END
        );
    END IF;
    IF NOT allowed THEN
        RAISE EXCEPTION 'document %: version % % % cannot become version % % %', NEW.doc_id,
            OLD.version, OLD.milestone, OLD.state, NEW.version, NEW.milestone, NEW.state
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.claim <> OLD.claim THEN
        NEW.claim := nextval('document_claims');
    END IF;
    IF NEW.version > OLD.version OR NEW.state NOT IN ('queued', 'working', 'retrying') THEN
        NEW.owns_content := FALSE;
    END IF;
    RETURN NEW;
END;
$$;

CREATE OR REPLACE FUNCTION resume_failed_document(d file_extractions, letter dead_letters) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    token bigint;
BEGIN
    UPDATE dead_letters AS l SET resolved_at = now(), resolution = 'requeued' WHERE l.id = letter.id;
    UPDATE file_extractions AS f
    SET state = 'queued', claim = f.claim + 1, claim_job_id = NULL, retry_count = 0, crash_count = 0, lone_crash_count = 0, not_before = NULL,
        requeue_count = 0, error_type = NULL, error_message = NULL, processing_completed_at = NULL, updated_at = now()
    WHERE f.id = d.id
    RETURNING f.claim INTO token;
    PERFORM drop_waiting_jobs(d.doc_id);
    PERFORM defer_stage(d.doc_id, due_stage(d.milestone), d.priority);
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, stage, event, claim, detail)
    VALUES (d.doc_id, d.version, d.batch_id, d.user_id, d.correlation_id, due_stage(d.milestone), 'requeued_by_operator', token,
        jsonb_build_object('dead_letter', letter.id, 'failed_as', letter.error_type, 'role', session_user));
    RETURN due_stage(d.milestone);
END;
$$;

-- As before, and: a run that was cancelled takes in nothing, and a document that is deleted meanwhile is a new one.
CREATE OR REPLACE FUNCTION accept_document(
    doc_id text, user_id text, file_name text, file_path text, source_path text, file_size bigint, content_sha256 text,
    metadata jsonb, priority integer, correlation_id text, batch_id text, run_id uuid, lock_timeout_ms integer,
    OUT outcome text, OUT version integer, OUT state document_state
) LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
-- The SET clause restores the caller's own lock_timeout on the way out.
#variable_conflict use_column
DECLARE
    known file_extractions;
    run_status text;
BEGIN
    PERFORM set_config('lock_timeout', accept_document.lock_timeout_ms || 'ms', TRUE);
    IF accept_document.run_id IS NOT NULL THEN
        SELECT b.status INTO run_status
        FROM processing_jobs AS b WHERE b.batch_id = accept_document.batch_id AND b.run_id = accept_document.run_id;
        IF run_status IS NULL OR run_status = 'cancelled' THEN
            RAISE EXCEPTION 'batch "%": %', accept_document.batch_id, CASE
                WHEN run_status = 'cancelled' THEN 'this run of it has been cancelled'
                WHEN EXISTS (SELECT FROM processing_jobs AS b WHERE b.batch_id = accept_document.batch_id) THEN 'a newer run has begun'
                ELSE 'it has been deleted'
            END USING ERRCODE = 'object_not_in_prerequisite_state';
        END IF;
    END IF;
    LOOP
        INSERT INTO file_extractions AS d (
            doc_id, batch_id, run_id, user_id, file_name, file_path, source_path, file_size, content_sha256, priority, correlation_id, metadata
        ) VALUES (
            accept_document.doc_id, accept_document.batch_id, accept_document.run_id, accept_document.user_id,
            accept_document.file_name, accept_document.file_path, accept_document.source_path, accept_document.file_size,
            accept_document.content_sha256, accept_document.priority, accept_document.correlation_id, accept_document.metadata
        ) ON CONFLICT (doc_id) DO NOTHING
        RETURNING d.* INTO known;
        IF FOUND THEN
            outcome := 'accepted';
            EXIT;
        END IF;
        SELECT d.* INTO known FROM file_extractions AS d WHERE d.doc_id = accept_document.doc_id FOR UPDATE;
        EXIT WHEN FOUND;
        -- Deleted while this waited for the lock: then it is a new document.
    END LOOP;
    IF outcome IS NULL THEN
        IF known.user_id <> accept_document.user_id THEN
            RAISE EXCEPTION 'doc_id "%" is taken; choose another', accept_document.doc_id USING ERRCODE = 'unique_violation';
        END IF;
        IF known.content_sha256 = accept_document.content_sha256 THEN
            -- The same content again: nothing happens, except that a cancelled document is taken up where it was left.
            UPDATE file_extractions AS d SET batch_id = accept_document.batch_id, run_id = accept_document.run_id
            WHERE d.id = known.id AND d.run_id IS DISTINCT FROM accept_document.run_id AND accept_document.run_id IS NOT NULL;
            IF known.replaced_by IS NOT NULL THEN
                -- Its file is back where it was before it was moved.
                UPDATE file_extractions AS d SET replaced_by = NULL WHERE d.id = known.id;
            END IF;
            IF known.state <> 'cancelled' THEN
                outcome := 'unchanged';
                version := known.version;
                state := known.state;
                RETURN;
            END IF;
            UPDATE file_extractions AS d
            SET state = 'queued', claim = d.claim + 1, claim_job_id = NULL, retry_count = 0, crash_count = 0, lone_crash_count = 0,
                requeue_count = 0, alone = FALSE, not_before = NULL, processing_completed_at = NULL, updated_at = now()
            WHERE d.id = known.id RETURNING d.* INTO known;
            outcome := 'resumed';
            UPDATE dead_letters AS l SET resolved_at = now(), resolution = 'requeued'
            WHERE l.doc_id = known.doc_id AND l.resolved_at IS NULL;
        ELSE
            UPDATE file_extractions AS d
            SET version = d.version + 1, milestone = 'uploaded', state = 'queued', claim = d.claim + 1, claim_job_id = NULL,
                lease_until = NULL, batch_id = accept_document.batch_id, run_id = accept_document.run_id,
                file_name = accept_document.file_name, file_path = accept_document.file_path,
                source_path = accept_document.source_path, file_size = accept_document.file_size,
                content_sha256 = accept_document.content_sha256, file_type = NULL, mime_type = NULL, page_count = NULL,
                chunk_count = NULL, duplicate_of = NULL, priority = accept_document.priority,
                correlation_id = accept_document.correlation_id, metadata = accept_document.metadata, retry_count = 0,
                crash_count = 0, lone_crash_count = 0, requeue_count = 0, alone = FALSE, not_before = NULL,
                error_type = NULL, error_message = NULL, updated_at = now(),
                processing_started_at = NULL, processing_completed_at = NULL
            WHERE d.id = known.id RETURNING d.* INTO known;
            outcome := 'new_version';
            DELETE FROM chunk_buffer AS b WHERE b.doc_id = known.doc_id;
            DELETE FROM vector_buffer AS b WHERE b.doc_id = known.doc_id;
            DELETE FROM extraction_buffer AS b WHERE b.doc_id = known.doc_id;
            DELETE FROM document_markdown AS m
            WHERE m.doc_id = known.doc_id AND m.version IS DISTINCT FROM known.served_version;
            UPDATE dead_letters AS l SET resolved_at = now(), resolution = 'superseded'
            WHERE l.doc_id = known.doc_id AND l.resolved_at IS NULL;
        END IF;
        PERFORM drop_waiting_jobs(known.doc_id);
    END IF;
    PERFORM defer_stage(known.doc_id, due_stage(known.milestone), known.priority);
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, event, claim, detail)
    VALUES (known.doc_id, known.version, known.batch_id, known.user_id, known.correlation_id,
        CASE outcome WHEN 'accepted' THEN 'submitted' ELSE 'resubmitted' END, known.claim,
        jsonb_build_object('outcome', outcome, 'file_name', known.file_name, 'file_size', known.file_size));
    version := known.version;
    state := known.state;
END;
$$;

CREATE FUNCTION wake_equals() RETURNS trigger LANGUAGE plpgsql AS $$
-- All of them when there is something to copy; else the next one, so that many that fail one after another do not wake each other for
-- nothing. Jobs that somebody holds are passed over rather than waited for: this transaction holds another document. They look again by
-- themselves.
DECLARE
    most integer := 1;
BEGIN
    IF TG_OP = 'UPDATE' THEN
        most := CASE WHEN NEW.state NOT IN ('complete', 'duplicate') THEN 1 END;
    END IF;
    UPDATE procrastinate_jobs AS j SET scheduled_at = NULL
    FROM (
        SELECT w.id
        FROM file_extractions AS e
        JOIN procrastinate_jobs AS w ON w.status = 'todo' AND w.queueing_lock = due_stage(e.milestone) || ':' || e.doc_id
        WHERE e.user_id = OLD.user_id AND e.content_sha256 = OLD.content_sha256 AND e.id <> OLD.id
            AND e.state = 'queued' AND e.milestone = 'upload_validated' AND w.scheduled_at > now()
        ORDER BY e.id
        LIMIT most
        FOR UPDATE OF w SKIP LOCKED
    ) AS waiting
    WHERE j.id = waiting.id;
    RETURN NULL;
END;
$$;
COMMENT ON FUNCTION wake_equals IS 'Lets documents that wait for an equal one go on as soon as it has ended.';
CREATE TRIGGER file_extractions_content_released AFTER UPDATE ON file_extractions
    FOR EACH ROW WHEN (OLD.owns_content AND NOT NEW.owns_content) EXECUTE FUNCTION wake_equals();
CREATE TRIGGER file_extractions_content_deleted AFTER DELETE ON file_extractions
    FOR EACH ROW WHEN (OLD.owns_content) EXECUTE FUNCTION wake_equals();

CREATE FUNCTION has_original(d file_extractions) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (
        SELECT FROM file_extractions AS o
        WHERE o.doc_id = d.duplicate_of AND o.state = 'complete' AND o.user_id = d.user_id AND o.content_sha256 = d.content_sha256
            AND o.replaced_by IS NULL
    );
$$;
COMMENT ON FUNCTION has_original IS 'Whether the document that this one is a duplicate of is complete with the same content, and stays.';

CREATE FUNCTION requeue_duplicate(doc_id text) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    d file_extractions;
BEGIN
    SELECT f.* INTO d FROM file_extractions AS f
    WHERE f.doc_id = requeue_duplicate.doc_id AND f.state = 'duplicate' FOR UPDATE SKIP LOCKED;
    IF NOT FOUND OR has_original(d) THEN
        RETURN NULL;
    END IF;
    UPDATE file_extractions AS f
    SET state = 'queued', claim = f.claim + 1, claim_job_id = NULL, duplicate_of = NULL, retry_count = 0, crash_count = 0,
        lone_crash_count = 0, requeue_count = 0, processing_completed_at = NULL, updated_at = now()
    WHERE f.id = d.id;
    PERFORM drop_waiting_jobs(d.doc_id);
    PERFORM defer_stage(d.doc_id, due_stage(d.milestone), d.priority);
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, stage, event, claim, detail)
    VALUES (d.doc_id, d.version, d.batch_id, d.user_id, d.correlation_id, due_stage(d.milestone), 'requeued', d.claim,
        jsonb_build_object('reason', 'its original is gone', 'duplicate_of', d.duplicate_of));
    RETURN 'requeued';
END;
$$;
COMMENT ON FUNCTION requeue_duplicate IS 'Queues a duplicate again whose original is no longer complete with that content.';

CREATE FUNCTION leave_cancelled_run() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM processing_jobs AS b WHERE b.batch_id = NEW.batch_id AND b.status = 'cancelled') THEN
        NEW.run_id := NULL;
    END IF;
    RETURN NEW;
END;
$$;
COMMENT ON FUNCTION leave_cancelled_run IS 'A document that somebody takes up again by itself no longer belongs to the cancelled run of its batch.';
CREATE TRIGGER file_extractions_taken_up BEFORE UPDATE OF state ON file_extractions
    FOR EACH ROW WHEN (OLD.state IN ('failed', 'cancelled', 'duplicate') AND NEW.state = 'queued' AND NEW.run_id IS NOT NULL)
    EXECUTE FUNCTION leave_cancelled_run();

-- Cancel

CREATE FUNCTION stop_document(d file_extractions) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE file_extractions AS f
    SET state = 'cancelled', claim = f.claim + 1, claim_job_id = NULL, lease_until = NULL, not_before = NULL, alone = FALSE,
        processing_completed_at = clock_timestamp(), updated_at = now()
    WHERE f.id = d.id;
    PERFORM drop_waiting_jobs(d.doc_id);
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, stage, event, worker, claim, detail)
    VALUES (d.doc_id, d.version, d.batch_id, d.user_id, d.correlation_id, due_stage(d.milestone), 'cancelled',
        CASE d.state WHEN 'working' THEN d.claimed_by END, d.claim, jsonb_build_object('was', d.state, 'role', session_user));
END;
$$;
COMMENT ON FUNCTION stop_document IS 'Cancels an unfinished document whose lock is held.';

CREATE FUNCTION cancel_document(doc_id text, lock_timeout_ms integer DEFAULT 5000) RETURNS text
LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
#variable_conflict use_column
DECLARE
    d file_extractions;
BEGIN
    PERFORM set_config('lock_timeout', cancel_document.lock_timeout_ms || 'ms', TRUE);
    SELECT f.* INTO d FROM file_extractions AS f WHERE f.doc_id = cancel_document.doc_id FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no document "%"', coalesce(cancel_document.doc_id, '') USING ERRCODE = 'no_data_found';
    END IF;
    IF d.state NOT IN ('queued', 'working', 'retrying') THEN
        RETURN d.state;
    END IF;
    PERFORM stop_document(d);
    RETURN 'cancelled';
END;
$$;
COMMENT ON FUNCTION cancel_document IS
    'Cancels an unfinished document and returns the state that it is in now; one that has ended stays as it is. What searches see stays.';

CREATE FUNCTION mark_batch_cancelled(batch_id text, lock_timeout_ms integer DEFAULT 5000) RETURNS boolean
LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
#variable_conflict use_column
DECLARE
    batch processing_jobs;
BEGIN
    PERFORM set_config('lock_timeout', mark_batch_cancelled.lock_timeout_ms || 'ms', TRUE);
    SELECT b.* INTO batch FROM processing_jobs AS b WHERE b.batch_id = mark_batch_cancelled.batch_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no batch "%"', coalesce(mark_batch_cancelled.batch_id, '') USING ERRCODE = 'no_data_found';
    END IF;
    IF batch.status IN ('completed', 'completed_with_errors', 'failed') AND NOT EXISTS (
        SELECT FROM file_extractions AS d WHERE d.batch_id = batch.batch_id AND d.state IN ('queued', 'working', 'retrying')
    ) AND NOT EXISTS (
        SELECT FROM batch_archives AS a WHERE a.batch_id = batch.batch_id AND a.state IN ('waiting', 'unpacking')
    ) THEN
        RETURN FALSE;
    END IF;
    UPDATE processing_jobs AS b SET status = 'cancelled', completed_at = now(), updated_at = now()
    WHERE b.id = batch.id AND b.status <> 'cancelled';
    UPDATE batch_archives AS a SET state = 'cancelled', ended_at = now(), updated_at = now()
    WHERE a.batch_id = batch.batch_id AND a.state IN ('waiting', 'unpacking');
    RETURN TRUE;
END;
$$;
COMMENT ON FUNCTION mark_batch_cancelled IS
    'Cancels a batch and its archives, not its documents, so that nothing is submitted to its run any more; false if all of it had ended.';

CREATE FUNCTION cancel_documents(batch_id text, max_count integer DEFAULT NULL) RETURNS integer LANGUAGE plpgsql AS $$
-- Documents that somebody holds are passed over, not waited for: the caller may hold the batch. They are cancelled with the next call, or
-- by the reconciler.
DECLARE
    candidate bigint;
    d file_extractions;
    done integer := 0;
BEGIN
    FOR candidate IN
        SELECT f.id FROM file_extractions AS f
        WHERE f.batch_id = cancel_documents.batch_id AND f.run_id IS NOT NULL AND f.state IN ('queued', 'working', 'retrying')
        ORDER BY f.id
    LOOP
        EXIT WHEN done >= max_count;
        SELECT f.* INTO d FROM file_extractions AS f
        WHERE f.id = candidate AND f.batch_id = cancel_documents.batch_id AND f.state IN ('queued', 'working', 'retrying')
        FOR UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND;
        PERFORM stop_document(d);
        done := done + 1;
    END LOOP;
    RETURN done;
END;
$$;
COMMENT ON FUNCTION cancel_documents IS 'Cancels unfinished documents of a batch, at most max_count (null: all), and returns how many.';

CREATE FUNCTION cancel_batch(batch_id text) RETURNS integer LANGUAGE sql AS $$
    SELECT CASE WHEN mark_batch_cancelled(cancel_batch.batch_id) THEN cancel_documents(cancel_batch.batch_id) ELSE 0 END;
$$;
COMMENT ON FUNCTION cancel_batch IS
    'Cancels a batch: it takes in no more documents, and its unfinished ones are cancelled. Returns how many were; those that are being written in this moment follow within seconds.';

CREATE FUNCTION cancel_straggler(doc_id text) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    d file_extractions;
BEGIN
    SELECT f.* INTO d FROM file_extractions AS f
    WHERE f.doc_id = cancel_straggler.doc_id AND f.run_id IS NOT NULL AND f.state IN ('queued', 'working', 'retrying')
    FOR UPDATE SKIP LOCKED;
    IF NOT FOUND OR NOT EXISTS (SELECT FROM processing_jobs AS b WHERE b.batch_id = d.batch_id AND b.status = 'cancelled') THEN
        RETURN NULL;
    END IF;
    PERFORM stop_document(d);
    RETURN 'cancelled';
END;
$$;
COMMENT ON FUNCTION cancel_straggler IS 'Cancels a document that was being written, or submitted, while its batch was cancelled.';

-- Delete

CREATE TABLE files_to_remove (
    path text PRIMARY KEY,
    doc_id text,
    noted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    settled_at_xid xid8
);
COMMENT ON TABLE files_to_remove IS 'Stored files of deleted documents and batches. Each goes once nobody can need it any more.';
COMMENT ON COLUMN files_to_remove.path IS 'The file, relative to the storage base path.';
COMMENT ON COLUMN files_to_remove.doc_id IS 'The deleted document, if it was one.';
COMMENT ON COLUMN files_to_remove.noted_at IS 'When the document was deleted.';
COMMENT ON COLUMN files_to_remove.settled_at_xid IS
    'Transactions before this one could have begun to refer to the file without knowing of the note: they must have ended first.';

CREATE INDEX file_extractions_file ON file_extractions USING hash (file_path);
CREATE INDEX batch_archives_file ON batch_archives USING hash (file_path);
CREATE INDEX processing_jobs_file ON processing_jobs USING hash (zip_path);

CREATE FUNCTION note_file(path text, doc_id text DEFAULT NULL) RETURNS void LANGUAGE sql AS $$
    INSERT INTO files_to_remove AS n (path, doc_id) VALUES (note_file.path, note_file.doc_id)
    ON CONFLICT ON CONSTRAINT files_to_remove_pkey DO UPDATE
    SET doc_id = EXCLUDED.doc_id, noted_at = EXCLUDED.noted_at, settled_at_xid = NULL;
$$;
COMMENT ON FUNCTION note_file IS 'Notes a stored file for removal.';

CREATE FUNCTION keep_document_file() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM files_to_remove AS n WHERE n.path = NEW.file_path;
    RETURN NULL;
END;
$$;
COMMENT ON FUNCTION keep_document_file IS 'A file that a document or archive refers to is no longer to be removed; waits for whoever is about to remove it.';

CREATE FUNCTION keep_batch_file() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM files_to_remove AS n WHERE n.path = NEW.zip_path;
    RETURN NULL;
END;
$$;
COMMENT ON FUNCTION keep_batch_file IS 'A zip that a batch refers to is no longer to be removed; waits for whoever is about to remove it.';

CREATE TRIGGER file_extractions_keep_file AFTER INSERT OR UPDATE OF file_path ON file_extractions
    FOR EACH ROW EXECUTE FUNCTION keep_document_file();
CREATE TRIGGER batch_archives_keep_file AFTER INSERT OR UPDATE OF file_path ON batch_archives
    FOR EACH ROW EXECUTE FUNCTION keep_document_file();
CREATE TRIGGER processing_jobs_keep_file AFTER INSERT OR UPDATE OF zip_path ON processing_jobs
    FOR EACH ROW WHEN (NEW.zip_path IS NOT NULL) EXECUTE FUNCTION keep_batch_file();

CREATE FUNCTION judge_file(path text) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    note files_to_remove;
BEGIN
    SELECT n.* INTO note FROM files_to_remove AS n WHERE n.path = judge_file.path FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF note.settled_at_xid IS NULL AND EXISTS (
        SELECT FROM pg_snapshot_xip(pg_current_snapshot()) AS x WHERE x <> pg_current_xact_id()
    ) THEN
        UPDATE files_to_remove AS n SET settled_at_xid = pg_snapshot_xmax(pg_current_snapshot()) WHERE n.path = note.path;
        RETURN 'wait';
    END IF;
    IF note.settled_at_xid > pg_snapshot_xmin(pg_current_snapshot()) THEN
        RETURN 'wait';
    END IF;
    -- A statement of its own: it sees what those transactions have left.
    IF EXISTS (SELECT FROM file_extractions AS d WHERE d.file_path = note.path)
        OR EXISTS (SELECT FROM batch_archives AS a WHERE a.file_path = note.path)
        OR EXISTS (SELECT FROM processing_jobs AS b WHERE b.zip_path = note.path) THEN
        DELETE FROM files_to_remove AS n WHERE n.path = note.path;
        RETURN 'needed';
    END IF;
    RETURN 'free';
END;
$$;
COMMENT ON FUNCTION judge_file IS
    'Locks the note of a file and says whether it may be removed by this transaction: free, wait (transactions are open that may refer to it), needed (the note is gone); null if somebody else has it in hand.';

CREATE FUNCTION delete_document(doc_id text, lock_timeout_ms integer DEFAULT 5000) RETURNS boolean
LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
#variable_conflict use_column
DECLARE
    d file_extractions;
BEGIN
    PERFORM set_config('lock_timeout', delete_document.lock_timeout_ms || 'ms', TRUE);
    SELECT f.* INTO d FROM file_extractions AS f WHERE f.doc_id = delete_document.doc_id FOR UPDATE;
    IF NOT FOUND THEN
        RETURN FALSE;
    END IF;
    PERFORM drop_waiting_jobs(d.doc_id);
    UPDATE dead_letters AS l SET resolved_at = now(), resolution = 'deleted' WHERE l.doc_id = d.doc_id AND l.resolved_at IS NULL;
    PERFORM note_file(d.file_path, d.doc_id);
    DELETE FROM file_extractions AS f WHERE f.id = d.id;
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, stage, event, worker, claim, detail)
    VALUES (d.doc_id, d.version, d.batch_id, d.user_id, d.correlation_id, due_stage(d.milestone), 'deleted',
        CASE d.state WHEN 'working' THEN d.claimed_by END, d.claim, jsonb_build_object('was', d.state, 'role', session_user));
    -- The first of them; the reconciler finds the others.
    PERFORM requeue_duplicate(e.doc_id)
    FROM (
        SELECT f.doc_id FROM file_extractions AS f WHERE f.duplicate_of = d.doc_id AND f.state = 'duplicate' ORDER BY f.id LIMIT 100
    ) AS e;
    RETURN TRUE;
END;
$$;
COMMENT ON FUNCTION delete_document IS
    'Deletes a document with everything but its events, whatever state it is in; false if there is none. Duplicates of it are queued again. Its files are noted in files_to_remove.';

CREATE FUNCTION delete_documents(batch_id text, max_count integer DEFAULT NULL, lock_timeout_ms integer DEFAULT 5000) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    candidate text;
    done integer := 0;
BEGIN
    FOR candidate IN
        SELECT f.doc_id FROM file_extractions AS f WHERE f.batch_id = delete_documents.batch_id ORDER BY f.id LIMIT max_count
    LOOP
        done := done + delete_document(candidate, lock_timeout_ms)::integer;
    END LOOP;
    RETURN done;
END;
$$;
COMMENT ON FUNCTION delete_documents IS 'Deletes documents of a batch, of all its runs, at most max_count (null: all), and returns how many.';

CREATE FUNCTION delete_batch(batch_id text, lock_timeout_ms integer DEFAULT 5000) RETURNS integer
LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
-- Documents first, then the batch, then the documents that were submitted meanwhile: while the batch is locked like this, none can be.
#variable_conflict use_column
DECLARE
    batch processing_jobs;
    done integer;
BEGIN
    PERFORM set_config('lock_timeout', delete_batch.lock_timeout_ms || 'ms', TRUE);
    done := delete_documents(delete_batch.batch_id, NULL, delete_batch.lock_timeout_ms);
    SELECT b.* INTO batch FROM processing_jobs AS b WHERE b.batch_id = delete_batch.batch_id FOR UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    done := done + delete_documents(delete_batch.batch_id, NULL, delete_batch.lock_timeout_ms);
    PERFORM note_file(a.file_path) FROM batch_archives AS a WHERE a.batch_id = batch.batch_id;
    PERFORM note_file(batch.zip_path) WHERE batch.zip_path IS NOT NULL;
    DELETE FROM processing_jobs AS b WHERE b.id = batch.id;
    RETURN done;
END;
$$;
COMMENT ON FUNCTION delete_batch IS
    'Deletes a batch with all its documents, archives and summaries, and returns how many documents; null if there is no such batch. While it is being worked on, SELECT cancel_batch first, in a transaction of its own.';

CALL pin_search_path();
