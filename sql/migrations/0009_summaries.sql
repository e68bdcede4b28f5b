-- How batches end, and what is told of them then: the status, one summary for each run, time-outs, and what people do by hand.
--
-- A batch ends when it is sealed and nothing of its run is unfinished, neither a document nor an archive. Whoever ends a last document calls
-- settle_batch in a transaction of its own; the reconciler calls it for those who could not. The summary is written in the transaction that
-- ends the batch, under the batch row's lock and from one snapshot, so there is one however many last documents end at once, and it tells
-- of the run that ended. A batch that has ended is settled again, and its summary written again, whenever one of its documents ends later.
-- settled_at says whether that is due: it is null while the status does not rest on documents that have all ended, as after a time-out.
-- Nobody waits long for the batch row: a submitter may hold it in a long transaction, and the reconciler comes again.

ALTER TABLE processing_jobs
    ADD COLUMN run_started_at timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN settled_at timestamptz,
    ADD COLUMN given_up boolean NOT NULL DEFAULT FALSE;
COMMENT ON COLUMN processing_jobs.run_started_at IS 'When the current run was begun.';
COMMENT ON COLUMN processing_jobs.settled_at IS 'When status and summary were last derived from files that had all ended; null while that is due.';
COMMENT ON COLUMN processing_jobs.given_up IS 'Whether somebody failed the current run by hand: then it stays failed whatever becomes of its documents.';
UPDATE processing_jobs SET run_started_at = created_at, settled_at = completed_at;
CREATE INDEX processing_jobs_unsettled ON processing_jobs (id) WHERE settled_at IS NULL;

CREATE FUNCTION unsettle_batch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.run_id <> OLD.run_id THEN
        NEW.run_started_at := now();
        NEW.given_up := FALSE;
    END IF;
    IF NEW.run_id <> OLD.run_id OR NEW.completed_at IS NULL OR (NEW.status = 'cancelled' AND OLD.status <> 'cancelled') THEN
        NEW.settled_at := NULL;
    END IF;
    RETURN NEW;
END;
$$;
COMMENT ON FUNCTION unsettle_batch IS 'Notes that a batch must be settled: it has a new run, goes on again, or was cancelled.';
CREATE TRIGGER processing_jobs_unsettled BEFORE UPDATE OF run_id, status, completed_at ON processing_jobs
    FOR EACH ROW EXECUTE FUNCTION unsettle_batch();

-- What is in a run

CREATE FUNCTION run_is_open(batch_id text, run_id uuid) RETURNS boolean LANGUAGE sql STABLE
RETURN EXISTS (
    SELECT FROM file_extractions AS d
    WHERE d.batch_id = run_is_open.batch_id AND d.run_id = run_is_open.run_id AND d.state IN ('queued', 'working', 'retrying')
) OR EXISTS (
    SELECT FROM batch_archives AS a WHERE a.run_id = run_is_open.run_id AND a.state IN ('waiting', 'unpacking')
);
COMMENT ON FUNCTION run_is_open IS 'Whether a document or an archive of a run has not ended.';

