-- A batch that is a list of files has an empty path. The paths of its files were taken to lie in it, from the root of the file system on, and an
-- archive of it that could not be unpacked made the root of its nested summary twice.

CREATE OR REPLACE FUNCTION path_in_batch(source_path text, batch_source_path text, file_name text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE
    -- An entry of the zip that is the batch.
    WHEN source_path <> '' AND source_path NOT LIKE '/%' THEN source_path
    WHEN batch_source_path <> '' AND starts_with(source_path, rtrim(batch_source_path, '/') || '/')
        AND length(source_path) > length(rtrim(batch_source_path, '/')) + 1
        THEN substr(source_path, length(rtrim(batch_source_path, '/')) + 2)
    -- An entry of a zip in a list, as far as a name can tell.
    ELSE coalesce(substring(source_path FROM '(?i)/([^/]+\.zip/.+)$'), file_name)
END;

CREATE OR REPLACE FUNCTION run_files(batch processing_jobs) RETURNS TABLE (
    kind text, doc_id text, name text, path text, file_type text, mime_type text, bytes bigint, pages integer, passages integer, state text,
    outcome text, error_type document_error_type, error_message text, duration_ms bigint, version integer, served_version integer,
    duplicate_of text, submitted_at timestamptz, started_at timestamptz, ended_at timestamptz, raw_extraction jsonb
) LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT 'document', d.doc_id, d.file_name, path_in_batch(d.source_path, (batch).source_path, d.file_name), d.file_type, d.mime_type,
        d.file_size, d.page_count, d.chunk_count, d.state::text,
        CASE WHEN d.state IN ('complete', 'duplicate') THEN 'succeeded' WHEN d.state IN ('failed', 'cancelled') THEN d.state::text
            ELSE 'unfinished' END,
        d.error_type, d.error_message, d.processing_duration_ms, d.version, d.served_version,
        original_of(d.doc_id, d.user_id, d.content_sha256, d.duplicate_of), d.created_at, d.processing_started_at, d.processing_completed_at, d.raw_extraction
    FROM file_extractions AS d
    WHERE d.batch_id = (batch).batch_id AND d.run_id = (batch).run_id
    UNION ALL
    -- An archive that was unpacked is its entries.
    SELECT 'archive', NULL, regexp_replace(p.path, '^.*/', ''), p.path, 'zip', 'application/zip', NULL, NULL, NULL, a.state,
        CASE WHEN a.state IN ('failed', 'cancelled') THEN a.state ELSE 'unfinished' END,
        CASE WHEN a.state = 'failed' THEN 'PERMANENT'::document_error_type END, a.error_message, NULL, 1, NULL, NULL, a.created_at, NULL,
        a.ended_at, NULL
    FROM batch_archives AS a
    CROSS JOIN LATERAL (SELECT nullif(rtrim(a.entry_path, '/'), '') AS entry) AS e
    CROSS JOIN LATERAL (
        -- One of a list is known by where its submitter has it.
        SELECT coalesce(
            path_in_batch(e.entry, (batch).source_path, regexp_replace(e.entry, '^.*/', '')), regexp_replace((batch).source_path, '^.*/', ''),
            (batch).batch_id
        ) AS path
    ) AS p
    WHERE a.run_id = (batch).run_id AND a.state <> 'unpacked';
END;

-- Its alert named nothing where the batch is a list.

CREATE OR REPLACE FUNCTION fail_stalled_batch(batch_id text, timeout_seconds double precision, undisturbed_seconds double precision DEFAULT 'Infinity')
RETURNS text LANGUAGE plpgsql AS $$
-- Its documents are left alone: they go on, and the last of them settles the batch.
DECLARE
    batch processing_jobs;
    reason text;
    made record;
BEGIN
    PERFORM FROM processing_jobs AS b WHERE b.batch_id = fail_stalled_batch.batch_id FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    SELECT b.* INTO batch FROM processing_jobs AS b WHERE b.batch_id = fail_stalled_batch.batch_id;
    reason := stall_of(batch, timeout_seconds, undisturbed_seconds);
    IF reason IS NULL THEN
        RETURN NULL;
    END IF;
    SELECT s.* INTO made FROM summarize_run(batch, 'failed', reason, now()) AS s;
    UPDATE processing_jobs AS b
    SET status = 'failed', error_message = reason, completed_at = now(), updated_at = now()
    WHERE b.id = batch.id;
    PERFORM keep_summary(batch, made.ui_json, made.nested_summary, made.file_count, made.success_count, made.error_count);
    PERFORM alert('batch_stalled', format('batch %s: %s', coalesce(nullif(batch.source_path, ''), batch.batch_id), reason), jsonb_build_object(
        'batch_id', batch.batch_id, 'run_id', batch.run_id, 'user_id', batch.user_id, 'correlation_id', batch.correlation_id,
        'totals', made.ui_json -> 'totals'));
    RETURN 'batch failed: ' || reason;
END;
$$;

-- What somebody cancelled or deleted while its archive waited to be unpacked, or was, came back with it: cancelled documents whose content was the
-- same were taken up again, and a worker that had been paused brought both back. As looked at when an entry is accepted, under the document's lock.

CREATE FUNCTION was_told_since(doc_id text, user_id text, event text, since timestamptz) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (
        SELECT FROM document_events AS e
        WHERE e.doc_id = was_told_since.doc_id AND e.user_id = was_told_since.user_id AND e.event = was_told_since.event
            AND e.at >= was_told_since.since
    );
$$;
COMMENT ON FUNCTION was_told_since IS 'Whether an event of a user''s document was written since some time, also of one that is gone.';

CREATE OR REPLACE FUNCTION accept_entries(archive_id bigint, entries jsonb, unpacked_count integer, lock_timeout_ms integer) RETURNS integer
LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
#variable_conflict use_column
DECLARE
    archive batch_archives;
    correlation text;
    run_started timestamptz;
    entry record;
    done integer := 0;
BEGIN
    PERFORM set_config('lock_timeout', accept_entries.lock_timeout_ms || 'ms', TRUE);
    SELECT a.* INTO archive FROM batch_archives AS a WHERE a.id = archive_id FOR NO KEY UPDATE;
    IF archive.state IS DISTINCT FROM 'unpacking' OR NOT is_current_run(archive.batch_id, archive.run_id) THEN
        RAISE EXCEPTION 'batch "%": a newer run has begun, or this one was ended', archive.batch_id
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    SELECT b.correlation_id, b.run_started_at INTO correlation, run_started FROM processing_jobs AS b WHERE b.batch_id = archive.batch_id;
    PERFORM FROM file_extractions AS d
    WHERE d.doc_id IN (SELECT e ->> 'doc_id' FROM jsonb_array_elements(entries) AS e)
    ORDER BY d.id FOR NO KEY UPDATE;
    FOR entry IN
        SELECT e.doc_id, e.file_name, e.file_path, e.source_path, e.file_size, e.content_sha256, e.reason, e.unchanged, d.id,
            d.run_id AS known_run, d.state = 'cancelled' AND d.content_sha256 = e.content_sha256 AS is_same_cancelled
        FROM jsonb_to_recordset(entries) AS e (
            doc_id text, file_name text, file_path text, source_path text, file_size bigint, content_sha256 text, reason text,
            unchanged boolean
        )
        LEFT JOIN file_extractions AS d ON d.doc_id = e.doc_id
        ORDER BY d.id NULLS LAST, e.doc_id
    LOOP
        done := done + 1;
        -- Accepted by another worker already, whatever has become of it since.
        CONTINUE WHEN entry.known_run = archive.run_id;
        IF entry.id IS NULL AND was_told_since(entry.doc_id, archive.user_id, 'deleted', run_started) THEN
            -- Whoever deleted it could not know of the file that has been stored for it since.
            PERFORM note_file(entry.file_path, entry.doc_id) WHERE entry.reason IS NULL AND entry.file_path <> '';
        ELSIF entry.id IS NULL AND entry.unchanged THEN
            -- Before the run, by a transaction that ended after the look. Nothing has been stored of it: it comes again.
            RAISE EXCEPTION 'document "%" has been deleted since its archive was looked at', entry.doc_id USING ERRCODE = 'serialization_failure';
        ELSIF entry.reason IS NOT NULL THEN
            PERFORM accept_refused_entry(entry.doc_id, archive.user_id, entry.file_name, entry.file_path, entry.source_path,
                entry.file_size, archive.priority, correlation, archive.batch_id, archive.run_id, entry.reason,
                accept_entries.lock_timeout_ms);
        ELSIF entry.unchanged OR entry.is_same_cancelled AND was_told_since(entry.doc_id, archive.user_id, 'cancelled', run_started) THEN
            UPDATE file_extractions AS d SET batch_id = archive.batch_id, run_id = archive.run_id
            WHERE d.id = entry.id AND d.user_id = archive.user_id AND d.run_id IS DISTINCT FROM archive.run_id;
        ELSE
            PERFORM accept_document(entry.doc_id, archive.user_id, entry.file_name, entry.file_path, entry.source_path, entry.file_size,
                entry.content_sha256, '{}', archive.priority, correlation, archive.batch_id, archive.run_id,
                accept_entries.lock_timeout_ms);
        END IF;
    END LOOP;
    UPDATE batch_archives AS a
    SET unpacked_count = least(a.entry_count, greatest(a.unpacked_count, accept_entries.unpacked_count)), attempts = 0, retry_count = 0,
        updated_at = now()
    WHERE a.id = archive_id;
    RETURN done;
END;
$$;

-- A run that an open transaction began was taken to be as old as that transaction: what somebody else deleted in between, before it was submitted
-- again, counted as deleted since and did not come back. What is noted in the same transaction is not to seem older than the run.

ALTER TABLE processing_jobs ALTER COLUMN run_started_at SET DEFAULT clock_timestamp();

CREATE OR REPLACE FUNCTION unsettle_batch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.run_id <> OLD.run_id THEN
        NEW.run_started_at := clock_timestamp();
        NEW.given_up := FALSE;
    END IF;
    IF NEW.run_id <> OLD.run_id OR NEW.completed_at IS NULL OR (NEW.status = 'cancelled' AND OLD.status <> 'cancelled') THEN
        NEW.settled_at := NULL;
    END IF;
    RETURN NEW;
END;
$$;

CREATE OR REPLACE FUNCTION submit_zip(
    batch_id text, user_id text, source_path text, zip_path text, content_sha256 text, metadata jsonb, priority integer,
    correlation_id text, lock_timeout_ms integer, OUT outcome text, OUT run_id uuid, OUT status text
) LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
#variable_conflict use_column
DECLARE
    known processing_jobs;
BEGIN
    PERFORM set_config('lock_timeout', submit_zip.lock_timeout_ms || 'ms', TRUE);
    -- A look without a lock: whoever submits the same zip at the same moment makes a run that finds nothing changed.
    SELECT b.* INTO known FROM processing_jobs AS b WHERE b.batch_id = submit_zip.batch_id;
    IF known.user_id = submit_zip.user_id AND known.content_sha256 = submit_zip.content_sha256
        AND known.status NOT IN ('failed', 'cancelled') AND run_is_whole(known)
    THEN
        outcome := 'unchanged';
        run_id := known.run_id;
        status := known.status;
        RETURN;
    END IF;
    outcome := CASE WHEN known.id IS NULL THEN 'accepted' ELSE 'new_run' END;
    run_id := begin_batch(submit_zip.batch_id, submit_zip.user_id, submit_zip.source_path, submit_zip.correlation_id, submit_zip.metadata);
    -- All that lies in no archive has been submitted: there is nothing.
    UPDATE processing_jobs AS b
    SET zip_path = submit_zip.zip_path, content_sha256 = submit_zip.content_sha256, sealed_at = clock_timestamp()
    WHERE b.batch_id = submit_zip.batch_id
    RETURNING b.status INTO status;
    PERFORM add_archive(submit_zip.batch_id, run_id, submit_zip.user_id, '', '', submit_zip.zip_path, submit_zip.content_sha256,
        submit_zip.priority, NULL, submit_zip.lock_timeout_ms);
END;
$$;

CREATE OR REPLACE FUNCTION seal_batch(batch_id text, run_id uuid, total_files integer) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    UPDATE processing_jobs AS b
    SET sealed_at = clock_timestamp(), total_files = seal_batch.total_files, direct_files = seal_batch.total_files, updated_at = now(),
        -- A submitter that had been given up comes back; what a person failed stays failed.
        status = CASE WHEN b.given_up THEN b.status ELSE 'processing' END,
        completed_at = CASE WHEN b.given_up THEN b.completed_at END,
        error_message = CASE WHEN b.given_up THEN b.error_message END
    WHERE b.batch_id = seal_batch.batch_id AND b.run_id = seal_batch.run_id AND b.sealed_at IS NULL AND b.status <> 'cancelled';
    IF EXISTS (SELECT FROM batch_archives AS a WHERE a.run_id = seal_batch.run_id) THEN
        PERFORM count_batch_files(seal_batch.batch_id, seal_batch.run_id);
    END IF;
    RETURN settle_batch(seal_batch.batch_id);
END;
$$;

CREATE OR REPLACE FUNCTION mark_batch_cancelled(batch_id text, lock_timeout_ms integer DEFAULT 5000) RETURNS boolean
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
    UPDATE processing_jobs AS b SET status = 'cancelled', completed_at = clock_timestamp(), updated_at = now()
    WHERE b.id = batch.id AND b.status <> 'cancelled';
    UPDATE batch_archives AS a SET state = 'cancelled', ended_at = clock_timestamp(), updated_at = now()
    WHERE a.batch_id = batch.batch_id AND a.state IN ('waiting', 'unpacking');
    RETURN TRUE;
END;
$$;

-- While an archive was still being unpacked, its batch lacked nothing, whatever had been deleted of it: the same zip did nothing, and what was
-- deleted before it was submitted again stayed away.

CREATE FUNCTION lost_since(batch processing_jobs) RETURNS boolean LANGUAGE sql STABLE AS $$
    -- The deletion must be later than the run, so that one run for it is enough, whatever else it may lack.
    SELECT EXISTS (
        SELECT FROM document_events AS e
        WHERE e.id >= event_id_since(batch.run_started_at - interval '1 minute') AND e.event = 'deleted' AND e.at >= batch.run_started_at
            AND e.batch_id = batch.batch_id AND NOT EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = e.doc_id)
    );
