-- Zip batches: submitting one, unpacking it step by step, and ending the batch when its last archive and document have ended.
--
-- Unpacking is a job of its own for each archive. Everything it writes is keyed by doc_id, which follows from user, batch and entry path,
-- and by run: doing a step twice, or by two workers at once, gives what doing it once gives. A step locks the archive first, then
-- documents in the order of ids. Whoever ends an archive's run (a cancel) ends the archive's row first: no document is accepted after that.

CREATE FUNCTION defer_unpacking(archive_id bigint, scheduled_at timestamptz DEFAULT NULL) RETURNS bigint LANGUAGE plpgsql AS $$
-- As defer_stage does: a twin that already waits serves as well, if it is made to wait no longer than this one would.
DECLARE
    twin bigint;
    wanted integer := (SELECT a.priority FROM batch_archives AS a WHERE a.id = archive_id);
BEGIN
    LOOP
        BEGIN
            RETURN (procrastinate_defer_jobs_v1(ARRAY[ROW(
                'cpu', 'unpack', coalesce(wanted, 0), NULL, 'unpack:' || archive_id, jsonb_build_object('archive_id', archive_id), scheduled_at
            )::procrastinate_job_to_defer_v1]))[1];
        EXCEPTION WHEN unique_violation THEN
            UPDATE procrastinate_jobs AS job
            SET scheduled_at = CASE
                WHEN defer_unpacking.scheduled_at IS NOT NULL AND job.scheduled_at IS NOT NULL
                THEN least(job.scheduled_at, defer_unpacking.scheduled_at)
            END
            WHERE job.status = 'todo' AND job.queueing_lock = 'unpack:' || archive_id
            RETURNING job.id INTO twin;
            IF FOUND THEN
                RETURN twin;
            END IF;
        END;
    END LOOP;
END;
$$;
COMMENT ON FUNCTION defer_unpacking IS 'Defers the job that unpacks an archive and returns its id; an equal waiting job is taken instead.';

CREATE FUNCTION is_current_run(batch_id text, run_id uuid) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (
        SELECT FROM processing_jobs AS b
        WHERE b.batch_id = is_current_run.batch_id AND b.run_id = is_current_run.run_id AND b.status <> 'cancelled'
    );
$$;
COMMENT ON FUNCTION is_current_run IS 'Whether a run of a batch is its last one and has not been cancelled.';

CREATE FUNCTION count_batch_files(batch_id text, run_id uuid) RETURNS integer LANGUAGE sql AS $$
    -- An archive inside of another is one of the other's entries but no document.
    UPDATE processing_jobs AS b
    SET total_files = b.direct_files + coalesce((
            SELECT sum(coalesce(a.entry_count, 0)) - count(*) FILTER (WHERE a.parent_id IS NOT NULL)
            FROM batch_archives AS a WHERE a.run_id = b.run_id
        ), 0),
        content_sha256 = coalesce(b.content_sha256, (
            SELECT a.content_sha256 FROM batch_archives AS a WHERE a.run_id = b.run_id AND a.entry_path = ''
        )),
        status = CASE WHEN b.status = 'pending' AND b.sealed_at IS NOT NULL THEN 'processing' ELSE b.status END,
        updated_at = now()
    WHERE b.batch_id = count_batch_files.batch_id AND b.run_id = count_batch_files.run_id AND b.status IN ('pending', 'processing')
    RETURNING b.total_files;
$$;
COMMENT ON FUNCTION count_batch_files IS 'Sets total_files to what is known by now of a run, archives included, and the batch to processing; returns the number.';

CREATE OR REPLACE FUNCTION begin_batch(
    batch_id text, user_id text, source_path text, correlation_id text, metadata jsonb DEFAULT '{}'
) RETURNS uuid LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    run uuid;
BEGIN
    INSERT INTO processing_jobs AS b (batch_id, user_id, source_path, correlation_id, metadata, status)
    VALUES (begin_batch.batch_id, begin_batch.user_id, begin_batch.source_path, begin_batch.correlation_id, begin_batch.metadata, 'pending')
    ON CONFLICT (batch_id) DO UPDATE
    SET run_id = gen_random_uuid(), status = 'pending', source_path = EXCLUDED.source_path, correlation_id = EXCLUDED.correlation_id,
        metadata = EXCLUDED.metadata, total_files = 0, direct_files = 0, zip_path = NULL, content_sha256 = NULL, error_message = NULL,
        sealed_at = NULL, completed_at = NULL, updated_at = now()
    WHERE b.user_id = EXCLUDED.user_id
    RETURNING b.run_id INTO run;
    IF run IS NULL THEN
        RAISE EXCEPTION 'batch_id "%" is taken; choose another', begin_batch.batch_id USING ERRCODE = 'unique_violation';
    END IF;
    RETURN run;