CREATE FUNCTION path_in_batch(source_path text, batch_source_path text, file_name text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE
    -- An entry of the zip that is the batch.
    WHEN source_path <> '' AND source_path NOT LIKE '/%' THEN source_path
    WHEN starts_with(source_path, rtrim(batch_source_path, '/') || '/') AND length(source_path) > length(rtrim(batch_source_path, '/')) + 1
        THEN substr(source_path, length(rtrim(batch_source_path, '/')) + 2)
    -- An entry of a zip in a list.
    ELSE coalesce(substring(source_path FROM '(?i)/([^/]+\.zip/.+)$'), file_name)
END;
COMMENT ON FUNCTION path_in_batch IS 'Path of a file inside the folder or zip that is its batch; its name where it lies in neither.';

CREATE FUNCTION can_pass(error_type document_error_type) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN error_type NOT IN ('PERMANENT', 'PARSE_ERROR');
COMMENT ON FUNCTION can_pass IS 'Whether the same document can succeed later after a failure of this kind.';

CREATE FUNCTION key_fields(raw_extraction jsonb) RETURNS jsonb LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
-- Whatever extracted: a field of another shape is null or empty, never an error. A few short ones, for a front end's card.
DECLARE
    -- A copy in memory: each use of a stored one would unpack it anew.
    raw jsonb := raw_extraction || '{}';
BEGIN
    IF raw IS NULL THEN
        RETURN NULL;
    END IF;
    RETURN jsonb_build_object(
        'title', left(CASE jsonb_typeof(raw -> 'title') WHEN 'string' THEN raw ->> 'title' WHEN 'object' THEN raw #>> '{title,text}' END, 300),
        'language', left(CASE jsonb_typeof(raw -> 'language')
            WHEN 'string' THEN raw ->> 'language' WHEN 'object' THEN raw #>> '{language,code}' END, 35),
        'words', CASE WHEN jsonb_typeof(raw #> '{statistics,words}') = 'number' THEN raw #> '{statistics,words}' END,
        'dates', (
            SELECT coalesce(jsonb_agg(left(part #>> '{}', 40)), '[]')
            FROM jsonb_path_query(raw, 'lax $.dates[0 to 4].iso ? (@.type() == "string")', silent => TRUE) AS part
        ),
        'amounts', (
            SELECT coalesce(jsonb_agg(jsonb_build_object(
                'currency', left(part ->> 'currency', 10), 'value', left(part ->> 'value', 60), 'text', left(part ->> 'text', 100))), '[]')
            FROM jsonb_path_query(raw, 'lax $.amounts[0 to 4] ? (@.type() == "object")', silent => TRUE) AS part
        ),
        'key_values', (
            SELECT coalesce(jsonb_agg(jsonb_build_object('key', left(part ->> 'key', 60), 'value', left(part ->> 'value', 300))), '[]')
            FROM jsonb_path_query(raw, 'lax $.key_values[0 to 7] ? (@.type() == "object")', silent => TRUE) AS part
        )
    );
END;
$$;
COMMENT ON FUNCTION key_fields IS 'Title, language, words and the first dates, amounts and pairs of a raw_extraction, each short.';

CREATE FUNCTION run_files(batch processing_jobs) RETURNS TABLE (
    kind text, doc_id text, name text, path text, file_type text, mime_type text, bytes bigint, pages integer, passages integer, state text,
    outcome text, error_type document_error_type, error_message text, duration_ms bigint, version integer, served_version integer,
    duplicate_of text, submitted_at timestamptz, started_at timestamptz, ended_at timestamptz, raw_extraction jsonb
) LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT 'document', d.doc_id, d.file_name, path_in_batch(d.source_path, (batch).source_path, d.file_name), d.file_type, d.mime_type,
        d.file_size, d.page_count, d.chunk_count, d.state::text,
        CASE WHEN d.state IN ('complete', 'duplicate') THEN 'succeeded' WHEN d.state IN ('failed', 'cancelled') THEN d.state::text
            ELSE 'unfinished' END,
        d.error_type, d.error_message, d.processing_duration_ms, d.version, d.served_version, d.duplicate_of, d.created_at,
        d.processing_started_at, d.processing_completed_at, d.raw_extraction
    FROM file_extractions AS d
    WHERE d.batch_id = (batch).batch_id AND d.run_id = (batch).run_id
    UNION ALL
    -- An archive that was unpacked is its entries.
    SELECT 'archive', NULL, regexp_replace(p.path, '^.*/', ''), p.path, 'zip', 'application/zip', NULL, NULL, NULL, a.state,
        CASE WHEN a.state IN ('failed', 'cancelled') THEN a.state ELSE 'unfinished' END,
        CASE WHEN a.state = 'failed' THEN 'PERMANENT'::document_error_type END, a.error_message, NULL, 1, NULL, NULL, a.created_at, NULL,
        a.ended_at, NULL
    FROM batch_archives AS a
    CROSS JOIN LATERAL (
        SELECT coalesce(nullif(rtrim(a.entry_path, '/'), ''), regexp_replace((batch).source_path, '^.*/', ''), (batch).batch_id) AS path
    ) AS p
    WHERE a.run_id = (batch).run_id AND a.state <> 'unpacked';
END;
COMMENT ON FUNCTION run_files IS 'Every file of the batch''s current run: its documents, and archives that were not unpacked.';

CREATE FUNCTION run_verdict(batch processing_jobs) RETURNS TABLE (unfinished bigint, files bigint, status text, error_message text)
LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH counted AS (
        SELECT count(*) AS files,
            count(*) FILTER (WHERE f.kind = 'document') AS documents,
            count(*) FILTER (WHERE f.outcome = 'unfinished') AS unfinished,
            count(*) FILTER (WHERE f.outcome = 'succeeded') AS succeeded,
            count(*) FILTER (WHERE f.outcome = 'cancelled') AS cancelled,
            min(f.error_message) FILTER (WHERE f.kind = 'archive') AS archive_error
        FROM run_files(batch) AS f
    ), whole AS (
        SELECT a.error_message FROM batch_archives AS a WHERE a.run_id = (batch).run_id AND a.entry_path = '' AND a.state = 'failed'
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
            WHEN EXISTS (SELECT FROM whole) THEN (SELECT w.error_message FROM whole AS w)
            WHEN c.succeeded > 0 OR c.files = 0 THEN NULL
            WHEN c.cancelled = c.files THEN 'every file of the batch was cancelled'
            WHEN c.documents = c.files THEN 'every document of the batch failed'
            WHEN c.files = 1 THEN c.archive_error
            WHEN c.documents = 0 THEN 'no archive of the batch could be unpacked: ' || c.archive_error
            ELSE 'every document and archive of the batch failed'
        END
    FROM counted AS c;
END;
COMMENT ON FUNCTION run_verdict IS 'How the current run of a batch ends, and why if it failed; good once nothing is unfinished.';

-- The summary, as docs/run_summary.schema.json describes it. Fields are only ever added.

CREATE FUNCTION in_words(status text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE status
    WHEN 'pending' THEN 'being submitted' WHEN 'processing' THEN 'being worked on' WHEN 'completed_with_errors' THEN 'completed with errors'
    WHEN 'queued' THEN 'waiting' WHEN 'working' THEN 'being worked on' WHEN 'retrying' THEN 'waiting to be tried again'
    WHEN 'complete' THEN 'completed' WHEN 'duplicate' THEN 'the same as another document' WHEN 'unpacking' THEN 'being unpacked'
    ELSE status
END;
COMMENT ON FUNCTION in_words IS 'The status of a batch, document or archive in plain words.';

CREATE FUNCTION summary_totals(batch processing_jobs) RETURNS jsonb LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH files AS MATERIALIZED (
        SELECT f.outcome, f.duplicate_of, f.pages, f.passages, f.bytes, coalesce(f.file_type, 'unknown') AS file_type, f.error_type
        FROM run_files(batch) AS f
    )
    SELECT jsonb_build_object(
        'files', count(*),
        'succeeded', count(*) FILTER (WHERE f.outcome = 'succeeded'),
        'failed', count(*) FILTER (WHERE f.outcome = 'failed'),
        'cancelled', count(*) FILTER (WHERE f.outcome = 'cancelled'),
        'unfinished', count(*) FILTER (WHERE f.outcome = 'unfinished'),
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
    FROM files AS f;
END;
COMMENT ON FUNCTION summary_totals IS 'The counts of a run: part of ui_json.';

CREATE FUNCTION summary_cards(batch processing_jobs, most integer) RETURNS jsonb LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT coalesce(jsonb_agg(jsonb_build_object(
        'kind', f.kind, 'doc_id', f.doc_id, 'name', f.name, 'path', f.path, 'file_type', f.file_type, 'mime_type', f.mime_type,
        'bytes', f.bytes, 'pages', f.pages, 'passages', f.passages,
        'status', f.state, 'status_text', in_words(f.state), 'outcome', f.outcome,
        'error_type', f.error_type, 'error_message', left(f.error_message, 2000),
        'can_be_retried', CASE WHEN f.outcome = 'failed' THEN can_pass(f.error_type) END,
        'key_fields', key_fields(f.raw_extraction),
        'duration_ms', f.duration_ms, 'version', f.version, 'served_version', f.served_version, 'duplicate_of', f.duplicate_of,
        'submitted_at', f.submitted_at, 'started_at', f.started_at, 'completed_at', f.ended_at
    ) ORDER BY f.path COLLATE "C", f.doc_id), '[]')
    FROM (
        SELECT g.* FROM run_files(batch) AS g ORDER BY g.outcome = 'succeeded', g.path COLLATE "C", g.doc_id LIMIT most
    ) AS f;
END;
COMMENT ON FUNCTION summary_cards IS 'One card for each file of a run in the order of paths: part of ui_json. Beyond so many, those that did not succeed go first.';

CREATE FUNCTION summary_timeline(batch processing_jobs, status text, error_message text, ended_at timestamptz) RETURNS jsonb
LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH files AS MATERIALIZED (
        SELECT f.outcome, f.started_at, f.ended_at FROM run_files(batch) AS f
    ), counted AS (
        SELECT count(*) AS files, count(*) FILTER (WHERE f.outcome <> 'unfinished') AS ended,
            count(*) FILTER (WHERE f.outcome IN ('failed', 'cancelled')) AS errors
        FROM files AS f
    ), finished AS (
        -- Only what was worked on in this run: unchanged documents ended in an earlier one.
        SELECT f.ended_at AS at, row_number() OVER (ORDER BY f.ended_at) + c.files - count(*) OVER () AS place, c.files
        FROM files AS f, counted AS c
        WHERE f.outcome <> 'unfinished' AND f.ended_at >= (batch).run_started_at AND c.ended = c.files
    ), events (at, event, text) AS (
        SELECT (batch).run_started_at, 'submitted', 'the submission began'
        UNION ALL
        SELECT (batch).sealed_at, 'sealed', 'everything was submitted' WHERE (batch).sealed_at IS NOT NULL
        UNION ALL
        SELECT min(f.started_at), 'first_work', 'work began' FROM files AS f WHERE f.started_at >= (batch).run_started_at
        UNION ALL
        SELECT max(a.ended_at), 'unpacked', format('%s unpacked, %s found', CASE count(*) WHEN 1 THEN '1 archive' ELSE count(*) || ' archives' END,
            CASE sum(a.unpacked_count) WHEN 1 THEN '1 file' ELSE coalesce(sum(a.unpacked_count), 0) || ' files' END)
        FROM batch_archives AS a
        WHERE a.run_id = (batch).run_id AND a.state = 'unpacked'
        UNION ALL
        SELECT min(f.at), 'progress', format('%s %% of the files done', quarter)
        FROM finished AS f, unnest(ARRAY[25, 50, 75]) AS quarter
        WHERE f.files >= 8 AND f.place >= ceil(f.files * quarter / 100.0) AND f.place > f.files - (SELECT count(*) FROM finished)
        GROUP BY quarter
        UNION ALL
        SELECT summary_timeline.ended_at, 'ended', concat_ws(': ', in_words(summary_timeline.status), summary_timeline.error_message,
            CASE WHEN c.errors BETWEEN 1 AND c.files - 1 THEN format('%s of %s files did not succeed', c.errors, c.files) END)
        FROM counted AS c
        WHERE summary_timeline.ended_at IS NOT NULL
    )
    SELECT jsonb_agg(jsonb_build_object('at', e.at, 'event', e.event, 'text', e.text)
        ORDER BY e.at, array_position(ARRAY['submitted', 'sealed', 'unpacked', 'first_work', 'progress', 'ended'], e.event), e.text)
    FROM events AS e
    WHERE e.at IS NOT NULL;
END;
COMMENT ON FUNCTION summary_timeline IS 'What happened to a run and when, shortly: part of ui_json.';

CREATE FUNCTION summary_tree(batch processing_jobs, most integer) RETURNS jsonb LANGUAGE sql STABLE
BEGIN ATOMIC
    -- Folders stand in a flat list with their parents' paths; those deeper than 32 levels are counted at the 32nd.
    WITH files AS MATERIALIZED (
        SELECT f.kind, f.doc_id, f.name, f.path, f.state, f.outcome, f.pages, f.passages,
            CASE WHEN f.path LIKE '%/%' THEN (string_to_array(regexp_replace(f.path, '/[^/]*$', ''), '/'))[:32] ELSE '{}' END AS folders,
            row_number() OVER (ORDER BY f.outcome = 'succeeded', f.path COLLATE "C", f.doc_id) <= most AS listed,
            sum(CASE WHEN f.outcome = 'succeeded' THEN f.passages ELSE 0 END)
                OVER (ORDER BY f.outcome = 'succeeded', f.path COLLATE "C", f.doc_id ROWS UNBOUNDED PRECEDING) AS passages_so_far,
            -- So many sections a file that all together stay bounded.
            least(100, 50000 / greatest(1, least(most, count(*) OVER ()))) AS sections
        FROM run_files(batch) AS f
    ), leaves AS (
        SELECT f.folders, f.path, f.doc_id, jsonb_build_object(
            'kind', f.kind, 'doc_id', f.doc_id, 'name', f.name, 'path', f.path, 'status', f.state, 'outcome', f.outcome, 'pages', f.pages,
            'passages', f.passages, 'sections', s.sections, 'sections_omitted', s.omitted
        ) AS leaf
        FROM files AS f
        LEFT JOIN LATERAL (
            SELECT coalesce(jsonb_agg(jsonb_build_object(
                'heading', left(g.heading_path[cardinality(g.heading_path)], 300),
                'heading_path', (SELECT coalesce(jsonb_agg(left(h, 300)), '[]') FROM unnest(g.heading_path[:8]) AS h),
                'passages', g.passages, 'page_start', g.page_start, 'page_end', g.page_end
            ) ORDER BY g.first), '[]') AS sections, coalesce(max(g.found) - count(*), 0) AS omitted
            FROM (
                SELECT c.heading_path, count(*) AS passages, min(c.page_start) AS page_start, max(c.page_end) AS page_end,
                    min(c.chunk_index) AS first, count(*) OVER () AS found
                FROM document_chunks AS c
                WHERE c.doc_id = f.doc_id
                GROUP BY c.heading_path
                ORDER BY first
                LIMIT f.sections
            ) AS g
            HAVING f.outcome = 'succeeded'
        -- A batch of millions of passages would be read for minutes.
        ) AS s ON f.passages_so_far <= 500000
        WHERE f.listed
    ), paths AS (
        SELECT f.folders[:depth] AS folder, f.outcome, f.pages, f.passages, depth = cardinality(f.folders) AS direct, f.listed
        FROM files AS f
        CROSS JOIN LATERAL generate_series(0, cardinality(f.folders)) AS depth
    ), folders AS (
        SELECT p.folder, count(*) OVER () AS found, row_number() OVER (ORDER BY array_to_string(p.folder, '/') COLLATE "C") AS place,
            jsonb_build_object(
                'path', array_to_string(p.folder, '/'),
                'parent', CASE WHEN cardinality(p.folder) > 0 THEN array_to_string(p.folder[:cardinality(p.folder) - 1], '/') END,
                'name', p.folder[cardinality(p.folder)],
                'depth', cardinality(p.folder),
                'files_here', count(*) FILTER (WHERE p.direct),
                'files_omitted', count(*) FILTER (WHERE p.direct AND NOT p.listed),
                'files_below', count(*),
                'succeeded', count(*) FILTER (WHERE p.outcome = 'succeeded'),
                'failed', count(*) FILTER (WHERE p.outcome = 'failed'),
                'cancelled', count(*) FILTER (WHERE p.outcome = 'cancelled'),
                'unfinished', count(*) FILTER (WHERE p.outcome = 'unfinished'),
                'pages', coalesce(sum(p.pages) FILTER (WHERE p.outcome = 'succeeded'), 0),
                'passages', coalesce(sum(p.passages) FILTER (WHERE p.outcome = 'succeeded'), 0)
            ) AS counts
        FROM paths AS p
        GROUP BY p.folder
    ), filled AS (
        SELECT l.folders AS folder, jsonb_agg(l.leaf ORDER BY l.path COLLATE "C", l.doc_id) AS leaves FROM leaves AS l GROUP BY l.folders
    )
    SELECT jsonb_build_object(
        'folders', coalesce(jsonb_agg(f.counts || jsonb_build_object('files', coalesce(i.leaves, '[]')) ORDER BY f.place), '[]'),
        'folders_omitted', coalesce(max(f.found) - count(*), 0)
    )
    FROM folders AS f
    LEFT JOIN filled AS i ON i.folder = f.folder
    WHERE f.place <= greatest(most, 1);
END;
COMMENT ON FUNCTION summary_tree IS 'Folders, their files, and the sections of these with their passages: part of nested_summary.';

CREATE FUNCTION summarize_run(batch processing_jobs, status text, error_message text, ended_at timestamptz) RETURNS TABLE (
    ui_json jsonb, nested_summary jsonb, file_count integer, success_count integer, error_count integer
) LANGUAGE plpgsql STABLE SET timezone = 'UTC' SET jit = off AS $$
-- Stable, so that all of it comes from the snapshot of the statement that calls it.
#variable_conflict use_variable
DECLARE
    most integer;
    totals jsonb := summary_totals(batch);
    name jsonb := jsonb_build_object('schema_version', '1.0', 'batch_id', batch.batch_id, 'run_id', batch.run_id);
    cards jsonb;
BEGIN
    -- JSON in Postgres ends at 256 MB. A batch must end whatever its files are called, so the lists give way.
    FOREACH most IN ARRAY ARRAY[10000, 500, 0] LOOP
        BEGIN
            cards := summary_cards(batch, most);
            ui_json := jsonb_build_object(
                'schema_version', '1.0',
                'batch', jsonb_build_object(
                    'batch_id', batch.batch_id, 'run_id', batch.run_id, 'user_id', batch.user_id, 'source_path', batch.source_path,
                    'status', status, 'status_text', in_words(status), 'error_message', error_message,
                    'correlation_id', batch.correlation_id, 'metadata', batch.metadata, 'first_submitted_at', batch.created_at,
                    'submitted_at', batch.run_started_at, 'sealed_at', batch.sealed_at, 'completed_at', ended_at,
                    'duration_ms', (extract(epoch FROM ended_at - batch.run_started_at) * 1000)::bigint
                ),
                'totals', totals,
                'files', cards,
                'files_omitted', (totals ->> 'files')::integer - jsonb_array_length(cards),
                'timeline', summary_timeline(batch, status, error_message, ended_at)
            );
            nested_summary := name || summary_tree(batch, most);
            EXIT;
        EXCEPTION WHEN program_limit_exceeded OR out_of_memory THEN
            IF most = 0 THEN
                RAISE;
            END IF;
        END;
    END LOOP;
    file_count := totals ->> 'files';
    success_count := totals ->> 'succeeded';
    error_count := (totals ->> 'failed')::integer + (totals ->> 'cancelled')::integer;
    RETURN NEXT;
END;
$$;
COMMENT ON FUNCTION summarize_run IS 'The summary of a batch''s current run as if it had ended so; nothing is written. Inside of settle_batch.';

CREATE FUNCTION build_run_summary(batch_id text) RETURNS TABLE (
    ui_json jsonb, nested_summary jsonb, file_count integer, success_count integer, error_count integer
) LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT s.* FROM processing_jobs AS b, summarize_run(b, b.status, b.error_message, b.completed_at) AS s
    WHERE b.batch_id = build_run_summary.batch_id;
END;
COMMENT ON FUNCTION build_run_summary IS 'The summary of a batch as it stands now, also before it has ended; nothing is written.';

CREATE FUNCTION run_summary(id text) RETURNS run_summaries LANGUAGE plpgsql STABLE AS $$
DECLARE
    run uuid := (SELECT b.run_id FROM processing_jobs AS b WHERE b.batch_id = run_summary.id);
    found_summary run_summaries;
BEGIN
    IF run IS NULL AND pg_input_is_valid(run_summary.id, 'uuid') THEN
        run := run_summary.id::uuid;
    END IF;
    SELECT r.* INTO found_summary FROM run_summaries AS r WHERE r.run_id = run;
    RETURN found_summary;
END;
$$;
COMMENT ON FUNCTION run_summary IS 'The summary of a batch''s current run, by batch_id, or of any run, by run_id; null before it has ended.';

CREATE FUNCTION keep_summary(
    batch processing_jobs, ui_json jsonb, nested_summary jsonb, file_count integer, success_count integer, error_count integer
) RETURNS void LANGUAGE sql AS $$
    INSERT INTO run_summaries AS r (run_id, batch_id, user_id, ui_json, nested_summary, file_count, success_count, error_count)
    VALUES (batch.run_id, batch.batch_id, batch.user_id, ui_json, nested_summary, file_count, success_count, error_count)
    ON CONFLICT (run_id) DO UPDATE
    SET ui_json = EXCLUDED.ui_json, nested_summary = EXCLUDED.nested_summary, file_count = EXCLUDED.file_count,
        success_count = EXCLUDED.success_count, error_count = EXCLUDED.error_count, updated_at = now();
$$;
COMMENT ON FUNCTION keep_summary IS 'Writes the one summary of a batch''s current run; the batch''s lock is held.';

-- How a batch ends

CREATE FUNCTION may_settle(batch processing_jobs) RETURNS boolean LANGUAGE sql STABLE
RETURN (batch.sealed_at IS NOT NULL OR batch.status = 'cancelled' OR batch.given_up) AND NOT run_is_open(batch.batch_id, batch.run_id);
COMMENT ON FUNCTION may_settle IS 'Whether nothing of a batch''s current run is unfinished and nothing more is to come.';

CREATE FUNCTION hold_batch(batch_id text) RETURNS processing_jobs LANGUAGE plpgsql SET lock_timeout = '2s' AS $$
-- No stronger lock: a submitter's foreign key shares this row until its transaction ends, which may be long.
DECLARE
    batch processing_jobs;
BEGIN
    SELECT b.* INTO batch FROM processing_jobs AS b WHERE b.batch_id = hold_batch.batch_id FOR NO KEY UPDATE;
    RETURN batch;
EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
    RETURN NULL;
END;
$$;
COMMENT ON FUNCTION hold_batch IS 'Locks a batch and returns it; null if there is none or somebody holds it for more than two seconds.';

CREATE OR REPLACE FUNCTION settle_batch(batch_id text) RETURNS text LANGUAGE plpgsql AS $$
-- Called after the transaction that ended a document. The cheap look comes first, so that only the last documents lock the batch; the second
-- look is a statement of its own, so that it sees what committed while this one waited for the lock.
DECLARE
    batch processing_jobs;
    verdict record;
    ended timestamptz := clock_timestamp();
BEGIN
    SELECT b.* INTO batch FROM processing_jobs AS b WHERE b.batch_id = settle_batch.batch_id;
    IF may_settle(batch) IS NOT TRUE THEN
        RETURN NULL;
    END IF;
    batch := hold_batch(settle_batch.batch_id);
    IF may_settle(batch) IS NOT TRUE THEN
        RETURN NULL;
    END IF;
    -- Who has timed out ends anew; who had ended before keeps the time.
    IF batch.settled_at IS NOT NULL OR batch.status = 'cancelled' OR batch.given_up THEN
        ended := coalesce(batch.completed_at, ended);
    END IF;
    SELECT v.files, v.status, v.error_message, s.* INTO verdict
    FROM run_verdict(batch) AS v
    CROSS JOIN LATERAL summarize_run(batch, v.status, v.error_message, ended) AS s
    WHERE v.unfinished = 0;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    UPDATE processing_jobs AS b
    SET status = verdict.status, error_message = verdict.error_message, total_files = verdict.files, completed_at = ended,
        updated_at = now(), settled_at = now()
    WHERE b.id = batch.id;
    PERFORM keep_summary(
        batch, verdict.ui_json, verdict.nested_summary, verdict.file_count, verdict.success_count, verdict.error_count);
    RETURN nullif(verdict.status, 'cancelled');
END;
$$;
COMMENT ON FUNCTION settle_batch IS
    'Ends a sealed batch if all its files have ended, writes its summary and returns its status; null while it goes on, is held by somebody or was cancelled.';

CREATE OR REPLACE FUNCTION seal_batch(batch_id text, run_id uuid, total_files integer) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    UPDATE processing_jobs AS b
    SET sealed_at = now(), total_files = seal_batch.total_files, direct_files = seal_batch.total_files, updated_at = now(),
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
COMMENT ON FUNCTION seal_batch IS 'Says that every file of the run has been submitted; before that the batch cannot end.';

CREATE OR REPLACE FUNCTION reopen_batch(batch_id text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    batch processing_jobs := hold_batch(reopen_batch.batch_id);
BEGIN
    -- A batch that is not sealed could not be ended again.
    IF batch.id IS NULL OR batch.completed_at IS NULL OR batch.sealed_at IS NULL OR batch.status = 'cancelled' OR batch.given_up THEN
        RETURN NULL;
    END IF;
    -- A statement of its own: what ended while the one before waited for the lock is no reason to reopen. What ends from now on calls
    -- settle_batch, which waits for this transaction.
    UPDATE processing_jobs AS b
    SET status = 'processing', completed_at = NULL, error_message = NULL, updated_at = now()
    WHERE b.id = batch.id AND run_is_open(batch.batch_id, batch.run_id)
    RETURNING b.status INTO batch.status;
    RETURN CASE WHEN FOUND THEN batch.status END;
END;
$$;
COMMENT ON FUNCTION reopen_batch IS
    'Sets an ended batch back to processing if a document of its run is unfinished again, and returns its status; null if nothing changed. Call it in a transaction of its own; the reconciler does where nobody did.';

CREATE FUNCTION stall_of(batch processing_jobs, timeout_seconds double precision, undisturbed_seconds double precision) RETURNS text
LANGUAGE plpgsql STABLE AS $$
-- Waiting for the queue, a breaker or a budget is no stall: only while something is being worked on does the time count. Claims and
-- checkpoints change a document's row, renewals of a lease do not. Nobody could get on while the database was away.
DECLARE
    latest timestamptz := greatest(batch.updated_at, pg_postmaster_start_time());
    documents record;
    archives record;
BEGIN
    IF batch.completed_at IS NOT NULL OR undisturbed_seconds < timeout_seconds THEN
        RETURN NULL;
    END IF;
    SELECT count(*) FILTER (WHERE d.state = 'working') AS working, max(d.updated_at) AS latest INTO documents
    FROM file_extractions AS d
    WHERE d.batch_id = batch.batch_id AND d.run_id = batch.run_id;
    SELECT count(*) FILTER (WHERE a.state = 'unpacking') AS unpacking, count(*) FILTER (WHERE a.state = 'waiting') AS waiting,
        max(a.updated_at) AS latest INTO archives
    FROM batch_archives AS a
    WHERE a.run_id = batch.run_id;
    IF greatest(latest, documents.latest, archives.latest) > now() - make_interval(secs => timeout_seconds) THEN
        RETURN NULL;
    END IF;
    IF documents.working + archives.unpacking > 0 THEN
        RETURN format('nothing got on for %s seconds (BATCH_PROCESSING_TIMEOUT) while %s being worked on', timeout_seconds,
            concat_ws(' and ', CASE WHEN documents.working > 0 THEN documents.working || ' of its documents' END,
                CASE WHEN archives.unpacking > 0 THEN archives.unpacking || ' of its archives' END)
            || CASE WHEN documents.working + archives.unpacking = 1 THEN ' was' ELSE ' were' END);
    END IF;
    IF batch.sealed_at IS NULL AND archives.waiting = 0 THEN
        RETURN 'the submitter stopped before everything was submitted; submit it again';
    END IF;
    RETURN NULL;
END;
$$;
COMMENT ON FUNCTION stall_of IS
    'Why a batch does not get on, or null. undisturbed_seconds: how long the asker has watched without the database being away.';

CREATE FUNCTION fail_stalled_batch(batch_id text, timeout_seconds double precision, undisturbed_seconds double precision DEFAULT 'Infinity')
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
    PERFORM alert('batch_stalled', format('batch %s: %s', coalesce(batch.source_path, batch.batch_id), reason), jsonb_build_object(
        'batch_id', batch.batch_id, 'run_id', batch.run_id, 'user_id', batch.user_id, 'correlation_id', batch.correlation_id,
        'totals', made.ui_json -> 'totals'));
    RETURN 'batch failed: ' || reason;
END;
$$;
COMMENT ON FUNCTION fail_stalled_batch IS
    'Fails a batch that got no further for so long while one of its files was being worked on, or whose submitter has gone; returns what was done or null.';

-- What people and applications do by hand. Each changes one document or one batch, never both: the batch follows by settle_batch,
-- reopen_batch or the reconciler. docs/operations-api.md lists them with their Python names.

CREATE FUNCTION hold_document(doc_id text) RETURNS file_extractions LANGUAGE plpgsql SET lock_timeout = '5s' AS $$
DECLARE
    d file_extractions;
BEGIN
    SELECT f.* INTO d FROM file_extractions AS f WHERE f.doc_id = hold_document.doc_id FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no document "%"', coalesce(hold_document.doc_id, 'null') USING ERRCODE = 'no_data_found';
    END IF;
    RETURN d;
END;
$$;
COMMENT ON FUNCTION hold_document IS 'Locks a document and returns it; an error if there is none or somebody holds it for more than five seconds.';

CREATE FUNCTION check_metadata(metadata jsonb) RETURNS jsonb LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF jsonb_typeof(metadata) <> 'object' THEN
        RAISE EXCEPTION 'metadata must be a JSON object, not %', jsonb_typeof(metadata) USING ERRCODE = 'invalid_parameter_value';
    END IF;
    RETURN metadata;
END;
$$;
COMMENT ON FUNCTION check_metadata IS 'Returns metadata that is an object, or null; anything else is an error.';

CREATE FUNCTION merge_metadata(known jsonb, changes jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE
RETURN (known || coalesce(changes, '{}')) - ARRAY(SELECT c.key FROM jsonb_each(changes) AS c WHERE jsonb_typeof(c.value) = 'null');
COMMENT ON FUNCTION merge_metadata IS 'Metadata with some keys set anew; a key set to null is removed.';

CREATE FUNCTION update_document(doc_id text, metadata jsonb DEFAULT NULL, priority integer DEFAULT NULL) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    d file_extractions;
BEGIN
    PERFORM check_metadata(update_document.metadata);
    d := hold_document(update_document.doc_id);
    UPDATE file_extractions AS f
    SET metadata = merge_metadata(f.metadata, update_document.metadata), priority = coalesce(update_document.priority, f.priority),
        updated_at = now()
    WHERE f.id = d.id;
    -- A job that has been fetched takes the priority along when it hands on.
    UPDATE procrastinate_jobs AS j
    SET priority = update_document.priority
    WHERE j.status = 'todo' AND j.priority <> update_document.priority AND j.queueing_lock IN (
        SELECT stage || ':' || d.doc_id FROM unnest(ARRAY['validate', 'parse', 'check', 'chunk', 'embed', 'extract', 'finalize']) AS stage
    );
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, event, claim, detail)
    VALUES (d.doc_id, d.version, d.batch_id, d.user_id, d.correlation_id, 'updated_by_operator', d.claim, jsonb_strip_nulls(jsonb_build_object(
        'priority', update_document.priority, 'metadata_keys', (SELECT jsonb_agg(k) FROM jsonb_object_keys(update_document.metadata) AS k),
        'role', session_user)));
END;
$$;
COMMENT ON FUNCTION update_document IS
    'Changes keys of a document''s metadata (a key set to null is removed) and its priority, also of its waiting job; what is null stays.';

CREATE FUNCTION fail_document_by_operator(doc_id text, reason text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    d file_extractions := hold_document(fail_document_by_operator.doc_id);
BEGIN
    IF coalesce(btrim(reason), '') = '' THEN
        RAISE EXCEPTION 'document "%": a reason is needed', d.doc_id USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF d.state NOT IN ('queued', 'working', 'retrying') THEN
        RAISE EXCEPTION 'document "%" is %, which cannot be failed', d.doc_id, d.state USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    PERFORM fail_document(d, 'PERMANENT'::document_error_type, reason, jsonb_build_object('role', session_user, 'milestone', d.milestone));
    PERFORM drop_waiting_jobs(d.doc_id);
    RETURN 'failed';
END;
$$;
COMMENT ON FUNCTION fail_document_by_operator IS
    'Fails an unfinished document with a reason, also in a worker''s hands, and writes its dead letter. Then, if it has a batch: SELECT settle_batch(batch_id).';

CREATE FUNCTION should_reprocess(
    doc_id text, deadline_seconds double precision DEFAULT 1800, max_retries integer DEFAULT 3, OUT answer boolean, OUT reason text
) LANGUAGE plpgsql STABLE AS $$
-- Whatever needs it is reprocessed without being asked for, except what has failed: that takes retry.
DECLARE
    d file_extractions;
    retries_left integer;
BEGIN
    SELECT f.* INTO d FROM file_extractions AS f WHERE f.doc_id = should_reprocess.doc_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no document "%"', coalesce(should_reprocess.doc_id, 'null') USING ERRCODE = 'no_data_found';
    END IF;
    retries_left := greatest(0, max_retries - d.retry_count);
    SELECT c.answer, c.reason INTO answer, reason FROM (VALUES
        (1, d.state IN ('complete', 'duplicate'), FALSE, format('it is done: %s', d.state)),
        (2, d.state = 'cancelled', FALSE, 'it was cancelled; submitting it again takes it up where it was left'),
        (3, d.state = 'failed' AND NOT can_pass(d.error_type), FALSE, format('its error is permanent: %s', d.error_message)),
        (4, d.state = 'failed' AND NOT EXISTS (SELECT FROM dead_letters AS l WHERE l.doc_id = d.doc_id AND l.resolved_at IS NULL), FALSE,
            'it failed and was put away'),
        (5, d.state = 'failed' AND EXISTS (SELECT FROM dead_letters AS l
            WHERE l.doc_id = d.doc_id AND l.resolved_at IS NULL AND l.context ? 'lone_crash_count'), FALSE,
            format('its worker died of it: %s', d.error_message)),
        (6, d.state = 'failed' AND retries_left = 0, FALSE, format('its retries are used up: %s', d.error_message)),
        (7, d.state = 'failed', TRUE, format('its error may pass (retries left: %s): %s', retries_left, d.error_message)),
        (8, d.state = 'retrying', TRUE, format('its error may pass; it is tried again by itself: %s', d.error_message)),
        (9, d.state = 'working' AND d.lease_until < now(), TRUE, 'its worker is dead; it is taken up again by itself'),
        (10, d.state = 'working' AND d.updated_at < now() - make_interval(secs => deadline_seconds), TRUE,
            format('it is past its deadline of %s seconds', deadline_seconds)),
        (11, d.state = 'working', FALSE, 'it is being worked on'),
        (12, TRUE, FALSE, 'it waits to be worked on')
    ) AS c (place, holds, answer, reason)
    WHERE c.holds
    ORDER BY c.place
    LIMIT 1;
END;
$$;
COMMENT ON FUNCTION should_reprocess IS
    'Whether a document should be processed again, and why: done and permanent errors no; retries left, a deadline passed or a dead worker yes.';

CREATE FUNCTION update_batch(batch_id text, metadata jsonb) RETURNS void LANGUAGE plpgsql SET lock_timeout = '5s' AS $$
BEGIN
    PERFORM check_metadata(update_batch.metadata);
    UPDATE processing_jobs AS b
    SET metadata = merge_metadata(b.metadata, update_batch.metadata), updated_at = now()
    WHERE b.batch_id = update_batch.batch_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no batch "%"', coalesce(update_batch.batch_id, 'null') USING ERRCODE = 'no_data_found';
    END IF;
END;
$$;
COMMENT ON FUNCTION update_batch IS 'Changes keys of a batch''s metadata; a key set to null is removed.';

CREATE FUNCTION fail_batch(batch_id text, reason text) RETURNS text LANGUAGE plpgsql SET lock_timeout = '5s' AS $$
DECLARE
    batch processing_jobs;
    made record;
    ended timestamptz;
BEGIN
    IF coalesce(btrim(reason), '') = '' THEN
        RAISE EXCEPTION 'batch "%": a reason is needed', fail_batch.batch_id USING ERRCODE = 'invalid_parameter_value';
    END IF;
    SELECT b.* INTO batch FROM processing_jobs AS b WHERE b.batch_id = fail_batch.batch_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no batch "%"', coalesce(fail_batch.batch_id, 'null') USING ERRCODE = 'no_data_found';
    END IF;
    IF batch.status = 'cancelled' THEN
        RAISE EXCEPTION 'batch "%" is cancelled', batch.batch_id USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    ended := coalesce(batch.completed_at, clock_timestamp());
    SELECT s.* INTO made FROM summarize_run(batch, 'failed', reason, ended) AS s;
    UPDATE processing_jobs AS b
    SET status = 'failed', error_message = reason, completed_at = ended, given_up = TRUE, updated_at = now()
    WHERE b.id = batch.id;
    PERFORM keep_summary(batch, made.ui_json, made.nested_summary, made.file_count, made.success_count, made.error_count);
    RETURN 'failed';
END;
$$;
COMMENT ON FUNCTION fail_batch IS
    'Fails the current run of a batch for good, with a reason. Its documents go on (cancel_batch stops them); what becomes of them only changes the summary.';

CREATE FUNCTION batch_statistics(batch_id text) RETURNS TABLE (
    batch_id text, run_id uuid, status text, files bigint, queued bigint, working bigint, retrying bigint, complete bigint, failed bigint,
    duplicate bigint, cancelled bigint, archives_open bigint, archives_failed bigint, pages bigint, passages bigint, bytes bigint,
    retries bigint, crashes bigint, first_started_at timestamptz, last_progress_at timestamptz, mean_duration_ms double precision,
    max_duration_ms bigint, by_file_type jsonb, by_error_type jsonb
) LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT b.batch_id, b.run_id, b.status, (t.totals ->> 'files')::bigint, d.queued, d.working, d.retrying, d.complete, d.failed, d.duplicate,
        d.cancelled, a.open, a.failed, (t.totals ->> 'pages')::bigint, (t.totals ->> 'passages')::bigint, (t.totals ->> 'bytes')::bigint,
        d.retries, d.crashes, d.first_started_at, greatest(d.latest, a.latest), d.mean_duration_ms, d.max_duration_ms,
        t.totals -> 'by_file_type', t.totals -> 'by_error_type'
    FROM processing_jobs AS b
    CROSS JOIN LATERAL (SELECT summary_totals(b) AS totals) AS t
    CROSS JOIN LATERAL (
        SELECT count(*) FILTER (WHERE f.state = 'queued') AS queued, count(*) FILTER (WHERE f.state = 'working') AS working,
            count(*) FILTER (WHERE f.state = 'retrying') AS retrying, count(*) FILTER (WHERE f.state = 'complete') AS complete,
            count(*) FILTER (WHERE f.state = 'failed') AS failed, count(*) FILTER (WHERE f.state = 'duplicate') AS duplicate,
            count(*) FILTER (WHERE f.state = 'cancelled') AS cancelled, coalesce(sum(f.retry_count), 0) AS retries,
            coalesce(sum(f.crash_count), 0) AS crashes, min(f.processing_started_at) AS first_started_at, max(f.updated_at) AS latest,
            avg(f.processing_duration_ms)::double precision AS mean_duration_ms, max(f.processing_duration_ms) AS max_duration_ms
        FROM file_extractions AS f
        WHERE f.batch_id = b.batch_id AND f.run_id = b.run_id
    ) AS d
    CROSS JOIN LATERAL (
        SELECT count(*) FILTER (WHERE r.state IN ('waiting', 'unpacking')) AS open, count(*) FILTER (WHERE r.state = 'failed') AS failed,
            max(r.updated_at) AS latest
        FROM batch_archives AS r
        WHERE r.run_id = b.run_id
    ) AS a
    WHERE b.batch_id = batch_statistics.batch_id;
END;
COMMENT ON FUNCTION batch_statistics IS 'The current run of a batch in figures: its documents by state, its archives, pages, passages, retries, times. bytes: of the uploads.';

CREATE FUNCTION without_deleted(part jsonb) RETURNS jsonb LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT part || jsonb_build_object(
        'files', coalesce(jsonb_agg(f.file ORDER BY f.place) FILTER (WHERE f.stays), '[]'),
        'files_omitted', (part ->> 'files_omitted')::integer + count(*) FILTER (WHERE NOT f.stays)
    )
    FROM (
        SELECT e.file, e.place, e.file ->> 'doc_id' IS NULL OR d.id IS NOT NULL AS stays
        FROM jsonb_array_elements(part -> 'files') WITH ORDINALITY AS e (file, place)
        LEFT JOIN file_extractions AS d ON d.doc_id = e.file ->> 'doc_id'
    ) AS f;
END;
COMMENT ON FUNCTION without_deleted IS 'A part of a summary that has files and files_omitted, without the files whose document is gone.';

CREATE FUNCTION forget_deleted_documents(batch_id text) RETURNS integer LANGUAGE plpgsql AS $$
-- A summary holds names, errors and what was extracted: what is deleted must go from there too. The totals stay as they were.
DECLARE
    changed integer;
BEGIN
    UPDATE run_summaries AS r
    SET ui_json = without_deleted(r.ui_json), updated_at = now(),
        nested_summary = r.nested_summary || jsonb_build_object('folders', (
            SELECT coalesce(jsonb_agg(without_deleted(f.folder) ORDER BY f.place), '[]')
            FROM jsonb_array_elements(r.nested_summary -> 'folders') WITH ORDINALITY AS f (folder, place)
        ))
    WHERE r.batch_id = forget_deleted_documents.batch_id AND EXISTS (
        SELECT FROM jsonb_array_elements(r.ui_json -> 'files') AS e
        WHERE NOT EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = e ->> 'doc_id') AND e ->> 'doc_id' IS NOT NULL
    );
    GET DIAGNOSTICS changed = ROW_COUNT;
    RETURN changed;
END;
$$;
COMMENT ON FUNCTION forget_deleted_documents IS
    'Takes the cards of deleted documents out of the summaries of all runs of a batch and returns how many changed. Call it after deletions, as a transaction of its own.';

CREATE TABLE summaries_to_renew (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    batch_id text NOT NULL,
    is_its_own boolean NOT NULL DEFAULT TRUE
);
COMMENT ON TABLE summaries_to_renew IS 'A row for each deleted document and batch that it is or was in, until the batch''s summaries say no more about it.';
COMMENT ON COLUMN summaries_to_renew.is_its_own IS 'Whether the document was in the batch when it was deleted; else another batch had taken it over.';
COMMENT ON COLUMN summaries_to_renew.id IS 'Surrogate key.';
COMMENT ON COLUMN summaries_to_renew.batch_id IS 'The batch.';
CREATE INDEX run_summaries_batch ON run_summaries (batch_id);
CREATE INDEX summaries_to_renew_batch ON summaries_to_renew (batch_id);

CREATE FUNCTION note_deleted_document() RETURNS trigger LANGUAGE plpgsql AS $$
-- Not done at once: this transaction holds a document, so it may not wait for its batch.
BEGIN
    INSERT INTO summaries_to_renew (batch_id, is_its_own)
    SELECT m.batch_id, bool_or(m.is_its_own)
    FROM (
        SELECT o.batch_id, TRUE AS is_its_own FROM old_documents AS o WHERE o.batch_id IS NOT NULL
        UNION ALL
        SELECT e.batch_id, FALSE
        FROM old_documents AS o
        JOIN document_events AS e ON e.doc_id = o.doc_id
        WHERE EXISTS (SELECT FROM run_summaries AS r WHERE r.batch_id = e.batch_id)
    ) AS m
    GROUP BY m.batch_id;
    RETURN NULL;
END;
$$;
COMMENT ON FUNCTION note_deleted_document IS 'Notes the batches whose summaries may speak of a document that has been deleted.';
CREATE TRIGGER file_extractions_deleted AFTER DELETE ON file_extractions
    REFERENCING OLD TABLE AS old_documents FOR EACH STATEMENT EXECUTE FUNCTION note_deleted_document();

CREATE FUNCTION renew_summaries(batch_id text) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    is_due boolean;
BEGIN
    PERFORM FROM processing_jobs AS b WHERE b.batch_id = renew_summaries.batch_id FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND AND EXISTS (SELECT FROM processing_jobs AS b WHERE b.batch_id = renew_summaries.batch_id) THEN
        RETURN NULL;
    END IF;
    -- The notes first: what is deleted from here on makes a note of its own.
    WITH noted AS (
        DELETE FROM summaries_to_renew AS n WHERE n.batch_id = renew_summaries.batch_id RETURNING n.is_its_own
    )
    SELECT bool_or(n.is_its_own) INTO is_due FROM noted AS n;
    IF NOT EXISTS (SELECT FROM processing_jobs AS b WHERE b.batch_id = renew_summaries.batch_id) THEN
        RETURN NULL;
    END IF;
    IF is_due THEN
        PERFORM settle_batch(renew_summaries.batch_id);
    END IF;
    PERFORM forget_deleted_documents(renew_summaries.batch_id);
    RETURN 'renewed';
END;
$$;
COMMENT ON FUNCTION renew_summaries IS 'Brings the summaries of a batch up to date after documents of it have been deleted; null while somebody holds the batch.';

CALL pin_search_path();