$$;
COMMENT ON FUNCTION lost_since IS 'Whether somebody has deleted a document of a batch since its run was begun, and nobody has submitted it since.';

CREATE OR REPLACE FUNCTION run_is_whole(batch processing_jobs) RETURNS boolean LANGUAGE sql STABLE AS $$
    -- Submitting the same again is nothing to do only if it is. What an archive said for good (encrypted, over a limit) it would say again.
    SELECT NOT EXISTS (
        SELECT FROM file_extractions AS d
        WHERE d.batch_id = batch.batch_id AND d.run_id = batch.run_id AND d.state = 'cancelled'
    ) AND NOT EXISTS (
        SELECT FROM batch_archives AS a
        WHERE a.run_id = batch.run_id AND a.state IN ('failed', 'cancelled')
            AND (a.entry_path = '' OR a.state = 'cancelled' OR a.retry_count > 0 OR a.requeue_count > 0 OR a.attempts > 1)
    ) AND CASE WHEN EXISTS (SELECT FROM batch_archives AS a WHERE a.run_id = batch.run_id AND a.state IN ('waiting', 'unpacking'))
        THEN NOT lost_since(batch) AND NOT EXISTS (
            -- What an archive has not come to yet: it would let it stay cancelled. As was_told_since says, but of thousands at once.
            SELECT FROM document_events AS e
            JOIN file_extractions AS d ON d.doc_id = e.doc_id AND d.user_id = e.user_id
            WHERE e.id >= event_id_since(batch.run_started_at - interval '1 minute') AND e.event = 'cancelled' AND e.at >= batch.run_started_at
                AND d.batch_id = batch.batch_id AND d.state = 'cancelled'
        )
        ELSE (SELECT count(*) FROM file_extractions AS d WHERE d.batch_id = batch.batch_id AND d.run_id = batch.run_id) >= batch.direct_files + (
            SELECT coalesce(sum(coalesce(a.entry_count, 0)) - count(*) FILTER (WHERE a.parent_id IS NOT NULL), 0)
            FROM batch_archives AS a WHERE a.run_id = batch.run_id
        )
    END;