END;
$$;
COMMENT ON FUNCTION begin_batch IS 'Opens a run of a batch, new or known, and returns its run_id.';

COMMENT ON FUNCTION seal_batch IS
    'Says that every file of the run has been submitted, total_files of them in no archive; before that the batch cannot end.';

CREATE FUNCTION add_archive(
    batch_id text, run_id uuid, user_id text, entry_path text, source_prefix text, file_path text, content_sha256 text, priority integer,
    parent_id bigint, lock_timeout_ms integer
) RETURNS bigint LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
#variable_conflict use_column
DECLARE
    parent batch_archives;
    made bigint;
BEGIN
    PERFORM set_config('lock_timeout', add_archive.lock_timeout_ms || 'ms', TRUE);
    IF add_archive.parent_id IS NOT NULL THEN
        SELECT a.* INTO parent FROM batch_archives AS a WHERE a.id = add_archive.parent_id FOR NO KEY UPDATE;
    END IF;
    IF NOT is_current_run(add_archive.batch_id, add_archive.run_id)
        OR add_archive.parent_id IS NOT NULL AND parent.state IS DISTINCT FROM 'unpacking'
    THEN
        RAISE EXCEPTION 'batch "%": a newer run has begun, or this one was ended', add_archive.batch_id
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    INSERT INTO batch_archives AS a (
        batch_id, run_id, user_id, parent_id, entry_path, source_prefix, file_path, content_sha256, depth, priority
    ) VALUES (
        add_archive.batch_id, add_archive.run_id, add_archive.user_id, add_archive.parent_id, add_archive.entry_path,
        add_archive.source_prefix, add_archive.file_path, add_archive.content_sha256, coalesce(parent.depth, 0) + 1, add_archive.priority
    ) ON CONFLICT (run_id, entry_path) DO NOTHING
    RETURNING a.id INTO made;
    IF made IS NOT NULL THEN
        PERFORM defer_unpacking(made);
    END IF;
    RETURN made;
END;
$$;
COMMENT ON FUNCTION add_archive IS 'Takes an archive into a run with the job that unpacks it and returns its id; null if the run has it already.';

CREATE FUNCTION run_is_whole(batch processing_jobs) RETURNS boolean LANGUAGE sql STABLE AS $$
    -- Submitting the same again is nothing to do only if it is. What an archive said for good (encrypted, over a limit) it would say again.
    SELECT NOT EXISTS (
        SELECT FROM file_extractions AS d
        WHERE d.batch_id = batch.batch_id AND d.run_id = batch.run_id AND d.state = 'cancelled'
    ) AND NOT EXISTS (
        SELECT FROM batch_archives AS a
        WHERE a.run_id = batch.run_id AND a.state IN ('failed', 'cancelled')
            AND (a.entry_path = '' OR a.state = 'cancelled' OR a.retry_count > 0 OR a.requeue_count > 0 OR a.attempts > 1)
    ) AND (
        EXISTS (SELECT FROM batch_archives AS a WHERE a.run_id = batch.run_id AND a.state IN ('waiting', 'unpacking'))
        OR (SELECT count(*) FROM file_extractions AS d WHERE d.batch_id = batch.batch_id AND d.run_id = batch.run_id) >= batch.direct_files + (
            SELECT coalesce(sum(coalesce(a.entry_count, 0)) - count(*) FILTER (WHERE a.parent_id IS NOT NULL), 0)
            FROM batch_archives AS a WHERE a.run_id = batch.run_id
        )
    );
$$;
COMMENT ON FUNCTION run_is_whole IS
    'Whether the current run of a batch has all that was submitted with it, or will: no document is gone or cancelled, no archive failed for a reason that can pass.';

