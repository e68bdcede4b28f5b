-- How many files of a batch failed, were cancelled or are unfinished is said in one place, the view batch_status. A batch's files are its
-- documents and those of its archives that are not unpacked: one that could not be unpacked has failed, one that waits is unfinished. An
-- archive that has been unpacked is its entries. What counted documents alone goes on doing so; the new columns named files... count files.
-- The view batch_progress, the verdict on a run, its summary and batch_statistics take their counts from there; run_files says the same of
-- each file.

CREATE OR REPLACE VIEW batch_status WITH (security_invoker = true) AS
SELECT
    b.batch_id, b.run_id, b.user_id, b.source_path, b.status, b.total_files, b.sealed_at, b.created_at, b.completed_at,
    d.pending, d.queued + d.working + d.retrying - d.pending AS processing, s.succeeded AS completed, d.failed + d.cancelled AS failed,
    greatest(d.last_progress_at, z.last_progress_at) AS last_progress_at,
    z.archives, z.archives_open, z.archives_failed, z.archive_files, z.unpacked_files, z.archives_cancelled,
    d.queued, d.working, d.retrying, d.complete, d.duplicate, d.failed AS documents_failed, d.cancelled AS documents_cancelled,
    s.documents, s.documents + z.archives_open + z.archives_failed + z.archives_cancelled AS files, s.succeeded AS files_succeeded,
    s.failed AS files_failed, s.cancelled AS files_cancelled, s.unfinished AS files_unfinished,
    s.documents + z.archives_open + z.archives_failed + z.archives_cancelled + z.still_packed AS files_expected,
    d.ended_recently, b.run_started_at AS started_at, b.error_message
FROM processing_jobs AS b
CROSS JOIN LATERAL (
    -- The inner SELECT is worked out once, not once for each document.
    SELECT count(*) FILTER (WHERE f.state = 'queued') AS queued, count(*) FILTER (WHERE f.state = 'working') AS working,
        count(*) FILTER (WHERE f.state = 'retrying') AS retrying, count(*) FILTER (WHERE f.state = 'complete') AS complete,
        count(*) FILTER (WHERE f.state = 'duplicate') AS duplicate, count(*) FILTER (WHERE f.state = 'failed') AS failed,
        count(*) FILTER (WHERE f.state = 'cancelled') AS cancelled, count(*) FILTER (WHERE f.status = 'pending') AS pending,
        count(*) FILTER (
            WHERE f.processing_completed_at > greatest((SELECT now() - interval '5 minutes'), b.run_started_at)
        ) AS ended_recently,
        max(f.updated_at) AS last_progress_at
    FROM file_extractions AS f
    WHERE f.batch_id = b.batch_id AND f.run_id = b.run_id
) AS d
CROSS JOIN LATERAL (
    SELECT count(*) AS archives, count(*) FILTER (WHERE a.state IN ('waiting', 'unpacking')) AS archives_open,
        count(*) FILTER (WHERE a.state = 'failed') AS archives_failed, count(*) FILTER (WHERE a.state = 'cancelled') AS archives_cancelled,
        coalesce(sum(a.entry_count), 0) AS archive_files, coalesce(sum(a.unpacked_count), 0) AS unpacked_files,
        coalesce(sum(a.entry_count - a.unpacked_count) FILTER (WHERE a.state IN ('waiting', 'unpacking')), 0) AS still_packed,
        max(a.updated_at) AS last_progress_at
    FROM batch_archives AS a
    WHERE a.batch_id = b.batch_id AND a.run_id = b.run_id
) AS z
CROSS JOIN LATERAL (
    SELECT d.queued + d.working + d.retrying + d.complete + d.duplicate + d.failed + d.cancelled AS documents,
        d.complete + d.duplicate AS succeeded, d.failed + z.archives_failed AS failed, d.cancelled + z.archives_cancelled AS cancelled,
        d.queued + d.working + d.retrying + z.archives_open AS unfinished
) AS s;
COMMENT ON VIEW batch_status IS
    'Every batch with the documents, archives and files of its current run, counted. Its files are its documents and those archives that are not unpacked. Ask for few: each batch''s documents are counted.';