$$;

CREATE OR REPLACE FUNCTION run_lacks_deleted(batch processing_jobs) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT batch.status <> 'cancelled' AND NOT EXISTS (
        SELECT FROM batch_archives AS a WHERE a.run_id = batch.run_id AND a.state IN ('waiting', 'unpacking')
    ) AND (
        SELECT count(*) FROM file_extractions AS d WHERE d.batch_id = batch.batch_id AND d.run_id = batch.run_id
    ) < batch.direct_files + (
        SELECT coalesce(sum(CASE a.state WHEN 'unpacked' THEN a.entry_count ELSE a.unpacked_count END)
            - count(*) FILTER (WHERE a.parent_id IS NOT NULL), 0)
        FROM batch_archives AS a WHERE a.run_id = batch.run_id
    ) AND lost_since(batch);
$$;

-- What a person did to a document of a batch that had ended, before anybody had seen that it went on again, or after they had failed the batch by
-- hand, was never told in the batch's summary.

CREATE OR REPLACE FUNCTION stop_document(d file_extractions) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE file_extractions AS f
    SET state = 'cancelled', claim = f.claim + 1, claim_job_id = NULL, lease_until = NULL, not_before = NULL, alone = FALSE,
        processing_completed_at = clock_timestamp(), updated_at = now()
    WHERE f.id = d.id;
    PERFORM drop_waiting_jobs(d.doc_id);
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, stage, event, worker, claim, detail)
    VALUES (d.doc_id, d.version, d.batch_id, d.user_id, d.correlation_id, due_stage(d.milestone), 'cancelled',
        CASE d.state WHEN 'working' THEN d.claimed_by END, d.claim, jsonb_build_object('was', d.state, 'role', session_user));
    PERFORM note_settled_batch(d);