CREATE FUNCTION submit_zip(
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
    SET zip_path = submit_zip.zip_path, content_sha256 = submit_zip.content_sha256, sealed_at = now()
    WHERE b.batch_id = submit_zip.batch_id
    RETURNING b.status INTO status;
    PERFORM add_archive(submit_zip.batch_id, run_id, submit_zip.user_id, '', '', submit_zip.zip_path, submit_zip.content_sha256,
        submit_zip.priority, NULL, submit_zip.lock_timeout_ms);
END;
$$;
COMMENT ON FUNCTION submit_zip IS
    'Takes in a stored zip as a batch. outcome: accepted, new_run, or unchanged (the last run had the same content, and is whole: nothing happens).';

CREATE FUNCTION submit_batch(
    zip_path text, batch_id text DEFAULT NULL, user_id text DEFAULT 'default', metadata jsonb DEFAULT '{}', priority integer DEFAULT 0,
    correlation_id text DEFAULT NULL, content_sha256 text DEFAULT NULL
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    id text := batch_id;
    owner text := coalesce(user_id, 'default');
BEGIN
    IF zip_path IS NULL OR zip_path = '' OR zip_path ~ '(^/|(^|/)\.\.(/|$)|[[:cntrl:]]|\\)' THEN
        RAISE EXCEPTION 'zip_path "%" must be relative to the storage base path, without "..", backslashes or control characters',
            zip_path USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF id IS NULL THEN
        -- As in submit_document: RFC 9562 version 8.
        id := encode(substring(sha256(convert_to(owner || chr(10) || zip_path, 'UTF8')) FOR 16), 'hex');
        id := overlay(overlay(id PLACING '8' FROM 13 FOR 1) PLACING 'a' FROM 17 FOR 1)::uuid::text;
    END IF;
    PERFORM submit_zip(id, owner, zip_path, zip_path, content_sha256, coalesce(metadata, '{}'),
        coalesce(priority, 0), coalesce(correlation_id, gen_random_uuid()::text), 5000);
    RETURN id;
END;
$$;
COMMENT ON FUNCTION submit_batch IS
    'Submits a zip that already lies in storage as a batch and returns its batch_id. Without content_sha256 a known batch_id is unpacked again; what has not changed inside stays as it is.';

CREATE FUNCTION begin_unpacking(archive_id bigint, max_attempts integer) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    archive batch_archives;
BEGIN
    SELECT a.* INTO archive FROM batch_archives AS a WHERE a.id = archive_id FOR NO KEY UPDATE;
    IF NOT FOUND OR archive.state NOT IN ('waiting', 'unpacking') THEN
        RETURN NULL;
    END IF;
    IF NOT is_current_run(archive.batch_id, archive.run_id) THEN
        PERFORM end_archive(archive_id, 'cancelled');
        RETURN NULL;
    END IF;
    IF archive.attempts >= max_attempts THEN
        PERFORM end_archive(archive_id, 'failed', format(
            'Unpacking was begun %s times and broke off each time without getting on (a multiple of MAX_CRASHES).%s',
            archive.attempts, coalesce(' Last: ' || archive.error_message, '')));
        RETURN 'failed';
    END IF;
    UPDATE batch_archives AS a
    SET state = 'unpacking', attempts = a.attempts + 1, requeue_count = 0, updated_at = now()
    WHERE a.id = archive_id;
    RETURN 'begun';
END;
$$;
COMMENT ON FUNCTION begin_unpacking IS
    'Says that a worker begins with an archive: begun, failed after too many beginnings, or null if there is nothing left to do.';

CREATE FUNCTION record_listing(
    archive_id bigint, content_sha256 text, entry_count integer, skipped_count integer, unpacked_bytes bigint, OUT all_entries bigint,
    OUT all_bytes bigint
) LANGUAGE plpgsql AS $$
-- The limits hold for an archive with all archives inside, so the outermost one is locked while they are added up.
#variable_conflict use_column
DECLARE
    root bigint := (SELECT coalesce(a.parent_id, a.id) FROM batch_archives AS a WHERE a.id = archive_id);
BEGIN
    PERFORM FROM batch_archives AS a WHERE a.id IN (root, archive_id) ORDER BY a.id FOR NO KEY UPDATE;
    UPDATE batch_archives AS a
    SET content_sha256 = record_listing.content_sha256, entry_count = record_listing.entry_count,
        skipped_count = record_listing.skipped_count, unpacked_bytes = record_listing.unpacked_bytes, updated_at = now(),
        attempts = CASE WHEN a.entry_count IS NULL THEN 0 ELSE a.attempts END
    WHERE a.id = archive_id AND a.state = 'unpacking';
    SELECT sum(a.entry_count), sum(a.unpacked_bytes) INTO all_entries, all_bytes
    FROM batch_archives AS a
    -- One that was refused as a whole takes nothing.
    WHERE (a.id = root OR a.parent_id = root) AND (a.state <> 'failed' OR a.unpacked_count > 0);
END;
$$;
COMMENT ON FUNCTION record_listing IS 'Notes what an archive holds and returns what it and all archives with it in the same outermost one hold together.';

CREATE FUNCTION accept_refused_entry(
    doc_id text, user_id text, file_name text, file_path text, source_path text, file_size bigint, priority integer, correlation_id text,
    batch_id text, run_id uuid, reason text, lock_timeout_ms integer
) RETURNS void LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    d file_extractions;
BEGIN
    UPDATE file_extractions AS f SET batch_id = accept_refused_entry.batch_id, run_id = accept_refused_entry.run_id
    WHERE f.doc_id = accept_refused_entry.doc_id AND f.user_id = accept_refused_entry.user_id
        AND f.state = 'failed' AND f.content_sha256 IS NULL AND f.error_message = reason;
    IF FOUND THEN
        RETURN;  -- as bad as it was
    END IF;
    PERFORM accept_document(accept_refused_entry.doc_id, accept_refused_entry.user_id, accept_refused_entry.file_name,
        accept_refused_entry.file_path, accept_refused_entry.source_path, accept_refused_entry.file_size, NULL, '{}',
        accept_refused_entry.priority, accept_refused_entry.correlation_id, accept_refused_entry.batch_id, accept_refused_entry.run_id,
        accept_refused_entry.lock_timeout_ms);
    -- There is no content that a stage could work on.
    PERFORM drop_waiting_jobs(accept_refused_entry.doc_id);
    SELECT f.* INTO STRICT d FROM file_extractions AS f WHERE f.doc_id = accept_refused_entry.doc_id;
    PERFORM fail_document(d, 'PERMANENT', reason, jsonb_build_object('entry', accept_refused_entry.source_path));
END;
$$;
COMMENT ON FUNCTION accept_refused_entry IS
    'Takes in an archive''s entry that could not be unpacked as a document that has failed, with its dead letter. New content makes a new version of it.';

CREATE FUNCTION accept_entries(archive_id bigint, entries jsonb, unpacked_count integer, lock_timeout_ms integer) RETURNS integer
LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
#variable_conflict use_column
DECLARE
    archive batch_archives;
    correlation text;
    entry record;
    done integer := 0;
BEGIN
    PERFORM set_config('lock_timeout', accept_entries.lock_timeout_ms || 'ms', TRUE);
    SELECT a.* INTO archive FROM batch_archives AS a WHERE a.id = archive_id FOR NO KEY UPDATE;
    IF archive.state IS DISTINCT FROM 'unpacking' OR NOT is_current_run(archive.batch_id, archive.run_id) THEN
        RAISE EXCEPTION 'batch "%": a newer run has begun, or this one was ended', archive.batch_id
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    correlation := (SELECT b.correlation_id FROM processing_jobs AS b WHERE b.batch_id = archive.batch_id);
    FOR entry IN
        SELECT e.doc_id, e.file_name, e.file_path, e.source_path, e.file_size, e.content_sha256, e.reason, e.unchanged, d.id
        FROM jsonb_to_recordset(entries) AS e (
            doc_id text, file_name text, file_path text, source_path text, file_size bigint, content_sha256 text, reason text,
            unchanged boolean
        )
        LEFT JOIN file_extractions AS d ON d.doc_id = e.doc_id
        ORDER BY d.id NULLS LAST, e.doc_id
    LOOP
        IF entry.reason IS NOT NULL THEN
            PERFORM accept_refused_entry(entry.doc_id, archive.user_id, entry.file_name, entry.file_path, entry.source_path,
                entry.file_size, archive.priority, correlation, archive.batch_id, archive.run_id, entry.reason,
                accept_entries.lock_timeout_ms);
        ELSIF entry.unchanged THEN
            UPDATE file_extractions AS d SET batch_id = archive.batch_id, run_id = archive.run_id
            WHERE d.id = entry.id AND d.user_id = archive.user_id AND d.run_id IS DISTINCT FROM archive.run_id;
        ELSE
            PERFORM accept_document(entry.doc_id, archive.user_id, entry.file_name, entry.file_path, entry.source_path, entry.file_size,
                entry.content_sha256, '{}', archive.priority, correlation, archive.batch_id, archive.run_id,
                accept_entries.lock_timeout_ms);
        END IF;
        done := done + 1;
    END LOOP;
    UPDATE batch_archives AS a
    SET unpacked_count = least(a.entry_count, greatest(a.unpacked_count, accept_entries.unpacked_count)), attempts = 0, retry_count = 0,
        updated_at = now()
    WHERE a.id = archive_id;
    RETURN done;
END;
$$;
COMMENT ON FUNCTION accept_entries IS
    'Takes entries of an archive into its run in one transaction, known documents in the order of ids first, and returns how many. An error if the run is over.';

CREATE FUNCTION end_archive(archive_id bigint, state text, error_message text DEFAULT NULL) RETURNS void LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    archive batch_archives;
BEGIN
    UPDATE batch_archives AS a
    SET state = end_archive.state, error_message = end_archive.error_message, ended_at = clock_timestamp(), updated_at = now(),
        -- What was refused as a whole has no entries that anybody waits for.
        entry_count = CASE WHEN end_archive.state = 'failed' AND a.unpacked_count = 0 THEN NULL ELSE a.entry_count END,
        unpacked_count = CASE WHEN end_archive.state = 'unpacked' THEN a.entry_count ELSE a.unpacked_count END
    WHERE a.id = archive_id AND a.state IN ('waiting', 'unpacking')
    RETURNING a.* INTO archive;
    IF FOUND AND archive.state = 'failed' THEN
        PERFORM alert('archive_failed', archive.error_message, jsonb_build_object(
            'archive', archive.id, 'batch_id', archive.batch_id, 'entry_path', archive.entry_path));
    END IF;
END;
$$;
COMMENT ON FUNCTION end_archive IS 'Ends an archive as unpacked, failed or cancelled, unless it has ended. Then: SELECT settle_batch(batch_id), as a transaction of its own.';

CREATE FUNCTION put_off_archive(archive_id bigint, delay_seconds double precision, reason text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE batch_archives AS a
    SET attempts = 0, retry_count = a.retry_count + (reason IS NOT NULL)::integer, error_message = reason, updated_at = now()
    WHERE a.id = archive_id AND a.state IN ('waiting', 'unpacking');
    IF FOUND THEN
        PERFORM defer_unpacking(archive_id, now() + make_interval(secs => delay_seconds));
    END IF;
END;
$$;
COMMENT ON FUNCTION put_off_archive IS 'Has an archive gone on with later: after a stop, for a document that somebody holds, or, with a reason, after a failure that can pass.';

CREATE FUNCTION requeue_lost_archive(archive_id bigint, max_requeues integer) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    archive batch_archives;
BEGIN
    SELECT a.* INTO archive FROM batch_archives AS a WHERE a.id = archive_id FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    -- A statement of its own: what the finder saw may have changed since.
    SELECT a.* INTO archive FROM batch_archives AS a WHERE a.id = archive_id;
    IF archive.state NOT IN ('waiting', 'unpacking') OR is_being_unpacked(archive_id) THEN
        RETURN NULL;
    END IF;
    IF archive.requeue_count >= max_requeues THEN
        PERFORM end_archive(archive_id, 'failed', format(
            'The job that unpacks it was lost %s times before any worker began it; do all workers run the present version of docmill?',
            archive.requeue_count));
        RETURN 'failed';
    END IF;
    UPDATE batch_archives AS a SET requeue_count = a.requeue_count + 1, updated_at = now() WHERE a.id = archive_id;
    PERFORM defer_unpacking(archive_id,
        now() + make_interval(secs => CASE archive.requeue_count WHEN 0 THEN 0 ELSE least(300, 2.0 ^ least(archive.requeue_count, 10)) END));
    RETURN 'requeued';
END;
$$;
COMMENT ON FUNCTION requeue_lost_archive IS 'Has an archive unpacked whose job was lost; after too many times it is failed, visibly.';

CREATE FUNCTION is_being_unpacked(archive_id bigint) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (
        SELECT FROM procrastinate_jobs AS j WHERE j.status = 'todo' AND j.queueing_lock = 'unpack:' || archive_id
    ) OR EXISTS (
        SELECT FROM procrastinate_jobs AS j
        WHERE j.status = 'doing' AND j.task_name = 'unpack' AND j.args ->> 'archive_id' = archive_id::text
    );
$$;
COMMENT ON FUNCTION is_being_unpacked IS 'Whether a job that unpacks the archive waits or has been fetched.';

CREATE FUNCTION adopt_documents(batch_id text, run_id uuid, user_id text, doc_ids text[], lock_timeout_ms integer) RETURNS integer
LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
#variable_conflict use_column
DECLARE
    adopted integer;
BEGIN
    PERFORM set_config('lock_timeout', adopt_documents.lock_timeout_ms || 'ms', TRUE);
    WITH mine AS (
        SELECT d.id
        FROM file_extractions AS d
        WHERE d.doc_id = ANY(adopt_documents.doc_ids) AND d.user_id = adopt_documents.user_id
            AND d.run_id IS DISTINCT FROM adopt_documents.run_id
            AND is_current_run(adopt_documents.batch_id, adopt_documents.run_id)
        ORDER BY d.id
        FOR UPDATE
    )
    UPDATE file_extractions AS d
    SET batch_id = adopt_documents.batch_id, run_id = adopt_documents.run_id
    FROM mine
    WHERE d.id = mine.id;
    GET DIAGNOSTICS adopted = ROW_COUNT;
    RETURN adopted;
END;
$$;
COMMENT ON FUNCTION adopt_documents IS
    'Takes known documents, whose content has not changed, into a run, unless a later run has been begun or this one was cancelled; returns how many it took.';

COMMENT ON FUNCTION settle_batch IS
    'Ends a sealed batch if all its documents and archives have ended and returns its status; null while it goes on, or while somebody holds its row.';

CREATE OR REPLACE VIEW batch_status WITH (security_invoker = true) AS
SELECT
    b.batch_id, b.run_id, b.user_id, b.source_path, b.status, b.total_files, b.sealed_at, b.created_at, b.completed_at,
    count(d.id) FILTER (WHERE d.status = 'pending') AS pending,
    count(d.id) FILTER (WHERE d.status = 'processing') AS processing,
    count(d.id) FILTER (WHERE d.status = 'completed') AS completed,
    count(d.id) FILTER (WHERE d.status = 'failed') AS failed,
    greatest(max(d.updated_at), z.last_progress_at) AS last_progress_at,
    z.archives, z.archives_open, z.archives_failed, z.archive_files, z.unpacked_files
FROM processing_jobs AS b
LEFT JOIN file_extractions AS d ON d.batch_id = b.batch_id AND d.run_id = b.run_id
CROSS JOIN LATERAL (
    SELECT count(*) AS archives, count(*) FILTER (WHERE a.state IN ('waiting', 'unpacking')) AS archives_open,
        count(*) FILTER (WHERE a.state = 'failed') AS archives_failed, coalesce(sum(a.entry_count), 0) AS archive_files,
        coalesce(sum(a.unpacked_count), 0) AS unpacked_files, max(a.updated_at) AS last_progress_at
    FROM batch_archives AS a
    WHERE a.batch_id = b.batch_id AND a.run_id = b.run_id
) AS z
GROUP BY b.id, z.archives, z.archives_open, z.archives_failed, z.archive_files, z.unpacked_files, z.last_progress_at;
COMMENT ON VIEW batch_status IS 'Every batch with the documents and archives of its current run, counted.';
COMMENT ON COLUMN batch_status.last_progress_at IS 'When one of its documents or archives last changed.';
COMMENT ON COLUMN batch_status.archives IS 'Zip archives of the run, nested ones included.';
COMMENT ON COLUMN batch_status.archives_open IS 'Archives that are not unpacked to the end yet; the batch cannot end before.';
COMMENT ON COLUMN batch_status.archives_failed IS 'Archives that could not be unpacked.';
COMMENT ON COLUMN batch_status.archive_files IS 'Entries of the archives that have been opened, nested archives among them.';
COMMENT ON COLUMN batch_status.unpacked_files IS 'Entries that have been unpacked, or refused with a reason.';

CALL pin_search_path();