COMMENT ON COLUMN batch_status.batch_id IS 'The batch.';
COMMENT ON COLUMN batch_status.run_id IS 'The current run.';
COMMENT ON COLUMN batch_status.user_id IS 'Whose it is.';
COMMENT ON COLUMN batch_status.source_path IS 'The folder or zip as the submitter named it.';
COMMENT ON COLUMN batch_status.status IS 'pending (still being submitted), processing, completed, completed_with_errors, failed or cancelled.';
COMMENT ON COLUMN batch_status.total_files IS
    'While the run goes on: the submitted files that are no archives, and the entries of opened archives. When it ended: its files. files and files_expected are counted anew.';
COMMENT ON COLUMN batch_status.sealed_at IS 'When every file had been submitted; the batch cannot end before.';
COMMENT ON COLUMN batch_status.created_at IS 'When it was first submitted.';
COMMENT ON COLUMN batch_status.completed_at IS 'When the current run ended; null while it goes on.';
COMMENT ON COLUMN batch_status.pending IS 'Documents that no worker has taken up yet.';
COMMENT ON COLUMN batch_status.processing IS 'Other documents that have not ended.';
COMMENT ON COLUMN batch_status.completed IS 'Documents that are complete or ended as duplicates.';
COMMENT ON COLUMN batch_status.failed IS 'Documents that failed for good or were cancelled; files_failed and files_cancelled tell them apart and have archives too.';
COMMENT ON COLUMN batch_status.archives_cancelled IS 'Archives that were cancelled before they were unpacked.';
COMMENT ON COLUMN batch_status.queued IS 'Documents that wait for a worker.';
COMMENT ON COLUMN batch_status.working IS 'Documents in a worker''s hands.';
COMMENT ON COLUMN batch_status.retrying IS 'Documents that failed and wait to be tried again.';
COMMENT ON COLUMN batch_status.complete IS 'Documents that are complete.';
COMMENT ON COLUMN batch_status.duplicate IS 'Documents that ended as duplicates.';
COMMENT ON COLUMN batch_status.documents_failed IS 'Documents that failed for good.';
COMMENT ON COLUMN batch_status.documents_cancelled IS 'Documents that were cancelled.';
COMMENT ON COLUMN batch_status.documents IS 'Documents.';
COMMENT ON COLUMN batch_status.files IS 'Documents, and archives that are not unpacked: what files_succeeded, files_failed, files_cancelled and files_unfinished add up to.';
COMMENT ON COLUMN batch_status.files_succeeded IS 'Documents that are complete or ended as duplicates.';
COMMENT ON COLUMN batch_status.files_failed IS 'Documents that failed for good, and archives that could not be unpacked.';
COMMENT ON COLUMN batch_status.files_cancelled IS 'Documents and archives that were cancelled.';
COMMENT ON COLUMN batch_status.files_unfinished IS 'Documents that have not ended, and archives that are not unpacked to the end.';
COMMENT ON COLUMN batch_status.files_expected IS 'Files, and entries of opened archives that are still to come out of them.';
COMMENT ON COLUMN batch_status.ended_recently IS 'Documents that ended in the last 5 minutes of the current run.';
COMMENT ON COLUMN batch_status.started_at IS 'When the current run began.';
COMMENT ON COLUMN batch_status.error_message IS 'Why it failed, in plain words.';

CREATE OR REPLACE VIEW batch_progress WITH (security_invoker = true) AS
SELECT
    b.batch_id, b.user_id, b.source_path, b.status, b.total_files, b.queued, b.working, b.retrying, b.complete, b.duplicate,
    b.documents_failed AS failed, b.documents_cancelled AS cancelled, b.archives_open,
    b.completed + b.failed AS ended, b.pending + b.processing AS unfinished,
    CASE WHEN b.status IN ('completed', 'completed_with_errors') AND b.files_unfinished = 0 THEN 100 ELSE
        round(100.0 * t.ended / nullif(b.files_expected, 0), 1)
    END AS percent,
    CASE WHEN t.goes_on THEN t.rate END AS per_second,
    CASE WHEN t.goes_on THEN (b.files_expected - t.ended) / t.rate END AS seconds_left,
    b.last_progress_at, b.started_at, b.sealed_at, b.completed_at, b.error_message, b.run_id,
    b.archives, b.archives_failed, b.archives_cancelled, b.archive_files, b.unpacked_files, b.documents, b.files, b.files_succeeded,
    b.files_failed, b.files_cancelled, b.files_unfinished, b.files_expected, t.ended AS files_ended