END;
$$;

CREATE OR REPLACE FUNCTION fail_document(d file_extractions, error_type document_error_type, message text, context jsonb) RETURNS void
LANGUAGE plpgsql AS $$
-- For the reconciler, which holds the document's lock; workers fail documents by checkpoint.
BEGIN
    UPDATE file_extractions AS f
    SET state = 'failed', claim = f.claim + 1, lease_until = NULL, error_type = fail_document.error_type, error_message = message,
        processing_completed_at = clock_timestamp(), updated_at = now()
    WHERE f.id = d.id;
    INSERT INTO dead_letters (doc_id, version, batch_id, user_id, correlation_id, stage, error_type, error_message, context)
    VALUES (d.doc_id, d.version, d.batch_id, d.user_id, d.correlation_id, due_stage(d.milestone), fail_document.error_type, message, context)
    ON CONFLICT (doc_id) WHERE resolved_at IS NULL DO UPDATE
    SET version = EXCLUDED.version, stage = EXCLUDED.stage, error_type = EXCLUDED.error_type, error_message = EXCLUDED.error_message,
        context = EXCLUDED.context, traceback = NULL, created_at = now();
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, stage, event, worker, claim, detail)
    VALUES (d.doc_id, d.version, d.batch_id, d.user_id, d.correlation_id, due_stage(d.milestone), 'failed', d.claimed_by, d.claim,
        context || jsonb_build_object('error_type', fail_document.error_type, 'error_message', message));
    PERFORM note_settled_batch(d);
END;
$$;

CREATE FUNCTION note_settled_batch(d file_extractions) RETURNS void LANGUAGE sql AS $$
    -- Not done at once: this transaction holds a document, so it may not wait for its batch.
    INSERT INTO summaries_to_renew (batch_id, is_its_own)
    SELECT b.batch_id, TRUE FROM processing_jobs AS b WHERE b.batch_id = d.batch_id AND b.run_id = d.run_id AND b.settled_at IS NOT NULL;
$$;
COMMENT ON FUNCTION note_settled_batch IS 'Has a reconciler sum up the document''s batch again where that has been done already.';
COMMENT ON TABLE summaries_to_renew IS
    'A row for each document that was deleted and batch that it is or was in, or that was stopped in a batch that had ended, until the batch''s summaries are right again.';
COMMENT ON COLUMN summaries_to_renew.is_its_own IS 'Whether the document was in the batch then; else another batch had taken it over.';

CALL pin_search_path();