FROM batch_status AS b
CROSS JOIN LATERAL (
    SELECT b.files - b.files_unfinished AS ended,
        b.files - b.files_unfinished < b.files_expected AND b.ended_recently > 0
            AND (b.completed_at IS NULL OR b.files_unfinished > 0) AS goes_on,
        b.ended_recently / greatest(1, least(300, extract(epoch FROM now() - b.started_at)))::double precision AS rate
) AS t;
COMMENT ON VIEW batch_progress IS
    'Every batch as batch_status counts it, how quickly it goes and how long that will take. Ask for few: each batch''s documents are counted.';
COMMENT ON COLUMN batch_progress.total_files IS
    'While the run goes on: the submitted files that are no archives, and the entries of opened archives. When it ended: its files. files and files_expected are counted anew.';
COMMENT ON COLUMN batch_progress.failed IS 'Documents that failed for good; files_failed has the archives too.';
COMMENT ON COLUMN batch_progress.cancelled IS 'Documents that were cancelled; files_cancelled has the archives too.';
COMMENT ON COLUMN batch_progress.ended IS 'Documents that have ended, however; files_ended has the archives too.';
COMMENT ON COLUMN batch_progress.unfinished IS 'Documents that have not; files_unfinished has the archives too.';
COMMENT ON COLUMN batch_progress.percent IS 'Part of files_expected that has ended, 0 to 100; null while there is none.';
COMMENT ON COLUMN batch_progress.archives IS 'Zip archives of the run, nested ones included.';
COMMENT ON COLUMN batch_progress.archives_failed IS 'Archives that could not be unpacked.';
COMMENT ON COLUMN batch_progress.archives_cancelled IS 'Archives that were cancelled before they were unpacked.';
COMMENT ON COLUMN batch_progress.archive_files IS 'Entries of the archives that have been opened, nested archives among them.';
COMMENT ON COLUMN batch_progress.unpacked_files IS 'Entries that have been unpacked, or refused with a reason.';
COMMENT ON COLUMN batch_progress.documents IS 'Documents.';
COMMENT ON COLUMN batch_progress.files IS 'Documents, and archives that are not unpacked: what files_succeeded, files_failed, files_cancelled and files_unfinished add up to.';
COMMENT ON COLUMN batch_progress.files_succeeded IS 'Documents that are complete or ended as duplicates.';
COMMENT ON COLUMN batch_progress.files_failed IS 'Documents that failed for good, and archives that could not be unpacked.';
COMMENT ON COLUMN batch_progress.files_cancelled IS 'Documents and archives that were cancelled.';
COMMENT ON COLUMN batch_progress.files_unfinished IS 'Documents that have not ended, and archives that are not unpacked to the end.';
COMMENT ON COLUMN batch_progress.files_expected IS 'Files, and entries of opened archives that are still to come out of them.';
COMMENT ON COLUMN batch_progress.files_ended IS 'Files that have ended, however.';

-- What the run's verdict, its summary and its figures count

CREATE OR REPLACE FUNCTION run_verdict(batch processing_jobs) RETURNS TABLE (
    unfinished bigint, files bigint, status text, error_message text
) LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH counted AS (
        SELECT c.files, c.files_unfinished AS unfinished, c.files_succeeded AS succeeded, c.files_cancelled AS cancelled, c.documents
        FROM batch_status AS c
        WHERE c.batch_id = (batch).batch_id AND c.run_id = (batch).run_id
    ), archives AS (
        SELECT min(a.error_message) AS first_error,
            min(a.error_message) FILTER (WHERE a.entry_path = '' AND a.state = 'failed') AS whole_error
        FROM batch_archives AS a
        WHERE a.run_id = (batch).run_id AND a.state <> 'unpacked'
    )
    SELECT c.unfinished, c.files,
        CASE
            -- Cancelled last, if both: it must stay so, or its run would take in documents again.
            WHEN (batch).status = 'cancelled' THEN 'cancelled'
            WHEN (batch).given_up THEN 'failed'
            WHEN c.succeeded = c.files THEN 'completed'
            WHEN c.succeeded > 0 THEN 'completed_with_errors'
            ELSE 'failed'
        END,
        CASE
            WHEN (batch).given_up OR (batch).status = 'cancelled' THEN (batch).error_message
            -- A failed archive has a reason.
            WHEN a.whole_error IS NOT NULL THEN a.whole_error
            WHEN c.succeeded > 0 OR c.files = 0 THEN NULL
            WHEN c.cancelled = c.files THEN 'every file of the batch was cancelled'
            WHEN c.documents = c.files THEN 'every document of the batch failed'
            WHEN c.files = 1 THEN a.first_error
            WHEN c.documents = 0 THEN 'no archive of the batch could be unpacked: ' || a.first_error
            ELSE 'every document and archive of the batch failed'
        END
    FROM counted AS c, archives AS a;
END;

CREATE OR REPLACE FUNCTION summary_totals(batch processing_jobs) RETURNS jsonb LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH files AS MATERIALIZED (
        SELECT f.outcome, f.duplicate_of, f.pages, f.passages, f.bytes, coalesce(f.file_type, 'unknown') AS file_type, f.error_type
        FROM run_files(batch) AS f
    )
    SELECT jsonb_build_object(
        'files', c.files, 'succeeded', c.files_succeeded, 'failed', c.files_failed, 'cancelled', c.files_cancelled,
        'unfinished', c.files_unfinished
    ) || (
        SELECT jsonb_build_object(
            'duplicates', count(*) FILTER (WHERE f.outcome = 'succeeded' AND f.duplicate_of IS NOT NULL),
            'pages', coalesce(sum(f.pages) FILTER (WHERE f.outcome = 'succeeded'), 0),
            'passages', coalesce(sum(f.passages) FILTER (WHERE f.outcome = 'succeeded'), 0),
            'bytes', coalesce(sum(f.bytes), 0),
            'by_file_type', (
                SELECT coalesce(jsonb_object_agg(t.file_type, t.files), '{}')
                FROM (SELECT g.file_type, count(*) AS files FROM files AS g GROUP BY g.file_type) AS t
            ),
            'by_error_type', (
                SELECT coalesce(jsonb_object_agg(t.error_type, t.files), '{}')
                FROM (SELECT g.error_type, count(*) AS files FROM files AS g WHERE g.outcome = 'failed' GROUP BY g.error_type) AS t
            )
        )
        FROM files AS f
    )
    FROM batch_status AS c
    WHERE c.batch_id = (batch).batch_id AND c.run_id = (batch).run_id;
END;

CREATE OR REPLACE FUNCTION batch_statistics(batch_id text) RETURNS TABLE (
    batch_id text, run_id uuid, status text, files bigint, queued bigint, working bigint, retrying bigint, complete bigint, failed bigint,
    duplicate bigint, cancelled bigint, archives_open bigint, archives_failed bigint, pages bigint, passages bigint, bytes bigint,
    retries bigint, crashes bigint, first_started_at timestamptz, last_progress_at timestamptz, mean_duration_ms double precision,
    max_duration_ms bigint, by_file_type jsonb, by_error_type jsonb
) LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH batch AS (
        SELECT b, b.batch_id, b.run_id FROM processing_jobs AS b WHERE b.batch_id = batch_statistics.batch_id
    ), summed AS MATERIALIZED (
        -- Once, not once for each of its parts.
        SELECT summary_totals(b.b) AS totals FROM batch AS b
    )
    SELECT c.batch_id, c.run_id, c.status, c.files, c.queued, c.working, c.retrying, c.complete, c.documents_failed, c.duplicate,
        c.documents_cancelled, c.archives_open, c.archives_failed, (t.totals ->> 'pages')::bigint, (t.totals ->> 'passages')::bigint,
        (t.totals ->> 'bytes')::bigint, d.retries, d.crashes, d.first_started_at, c.last_progress_at, d.mean_duration_ms, d.max_duration_ms,
        t.totals -> 'by_file_type', t.totals -> 'by_error_type'
    FROM batch AS b
    JOIN batch_status AS c ON c.batch_id = b.batch_id
    CROSS JOIN summed AS t
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(f.retry_count), 0) AS retries, coalesce(sum(f.crash_count), 0) AS crashes,
            min(f.processing_started_at) AS first_started_at, avg(f.processing_duration_ms)::double precision AS mean_duration_ms,
            max(f.processing_duration_ms) AS max_duration_ms
        FROM file_extractions AS f
        WHERE f.batch_id = b.batch_id AND f.run_id = b.run_id
    ) AS d;
END;
COMMENT ON FUNCTION batch_statistics IS
    'The current run of a batch in figures: its files, its documents by state, its archives, pages, passages, retries, times. failed and cancelled count documents; bytes: of the uploads.';

CALL pin_search_path();
