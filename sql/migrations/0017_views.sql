-- What people look at: where everything stands, what is stuck and why, how quickly it goes, and whether workers, services and indexes are well.
--
-- Each view answers within 2 s with a million documents and ten million events (bench/inspection.py). Hence three habits. What happened when
-- is asked of a window of time, found by the primary key of document_events, which no write pays for. Passages are estimated where counting
-- them would read the table. And where only documents one by one tell (stuck_documents), those that have waited longest are looked at.
-- Views see what whoever asks may see (security_invoker); SELECT on the tables is all a role needs.

ALTER TABLE worker_registry
ADD COLUMN connections integer,
ADD COLUMN cpu_share double precision;
COMMENT ON COLUMN worker_registry.connections IS 'Connections of the process to the database; null if the worker does not say.';
COMMENT ON COLUMN worker_registry.cpu_share IS 'Cores in use between the last two heartbeats, children not included: 1 is one core; null before the second.';

-- Windows of time.

CREATE FUNCTION event_id_since(since timestamptz) RETURNS bigint LANGUAGE plpgsql STABLE SECURITY DEFINER AS $$
-- Ids and times go up together, but for moments. Halving takes one look into the primary key a step, whatever lies between. It tells
-- nothing but a number, so it sees all events also for those who may see few.
DECLARE
    low bigint;
    high bigint;
    middle bigint;
    found record;
BEGIN
    SELECT min(e.id), max(e.id) + 1 INTO low, high FROM document_events AS e;
    WHILE low < high LOOP
        middle := low + (high - low) / 2;
        SELECT e.id, e.at INTO found FROM document_events AS e WHERE e.id >= middle ORDER BY e.id LIMIT 1;
        IF found.at < since THEN
            low := found.id + 1;
        ELSE
            high := middle;
        END IF;
    END LOOP;
    RETURN coalesce(low, 0);
END;
$$;
COMMENT ON FUNCTION event_id_since IS
    'The id from which on document_events lie after a time; ask a minute earlier and filter by time, because concurrent writers and clocks put some out of order.';

CREATE FUNCTION throughput_over(span interval DEFAULT '1 hour', bucket interval DEFAULT '1 minute') RETURNS TABLE (
    bucket_at timestamptz, submitted bigint, complete bigint, duplicate bigint, failed bigint, cancelled bigint, retries bigint, rescues bigint,
    per_second double precision
) LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH told AS (
        SELECT date_bin(bucket, e.at, 'epoch') AS bucket_at, e.event, count(*) AS times
        FROM document_events AS e
        WHERE e.id >= event_id_since(date_bin(bucket, now() - span, 'epoch') - interval '1 minute') AND e.at >= date_bin(bucket, now() - span, 'epoch')
            AND e.event IN ('submitted', 'resubmitted', 'completed', 'duplicate', 'failed', 'cancelled', 'retry_scheduled', 'rescued')
        GROUP BY 1, 2
    )
    SELECT b.bucket_at,
        coalesce(sum(t.times) FILTER (WHERE t.event IN ('submitted', 'resubmitted')), 0)::bigint,
        coalesce(sum(t.times) FILTER (WHERE t.event = 'completed'), 0)::bigint,
        coalesce(sum(t.times) FILTER (WHERE t.event = 'duplicate'), 0)::bigint,
        coalesce(sum(t.times) FILTER (WHERE t.event = 'failed'), 0)::bigint,
        coalesce(sum(t.times) FILTER (WHERE t.event = 'cancelled'), 0)::bigint,
        coalesce(sum(t.times) FILTER (WHERE t.event = 'retry_scheduled'), 0)::bigint,
        coalesce(sum(t.times) FILTER (WHERE t.event = 'rescued'), 0)::bigint,
        (coalesce(sum(t.times) FILTER (WHERE t.event IN ('completed', 'duplicate', 'failed', 'cancelled')), 0)
            / greatest(1, extract(epoch FROM least(b.bucket_at + bucket, now()) - b.bucket_at)))::double precision
    FROM generate_series(date_bin(bucket, now() - span, 'epoch'), now(), bucket) AS b (bucket_at)
    LEFT JOIN told AS t ON t.bucket_at = b.bucket_at
    GROUP BY b.bucket_at
    ORDER BY b.bucket_at;
END;
COMMENT ON FUNCTION throughput_over IS
    'What happened to documents in each slice of the last `span`, the first one whole, empty ones too: counts of events; per_second is documents that ended. The last slice is not over yet.';

CREATE FUNCTION stage_latency_over(span interval DEFAULT '1 hour', bucket interval DEFAULT '1 hour') RETURNS TABLE (
    bucket_at timestamptz, stage text, runs bigint, failures bigint, p50_ms double precision, p95_ms double precision, max_ms double precision,
    mean_cpu_ms double precision, max_memory_mb double precision
) LANGUAGE sql STABLE
SET enable_sort = off
SET work_mem = '32MB'
SET jit = off
BEGIN ATOMIC
    -- The planner takes the groups for as many as the runs, and would sort these: hence the settings.
    -- Sorting all runs to find the middle one would take as long again as reading them. Runs that took about the same, within 4 %, are counted
    -- together, and the mean of those in the middle stands for it.
    WITH alike AS MATERIALIZED (
        SELECT date_bin(bucket, e.at, 'epoch') AS bucket_at, e.stage, round(ln(greatest(e.duration_ms, 0.001)) * 25) AS size,
            count(*) AS tries, count(e.duration_ms) AS runs, sum(e.duration_ms) AS ms, max(e.duration_ms) AS max_ms,
            sum(e.cpu_ms) AS cpu_ms, max(e.peak_memory_mb) AS memory_mb
        FROM document_events AS e
        WHERE e.id >= event_id_since(date_bin(bucket, now() - span, 'epoch') - interval '1 minute') AND e.at >= date_bin(bucket, now() - span, 'epoch')
            AND e.stage IS NOT NULL AND e.event IN ('stage_completed', 'completed', 'retry_scheduled', 'failed')
        GROUP BY 1, 2, 3
    ), ranked AS (
        SELECT a.bucket_at, a.stage, a.tries, a.runs, a.ms / nullif(a.runs, 0) AS mean_ms, a.max_ms, a.cpu_ms, a.memory_mb,
            sum(a.runs) OVER sizes AS up_to, sum(a.runs) OVER (PARTITION BY a.bucket_at, a.stage) AS of_all
        FROM alike AS a
        WINDOW sizes AS (PARTITION BY a.bucket_at, a.stage ORDER BY a.size NULLS FIRST)
    )
    -- A failure has no duration.
    SELECT r.bucket_at, r.stage, sum(r.runs)::bigint, sum(r.tries - r.runs)::bigint,
        min(r.mean_ms) FILTER (WHERE r.up_to >= 0.5 * r.of_all), min(r.mean_ms) FILTER (WHERE r.up_to >= 0.95 * r.of_all),
        max(r.max_ms), sum(r.cpu_ms) / nullif(sum(r.runs)::double precision, 0), max(r.memory_mb)
    FROM ranked AS r
    GROUP BY r.bucket_at, r.stage
    ORDER BY r.bucket_at, array_position(ARRAY['validate', 'parse', 'check', 'chunk', 'embed', 'extract', 'finalize'], r.stage);
END;
COMMENT ON FUNCTION stage_latency_over IS
    'How long each stage took in each slice of the last `span`, in milliseconds, waiting not included; slices without runs are left out. Percentiles are good to 2 %.';

CREATE VIEW throughput WITH (security_invoker = true) AS
SELECT t.bucket_at AS hour, t.submitted, t.complete, t.duplicate, t.failed, t.cancelled, t.retries, t.rescues, t.per_second
FROM throughput_over('24 hours', '1 hour') AS t;
COMMENT ON VIEW throughput IS 'What happened to documents in each hour of the last day. throughput_over(span, bucket) does so for any other time.';
COMMENT ON COLUMN throughput.hour IS 'When the hour began; the last one is not over yet.';
COMMENT ON COLUMN throughput.submitted IS 'Documents submitted, new versions included.';
COMMENT ON COLUMN throughput.complete IS 'Documents that became complete.';
COMMENT ON COLUMN throughput.duplicate IS 'Documents that ended as duplicates.';
COMMENT ON COLUMN throughput.failed IS 'Documents that failed for good.';
COMMENT ON COLUMN throughput.cancelled IS 'Documents that were cancelled.';
COMMENT ON COLUMN throughput.retries IS 'Failures after which a stage was put off to be tried again.';
COMMENT ON COLUMN throughput.rescues IS 'Documents taken from a worker that had died or hung.';
COMMENT ON COLUMN throughput.per_second IS 'Documents that ended, a second.';

CREATE VIEW stage_latency WITH (security_invoker = true) AS
SELECT l.bucket_at AS hour, l.stage, l.runs, l.failures, l.p50_ms, l.p95_ms, l.max_ms, l.mean_cpu_ms, l.max_memory_mb
FROM stage_latency_over('24 hours', '1 hour') AS l;
COMMENT ON VIEW stage_latency IS 'How long each stage took in each hour of the last day. stage_latency_over(span, bucket) does so for any other time.';
COMMENT ON COLUMN stage_latency.hour IS 'When the hour began; the last one is not over yet.';
COMMENT ON COLUMN stage_latency.stage IS 'validate, parse, check, chunk, embed, extract or finalize.';
COMMENT ON COLUMN stage_latency.runs IS 'Times that it came to a good end.';
COMMENT ON COLUMN stage_latency.failures IS 'Times that it failed, to be tried again or for good.';
COMMENT ON COLUMN stage_latency.p50_ms IS 'Half of the runs took at most this long, in milliseconds, give or take 2 %.';
COMMENT ON COLUMN stage_latency.p95_ms IS '95 of 100 runs took at most this long, in milliseconds, give or take 2 %.';
COMMENT ON COLUMN stage_latency.max_ms IS 'The longest run, in milliseconds.';
COMMENT ON COLUMN stage_latency.mean_cpu_ms IS 'Mean CPU time of a run in milliseconds, child processes included.';
COMMENT ON COLUMN stage_latency.max_memory_mb IS 'Most resident memory of a child process, in MB; null where there was none.';

-- Documents and batches.

CREATE OR REPLACE VIEW document_status WITH (security_invoker = true) AS
SELECT
    d.doc_id, d.user_id, d.batch_id, d.run_id, d.file_name, d.file_type, d.file_size, d.version, d.served_version,
    CASE
        WHEN d.state IN ('complete', 'failed', 'duplicate', 'cancelled', 'retrying') THEN d.state::text
        WHEN d.milestone = 'upload_validated' THEN CASE d.state WHEN 'queued' THEN 'parse_queued' ELSE 'parsing' END
        WHEN d.milestone = 'chunks_stored' THEN CASE d.state WHEN 'queued' THEN 'embedding_queued' ELSE 'embedding_in_progress' END
        ELSE d.milestone::text
    END AS status,
    d.milestone, d.state, due_stage(d.milestone) AS stage_due, d.page_count, d.chunk_count, d.retry_count, d.crash_count,
    d.error_type, d.error_message, d.correlation_id, d.claimed_by, d.lease_until, d.created_at, d.updated_at,
    d.processing_started_at, d.processing_completed_at, d.processing_duration_ms,
    stage_queue(due_stage(d.milestone)) AS queue_due, d.not_before AS next_try_at, d.duplicate_of, d.priority
FROM file_extractions AS d;
COMMENT ON COLUMN document_status.doc_id IS 'The document.';
COMMENT ON COLUMN document_status.user_id IS 'Whose it is.';
COMMENT ON COLUMN document_status.batch_id IS 'The batch it was last submitted with, if any.';
COMMENT ON COLUMN document_status.run_id IS 'The run of that batch.';
COMMENT ON COLUMN document_status.file_name IS 'The name that the submitter gave.';
COMMENT ON COLUMN document_status.file_type IS 'pdf, word, excel, powerpoint, html, email, ebook, text, zip or unknown; null until validate.';
COMMENT ON COLUMN document_status.file_size IS 'Size of the stored upload in bytes.';
COMMENT ON COLUMN document_status.version IS 'Number of the present content, from 1.';
COMMENT ON COLUMN document_status.served_version IS 'The version that searches see; null until one is complete.';
COMMENT ON COLUMN document_status.milestone IS 'The last stage that the present version has completed.';
COMMENT ON COLUMN document_status.state IS 'queued, working, retrying, complete, failed, duplicate or cancelled.';
COMMENT ON COLUMN document_status.page_count IS 'Pages, slides or sheets; null where the format has none.';
COMMENT ON COLUMN document_status.chunk_count IS 'Passages; null until chunk.';
COMMENT ON COLUMN document_status.retry_count IS 'Failures that counted since the last milestone.';
COMMENT ON COLUMN document_status.crash_count IS 'Times a worker died or hung with this document at this milestone.';
COMMENT ON COLUMN document_status.error_type IS 'Kind of the last failure; null once a later try succeeded.';
COMMENT ON COLUMN document_status.error_message IS 'The last failure in plain words.';
COMMENT ON COLUMN document_status.correlation_id IS 'Follows the document through logs and events.';
COMMENT ON COLUMN document_status.claimed_by IS 'host:pid of the worker that works on it or last did.';
COMMENT ON COLUMN document_status.lease_until IS 'While working: until when the worker''s claim is good without renewal.';
COMMENT ON COLUMN document_status.created_at IS 'When it was first submitted.';
COMMENT ON COLUMN document_status.updated_at IS 'When it last changed.';
COMMENT ON COLUMN document_status.processing_started_at IS 'When a worker first took up the present version.';
COMMENT ON COLUMN document_status.processing_completed_at IS 'When the present version ended.';
COMMENT ON COLUMN document_status.processing_duration_ms IS 'Milliseconds from first claim to end, waiting between stages included.';
COMMENT ON COLUMN document_status.queue_due IS 'The queue of the stage that is due; null once complete.';
COMMENT ON COLUMN document_status.next_try_at IS 'While retrying: no worker takes it up before this time.';
COMMENT ON COLUMN document_status.duplicate_of IS 'doc_id of the document with the same content that was complete first.';
COMMENT ON COLUMN document_status.priority IS 'Higher is worked on first.';

CREATE VIEW batch_progress WITH (security_invoker = true) AS
SELECT
    b.batch_id, b.user_id, b.source_path, b.status, b.total_files, d.queued, d.working, d.retrying, d.complete, d.duplicate, d.failed, d.cancelled,
    z.archives_open,
    d.ended, d.unfinished,
    CASE WHEN b.status IN ('completed', 'completed_with_errors') AND d.unfinished = 0 THEN 100 ELSE
        round(100.0 * d.ended / nullif(t.files, 0), 1)
    END AS percent,
    CASE WHEN d.ended < t.files AND d.recent > 0 AND t.goes_on THEN t.rate END AS per_second,
    CASE WHEN d.ended < t.files AND d.recent > 0 AND t.goes_on THEN (t.files - d.ended) / t.rate END AS seconds_left,
    greatest(d.last_progress_at, z.last_progress_at) AS last_progress_at,
    b.run_started_at AS started_at, b.sealed_at, b.completed_at, b.error_message, b.run_id
FROM processing_jobs AS b
CROSS JOIN LATERAL (
    SELECT
        count(*) FILTER (WHERE f.state = 'queued') AS queued, count(*) FILTER (WHERE f.state = 'working') AS working,
        count(*) FILTER (WHERE f.state = 'retrying') AS retrying, count(*) FILTER (WHERE f.state = 'complete') AS complete,
        count(*) FILTER (WHERE f.state = 'duplicate') AS duplicate, count(*) FILTER (WHERE f.state = 'failed') AS failed,
        count(*) FILTER (WHERE f.state = 'cancelled') AS cancelled,
        count(*) FILTER (WHERE f.state IN ('complete', 'duplicate', 'failed', 'cancelled')) AS ended,
        count(*) FILTER (WHERE f.state IN ('queued', 'working', 'retrying')) AS unfinished,
        count(*) FILTER (WHERE f.processing_completed_at > greatest(now() - interval '5 minutes', b.run_started_at)) AS recent,
        max(f.updated_at) AS last_progress_at
    FROM file_extractions AS f
    WHERE f.batch_id = b.batch_id AND f.run_id = b.run_id
) AS d
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE a.state IN ('waiting', 'unpacking')) AS archives_open, max(a.updated_at) AS last_progress_at
    FROM batch_archives AS a
    WHERE a.batch_id = b.batch_id AND a.run_id = b.run_id
) AS z
CROSS JOIN LATERAL (
    SELECT greatest(b.total_files, d.ended + d.unfinished) AS files, b.completed_at IS NULL OR d.unfinished > 0 AS goes_on,
        d.recent / greatest(1, least(300, extract(epoch FROM now() - b.run_started_at)))::double precision AS rate
) AS t;
COMMENT ON VIEW batch_progress IS
    'Every batch: the documents of its current run by state, how quickly they end and how long that will take. Ask for few: each batch''s documents are counted.';
COMMENT ON COLUMN batch_progress.batch_id IS 'The batch.';
COMMENT ON COLUMN batch_progress.user_id IS 'Whose it is.';
COMMENT ON COLUMN batch_progress.source_path IS 'The folder or zip as the submitter named it.';
COMMENT ON COLUMN batch_progress.status IS 'pending (still being submitted), processing, completed, completed_with_errors, failed or cancelled.';
COMMENT ON COLUMN batch_progress.total_files IS 'Files of the current run; those in archives count from when these are opened.';
COMMENT ON COLUMN batch_progress.queued IS 'Documents that wait for a worker.';
COMMENT ON COLUMN batch_progress.working IS 'Documents in a worker''s hands.';
COMMENT ON COLUMN batch_progress.retrying IS 'Documents that failed and wait to be tried again.';
COMMENT ON COLUMN batch_progress.complete IS 'Documents that are complete.';
COMMENT ON COLUMN batch_progress.duplicate IS 'Documents that ended as duplicates.';
COMMENT ON COLUMN batch_progress.failed IS 'Documents that failed for good.';
COMMENT ON COLUMN batch_progress.cancelled IS 'Documents that were cancelled.';
COMMENT ON COLUMN batch_progress.archives_open IS 'Zip archives that are not unpacked to the end yet; the batch cannot end before.';
COMMENT ON COLUMN batch_progress.ended IS 'Documents that have ended, however.';
COMMENT ON COLUMN batch_progress.unfinished IS 'Documents that have not.';
COMMENT ON COLUMN batch_progress.percent IS 'Part of the files that has ended, 0 to 100; null while there is none.';
COMMENT ON COLUMN batch_progress.per_second IS 'Documents that ended a second in the last 5 minutes; null if none did, or nothing is left.';
COMMENT ON COLUMN batch_progress.seconds_left IS 'Until all have ended, at that rate; null where there is no rate.';
COMMENT ON COLUMN batch_progress.last_progress_at IS 'When one of its documents or archives last changed.';
COMMENT ON COLUMN batch_progress.started_at IS 'When the current run began.';
COMMENT ON COLUMN batch_progress.sealed_at IS 'When every file had been submitted; the batch cannot end before.';
COMMENT ON COLUMN batch_progress.completed_at IS 'When the current run ended; null while it goes on.';
COMMENT ON COLUMN batch_progress.error_message IS 'Why it failed, in plain words.';
COMMENT ON COLUMN batch_progress.run_id IS 'The current run.';

CREATE OR REPLACE VIEW dead_letter_queue WITH (security_invoker = true) AS
SELECT
    l.id, l.doc_id, d.file_name, d.batch_id, l.user_id, l.version, l.stage, l.error_type, l.error_message, l.created_at,
    date_trunc('second', now() - l.created_at) AS age,
    CASE WHEN d.state = 'failed' AND d.version = l.version THEN
        format('SELECT requeue_dead_letter(%s);', l.id) || coalesce(' SELECT reopen_batch(' || quote_literal(d.batch_id) || ');', '')
    END AS how_to_requeue,
    can_pass(l.error_type) AS may_pass,
    CASE
        WHEN d.doc_id IS NULL THEN format('its document is gone: SELECT discard_dead_letter(%s);', l.id)
        WHEN l.context ? 'lone_crash_count' THEN 'its worker dies of it: look at the file, raise PARSE_MEMORY_MB or discard it'
        WHEN l.error_type = 'PARSE_ERROR' THEN 'the file cannot be read: submit a mended one, or discard it'
        WHEN l.error_type = 'PERMANENT' THEN 'trying again fails again unless the file or a setting changes: read the message, mend it, requeue or discard'
        WHEN l.error_type = 'RATE_LIMIT' THEN 'the service let nothing through for too long: look at provider_health, then requeue'
        WHEN l.error_type IN ('RETRYABLE', 'TIMEOUT', 'LLM_ERROR') THEN 'the cause can pass: see that it has, then requeue'
        ELSE 'nobody foresaw this: read the traceback (docmill dead show), then requeue or discard'
    END AS what_to_do,
    l.correlation_id
FROM dead_letters AS l
LEFT JOIN file_extractions AS d ON d.doc_id = l.doc_id
WHERE l.resolved_at IS NULL
ORDER BY l.id DESC;
COMMENT ON COLUMN dead_letter_queue.doc_id IS 'The document.';
COMMENT ON COLUMN dead_letter_queue.file_name IS 'The name that the submitter gave; null if the document is gone.';
COMMENT ON COLUMN dead_letter_queue.user_id IS 'Whose document it is.';
COMMENT ON COLUMN dead_letter_queue.version IS 'The version that failed.';
COMMENT ON COLUMN dead_letter_queue.stage IS 'The stage that failed.';
COMMENT ON COLUMN dead_letter_queue.error_type IS 'Kind of failure.';
COMMENT ON COLUMN dead_letter_queue.error_message IS 'The failure in plain words.';
COMMENT ON COLUMN dead_letter_queue.created_at IS 'When it failed.';
COMMENT ON COLUMN dead_letter_queue.may_pass IS 'Whether the same document can succeed later after a failure of this kind.';
COMMENT ON COLUMN dead_letter_queue.what_to_do IS 'What an operator can do about it, in plain words.';
COMMENT ON COLUMN dead_letter_queue.correlation_id IS 'Follows the document through logs and events.';

CREATE VIEW duplicate_documents WITH (security_invoker = true) AS
SELECT
    s.user_id, s.content_sha256, s.documents, f.original, f.original_name, f.doc_ids, f.skipped, f.extra_bytes
FROM (
    SELECT d.user_id, d.content_sha256, count(*) AS documents
    FROM file_extractions AS d
    WHERE d.content_sha256 IS NOT NULL
    GROUP BY d.user_id, d.content_sha256
    HAVING count(*) > 1
) AS s
CROSS JOIN LATERAL (
    SELECT (array_agg(e.doc_id ORDER BY e.place))[1] AS original, (array_agg(e.file_name ORDER BY e.place))[1] AS original_name,
        (array_agg(e.doc_id ORDER BY e.place))[2:21] AS doc_ids, count(*) FILTER (WHERE e.state = 'duplicate') AS skipped,
        sum(e.file_size) FILTER (WHERE e.place > 1) AS extra_bytes
    FROM (
        SELECT d.doc_id, d.file_name, d.state, d.file_size,
            row_number() OVER (ORDER BY d.state <> 'complete', d.processing_completed_at, d.id) AS place
        FROM file_extractions AS d
        WHERE d.user_id = s.user_id AND d.content_sha256 = s.content_sha256
    ) AS e
) AS f;
COMMENT ON VIEW duplicate_documents IS 'Content that the same user has under several doc_ids, one row for each.';
COMMENT ON COLUMN duplicate_documents.user_id IS 'Whose documents they are.';
COMMENT ON COLUMN duplicate_documents.content_sha256 IS 'SHA-256 of the content, lowercase hex.';
COMMENT ON COLUMN duplicate_documents.documents IS 'How many documents have it.';
COMMENT ON COLUMN duplicate_documents.original IS 'doc_id of the one that was complete first, or else is the oldest.';
COMMENT ON COLUMN duplicate_documents.original_name IS 'Its file name.';
COMMENT ON COLUMN duplicate_documents.doc_ids IS 'doc_id of the others, 20 at most.';
COMMENT ON COLUMN duplicate_documents.skipped IS 'How many ended as duplicates without rows of their own (DUPLICATE_POLICY=skip).';
COMMENT ON COLUMN duplicate_documents.extra_bytes IS 'Stored size of the others, in bytes.';

COMMENT ON VIEW cost_by_document IS
    'What each document''s calls to outside services have cost, by kind of service. Of a shared call each document has its share. Reads the whole ledger, some seconds with a million calls: for one document or batch ask cost_of_document(doc_id) or cost_of_batch(batch_id).';

-- Queues, workers, services, vectors and indexes.

CREATE VIEW worker_health WITH (security_invoker = true) AS
SELECT
    w.worker, w.host, w.pid,
    CASE
        WHEN w.heartbeat_at < now() - interval '2 minutes' THEN 'dead'
        WHEN w.heartbeat_at < now() - interval '30 seconds' THEN 'silent'
        WHEN w.stopping THEN 'stopping'
        ELSE 'alive'
    END AS health,
    w.queues, w.concurrency, cardinality(w.active_jobs) AS jobs, w.documents, w.memory_mb, w.cpu_share, w.cpu_seconds, w.connections,
    w.started_at, w.heartbeat_at, date_trunc('second', now() - w.heartbeat_at) AS silent_for, w.version
FROM worker_registry AS w;
COMMENT ON VIEW worker_health IS
    'Workers that live, and those that ended without signing off in the last 7 days. A worker beats every 5 s at least.';
COMMENT ON COLUMN worker_health.worker IS 'host:pid.';
COMMENT ON COLUMN worker_health.host IS 'Host name.';
COMMENT ON COLUMN worker_health.pid IS 'Process id on that host.';
COMMENT ON COLUMN worker_health.health IS
    'alive; stopping: finishes what it holds; silent: not heard of for 30 s; dead: not for 2 minutes. What the last two held is taken over by others.';
COMMENT ON COLUMN worker_health.queues IS 'The queues that it listens to; null for all.';
COMMENT ON COLUMN worker_health.concurrency IS 'How many jobs it runs at a time.';
COMMENT ON COLUMN worker_health.jobs IS 'Jobs in hand.';
COMMENT ON COLUMN worker_health.documents IS 'doc_id of the documents in hand.';
COMMENT ON COLUMN worker_health.memory_mb IS 'Resident memory in MB, children not included.';
COMMENT ON COLUMN worker_health.cpu_share IS 'Cores in use between the last two heartbeats, children not included.';
COMMENT ON COLUMN worker_health.cpu_seconds IS 'CPU time since its start, children not included.';
COMMENT ON COLUMN worker_health.connections IS 'Its connections to the database; null if it does not say.';
COMMENT ON COLUMN worker_health.started_at IS 'When it started.';
COMMENT ON COLUMN worker_health.heartbeat_at IS 'When it was last heard of.';
COMMENT ON COLUMN worker_health.silent_for IS 'How long ago that was.';
COMMENT ON COLUMN worker_health.version IS 'Version of docmill.';

CREATE VIEW queue_depth WITH (security_invoker = true) AS
WITH known (place, queue, stage) AS (
    VALUES (1, 'cpu', 'validate'), (2, 'cpu', 'parse'), (3, 'cpu', 'check'), (4, 'cpu', 'chunk'), (5, 'embed', 'embed'),
        (6, 'extract', 'extract'), (7, 'cpu', 'finalize')
), jobs AS (
    SELECT j.queue_name AS queue, j.task_name AS stage,
        count(*) FILTER (WHERE j.status = 'todo' AND coalesce(j.scheduled_at <= now(), TRUE)) AS waiting,
        count(*) FILTER (WHERE j.status = 'todo' AND j.scheduled_at > now()) AS scheduled,
        count(*) FILTER (WHERE j.status = 'doing') AS running,
        min(j.id) FILTER (WHERE j.status = 'todo' AND coalesce(j.scheduled_at <= now(), TRUE)) AS oldest,
        min(j.scheduled_at) FILTER (WHERE j.status = 'todo' AND j.scheduled_at > now()) AS next_at
    FROM procrastinate_jobs AS j
    WHERE j.status IN ('todo', 'doing')
    GROUP BY j.queue_name, j.task_name
)
SELECT
    queue, stage, coalesce(j.waiting, 0) AS waiting, coalesce(j.scheduled, 0) AS scheduled, coalesce(j.running, 0) AS running,
    o.since AS oldest_since, date_trunc('second', greatest(now() - o.since, '0')) AS oldest_age, j.next_at AS next_scheduled_at,
    (
        SELECT count(*) FROM worker_health AS w WHERE w.health = 'alive' AND (w.queues IS NULL OR queue = ANY(w.queues))
    ) AS listeners
FROM known AS k
FULL JOIN jobs AS j USING (queue, stage)
LEFT JOIN LATERAL (
    SELECT max(e.at) AS since
    FROM procrastinate_events AS e
    WHERE e.job_id = j.oldest AND e.type IN ('deferred', 'scheduled', 'deferred_for_retry', 'retried') AND e.at <= now()
) AS o ON TRUE
ORDER BY k.place NULLS LAST, queue, stage;
COMMENT ON VIEW queue_depth IS
    'How many jobs wait, are scheduled for later and run, by queue and stage. A stage that is carried on in the same worker shows as the stage it was fetched for.';
COMMENT ON COLUMN queue_depth.queue IS 'cpu, embed, extract, maintenance, or an application''s own.';
COMMENT ON COLUMN queue_depth.stage IS 'The stage, or the task of another kind: unpack, reembed and so on.';
COMMENT ON COLUMN queue_depth.waiting IS 'Jobs that could be run at once.';
COMMENT ON COLUMN queue_depth.scheduled IS 'Jobs that wait for a time to come: retries and put-off ones.';
COMMENT ON COLUMN queue_depth.running IS 'Jobs that a worker has fetched.';
COMMENT ON COLUMN queue_depth.oldest_since IS 'Since when the waiting job that was queued first has waited.';
COMMENT ON COLUMN queue_depth.oldest_age IS 'For how long that is; null when none waits.';
COMMENT ON COLUMN queue_depth.next_scheduled_at IS 'When the next scheduled job is due.';
COMMENT ON COLUMN queue_depth.listeners IS 'Workers alive that listen to the queue: 0 with jobs waiting means that nothing will happen.';

CREATE VIEW provider_health WITH (security_invoker = true) AS
SELECT
    c.service,
    CASE
        WHEN c.state <> 'closed' AND c.try_at < now() - interval '1 hour' THEN 'idle'
        WHEN c.refused AND c.state <> 'closed' THEN 'refused'
        WHEN c.state = 'open' THEN 'down'
        WHEN c.state = 'half_open' OR c.passes_from > now() THEN 'recovering'
        WHEN b.paused_until IS NOT NULL THEN 'paused'
        WHEN u.failed_last_hour > 0 AND u.failed_last_hour >= u.calls_last_hour * 0.1 THEN 'shaky'
        ELSE 'up'
    END AS health,
    c.state AS breaker, c.reason, c.changed_at AS since, c.try_at AS next_try_at, c.waiting, c.opened_count,
    u.calls_last_hour, u.ok_last_hour, u.failed_last_hour, u.limited_last_hour, u.p50_ms, u.p95_ms, u.cost_last_hour,
    g.last_ok_at, f.last_failure_at, f.last_error,
    b.requests_per_minute, b.requests_last_minute, b.tokens_per_minute, b.tokens_last_minute, b.share, b.paused_until,
    CASE
        WHEN c.state <> 'closed' AND c.try_at < now() - interval '1 hour' THEN NULL
        WHEN c.refused AND c.state <> 'closed' THEN 'mend the key or the quota, then: SELECT reset_breaker(' || quote_literal(c.service) || ');'
        WHEN c.state = 'open' THEN 'it is tried again by itself; if you know that it is back: SELECT reset_breaker(' || quote_literal(c.service) || ');'
        WHEN b.paused_until IS NOT NULL THEN 'the service asked for a pause; if it does so often, lower its requests or tokens per minute'
    END AS what_to_do
FROM circuit_breakers AS c
LEFT JOIN provider_budget_use AS b ON b.service = c.service
CROSS JOIN LATERAL (
    SELECT count(*) AS calls_last_hour, count(*) FILTER (WHERE u.outcome IN ('ok', 'rejected')) AS ok_last_hour,
        count(*) FILTER (WHERE u.outcome IN ('failed', 'timeout', 'bad_answer', 'refused')) AS failed_last_hour,
        count(*) FILTER (WHERE u.outcome = 'rate_limited') AS limited_last_hour,
        percentile_cont(0.5) WITHIN GROUP (ORDER BY u.latency_ms) AS p50_ms,
        percentile_cont(0.95) WITHIN GROUP (ORDER BY u.latency_ms) AS p95_ms,
        coalesce(sum(coalesce(u.cost, u.estimated_cost)), 0) AS cost_last_hour
    FROM provider_usage AS u
    WHERE u.service = c.service AND u.started_at > now() - interval '1 hour'
) AS u
LEFT JOIN LATERAL (
    SELECT u.finished_at AS last_ok_at
    FROM provider_usage AS u
    WHERE u.service = c.service AND u.started_at > now() - interval '1 day' AND u.outcome IN ('ok', 'rejected')
    ORDER BY u.started_at DESC
    LIMIT 1
) AS g ON TRUE
LEFT JOIN LATERAL (
    SELECT l.finished_at AS last_failure_at, l.error_message AS last_error
    FROM (
        SELECT u.finished_at, u.error_message, u.outcome
        FROM provider_usage AS u
        WHERE u.service = c.service AND u.started_at > now() - interval '1 day'
        ORDER BY u.started_at DESC
        LIMIT 10000
    ) AS l
    WHERE l.outcome IN ('failed', 'timeout', 'bad_answer', 'refused', 'rate_limited')
    LIMIT 1
) AS f ON TRUE
ORDER BY c.state = 'closed', c.service;
COMMENT ON VIEW provider_health IS 'Each outside service that has been called: whether it is up, how it answered in the last hour, and what to do.';
COMMENT ON COLUMN provider_health.service IS 'Kind, address and a fingerprint of the key.';
COMMENT ON COLUMN provider_health.health IS
    'up; shaky: a tenth of the calls or more failed; paused: it asked for a pause; recovering: calls are let in one by one; down: not called for now; refused: it takes neither key nor quota; idle: it was down or refused, and nobody has called it for an hour.';
COMMENT ON COLUMN provider_health.breaker IS 'closed: calls pass. open: none does. half_open: one call probes.';
COMMENT ON COLUMN provider_health.reason IS 'Why the breaker is not closed, or was not the last time, in plain words.';
COMMENT ON COLUMN provider_health.since IS 'When the breaker last changed.';
COMMENT ON COLUMN provider_health.next_try_at IS 'When the next call tries whether it is back; null while closed.';
COMMENT ON COLUMN provider_health.waiting IS 'Calls that have been told to wait since then.';
COMMENT ON COLUMN provider_health.opened_count IS 'Times that the breaker has opened.';
COMMENT ON COLUMN provider_health.calls_last_hour IS 'Calls of the last hour.';
COMMENT ON COLUMN provider_health.ok_last_hour IS 'Those that were answered, rejected requests among them.';
COMMENT ON COLUMN provider_health.failed_last_hour IS 'Those that failed, timed out, were answered with nonsense, or refused for key or quota.';
COMMENT ON COLUMN provider_health.limited_last_hour IS 'Those that were answered with 429.';
COMMENT ON COLUMN provider_health.p50_ms IS 'Half of the answers took at most this long, in milliseconds.';
COMMENT ON COLUMN provider_health.p95_ms IS '95 of 100 answers took at most this long, in milliseconds.';
COMMENT ON COLUMN provider_health.cost_last_hour IS 'Price of the last hour''s calls; those without a known outcome count with their estimate.';
COMMENT ON COLUMN provider_health.last_ok_at IS 'When it last answered well, in the last day.';
COMMENT ON COLUMN provider_health.last_failure_at IS 'When it last did not, in the last day and among the last 10,000 calls.';
COMMENT ON COLUMN provider_health.last_error IS 'What it said then.';
COMMENT ON COLUMN provider_health.requests_per_minute IS 'Most requests in any 60 s; 0 for no limit, null before the first call.';
COMMENT ON COLUMN provider_health.requests_last_minute IS 'Requests of the last minute and those that have been given a time to come; not counted without a limit.';
COMMENT ON COLUMN provider_health.tokens_per_minute IS 'Most tokens in any 60 s; 0 for no limit.';
COMMENT ON COLUMN provider_health.tokens_last_minute IS 'Tokens of the same.';
COMMENT ON COLUMN provider_health.share IS 'Part of the limits that is used now: below 1 after the service has answered 429.';
COMMENT ON COLUMN provider_health.paused_until IS 'Nothing is sent before, because the service said so; null when it is not paused.';
COMMENT ON COLUMN provider_health.what_to_do IS 'What an operator can do, in plain words; null where nothing is needed.';

CREATE FUNCTION rows_about(relation regclass, exact_to integer DEFAULT 100000) RETURNS bigint LANGUAGE plpgsql STABLE AS $$
-- Postgres' own count is as old as the last vacuum or analyze; scaled by the table's size it is good to a few percent.
DECLARE
    counted bigint;
BEGIN
    EXECUTE format('SELECT count(*) FROM (SELECT FROM %s LIMIT %s) AS r', relation, exact_to + 1) INTO counted;
    IF counted <= exact_to THEN
        RETURN counted;
    END IF;
    RETURN greatest(counted, (
        SELECT c.reltuples / nullif(c.relpages, 0) * pg_relation_size(relation) / current_setting('block_size')::integer
        FROM pg_class AS c WHERE c.oid = relation AND c.reltuples > 0
    )::bigint);
END;
$$;
COMMENT ON FUNCTION rows_about IS 'Rows of a table: counted up to `exact_to` of them, estimated from Postgres'' statistics above.';

CREATE FUNCTION vector_index_name(embedding_model text, dimensions integer, relation text DEFAULT 'document_chunks') RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN relation || '_hnsw_' || left(encode(sha256(convert_to(embedding_model || ':' || dimensions, 'UTF8')), 'hex'), 12);
COMMENT ON FUNCTION vector_index_name IS 'What the vector index of a model is called on document_chunks or chunk_embeddings.';

CREATE VIEW index_health WITH (security_invoker = true) AS
SELECT
    t.relname::text AS table_name, c.relname::text AS index_name, m.amname::text AS kind,
    CASE WHEN p.pid IS NOT NULL THEN 'building' WHEN NOT i.indisvalid OR NOT i.indisready THEN 'invalid' ELSE 'ok' END AS health,
    i.indisunique AS is_unique, pg_relation_size(c.oid) AS size_bytes, s.idx_scan AS scans, s.last_idx_scan AS last_used_at,
    round(100.0 * p.blocks_done / nullif(p.blocks_total, 0), 1) AS built_percent,
    CASE WHEN p.pid IS NULL AND (NOT i.indisvalid OR NOT i.indisready) THEN
        CASE WHEN m.amname = 'hnsw' THEN 'a build was cut off; a worker builds it again within minutes, or: DROP INDEX ' || c.oid::regclass || ';'
            ELSE 'searches do not use it: REINDEX INDEX CONCURRENTLY ' || c.oid::regclass || ';' END
    END AS what_to_do
FROM pg_class AS t
JOIN pg_index AS i ON i.indrelid = t.oid
JOIN pg_class AS c ON c.oid = i.indexrelid AND c.relkind = 'i'
JOIN pg_am AS m ON m.oid = c.relam
LEFT JOIN pg_stat_all_indexes AS s ON s.indexrelid = c.oid
LEFT JOIN pg_stat_progress_create_index AS p ON p.index_relid = c.oid
WHERE t.relnamespace = (SELECT o.relnamespace FROM pg_class AS o WHERE o.oid = 'file_extractions'::regclass) AND t.relkind IN ('r', 'm')
ORDER BY p.pid IS NULL AND i.indisvalid AND i.indisready, pg_relation_size(c.oid) DESC;
COMMENT ON VIEW index_health IS 'Every index of docmill''s and procrastinate''s tables: whether searches can use it, how large it is and how much it is used.';
COMMENT ON COLUMN index_health.table_name IS 'The table.';
COMMENT ON COLUMN index_health.index_name IS 'The index.';
COMMENT ON COLUMN index_health.kind IS 'btree, gin, hash, hnsw (vectors) or brin.';
COMMENT ON COLUMN index_health.health IS 'ok; building; invalid: a build was cut off, and searches do not use it.';
COMMENT ON COLUMN index_health.is_unique IS 'Whether it also keeps rows apart.';
COMMENT ON COLUMN index_health.size_bytes IS 'Size on disk in bytes.';
COMMENT ON COLUMN index_health.scans IS 'Times it was used since statistics were last reset.';
COMMENT ON COLUMN index_health.last_used_at IS 'When it was last used.';
COMMENT ON COLUMN index_health.built_percent IS 'While building: how much of the table has been read, 0 to 100.';
COMMENT ON COLUMN index_health.what_to_do IS 'What an operator can do, in plain words; null where nothing is needed.';

CREATE VIEW embedding_coverage WITH (security_invoker = true) AS
WITH wanted AS (
    SELECT s.embedding_model, 'serving' AS role, s.dimensions, TRUE AS listed FROM serving_embeddings AS s
    UNION ALL
    SELECT r.to_model, 'coming', r.dimensions, r.listed_at IS NOT NULL
    FROM reembeddings AS r
    WHERE r.state IN ('running', 'paused', 'ready') AND r.switched_at IS NULL
), passages AS (
    SELECT rows_about('document_chunks') AS passages WHERE EXISTS (SELECT FROM wanted)
)
SELECT
    w.embedding_model, w.role, w.dimensions, p.passages, p.passages > 100000 AS is_estimate,
    CASE WHEN w.listed THEN l.passages END AS lacking_passages, CASE WHEN w.listed THEN l.documents END AS lacking_documents,
    l.failing AS failing_documents, l.error_message,
    CASE WHEN w.listed THEN round(100.0 * greatest(0, p.passages - l.passages) / nullif(p.passages, 0), 2) END AS percent,
    coalesce(i.health, 'none') AS vector_index, i.index_name AS vector_index_name
FROM wanted AS w
CROSS JOIN passages AS p
CROSS JOIN LATERAL (
    SELECT coalesce(sum(e.passages), 0) AS passages, count(*) AS documents, count(e.error_message) AS failing, max(e.error_message) AS error_message
    FROM embeddings_to_make AS e
    WHERE e.embedding_model = w.embedding_model AND (e.is_urgent OR w.role = 'coming')
) AS l
LEFT JOIN index_health AS i
    ON i.index_name = vector_index_name(w.embedding_model, w.dimensions, embedding_table(w.embedding_model));
COMMENT ON VIEW embedding_coverage IS
    'How much of the passages has a vector of the model that serves searches, and of the one that a re-embedding goes over to. Empty while there are no passages.';
COMMENT ON COLUMN embedding_coverage.embedding_model IS 'Name and version of the model.';
COMMENT ON COLUMN embedding_coverage.role IS 'serving: searches use it. coming: a re-embedding goes over to it.';
COMMENT ON COLUMN embedding_coverage.dimensions IS 'Length of its vectors; null until the first are made.';
COMMENT ON COLUMN embedding_coverage.passages IS 'Passages of all documents; above 100,000 an estimate, good to a few percent.';
COMMENT ON COLUMN embedding_coverage.is_estimate IS 'Whether it is one.';
COMMENT ON COLUMN embedding_coverage.lacking_passages IS 'Passages that lack a vector of the model, which searches by meaning do not find; null until a re-embedding has listed them.';
COMMENT ON COLUMN embedding_coverage.lacking_documents IS 'Documents that they belong to.';
COMMENT ON COLUMN embedding_coverage.failing_documents IS 'Documents of them that could not be embedded when last tried.';
COMMENT ON COLUMN embedding_coverage.error_message IS 'Why, for one of them, in plain words.';
COMMENT ON COLUMN embedding_coverage.percent IS 'Part of the passages that has its vector, 0 to 100.';
COMMENT ON COLUMN embedding_coverage.vector_index IS 'ok, building, invalid, or none: searches compare with every passage, which is right below VECTOR_INDEX_THRESHOLD and during bulk loads.';
COMMENT ON COLUMN embedding_coverage.vector_index_name IS 'Its index, if there is one.';

CREATE VIEW stuck_documents WITH (security_invoker = true) AS
WITH candidates AS MATERIALIZED (
    (
        SELECT d.id FROM file_extractions AS d WHERE d.state IN ('queued', 'retrying') ORDER BY d.id LIMIT 10000
    )
    UNION
    SELECT d.id
    FROM (
        SELECT j.args ->> 'doc_id' AS doc_id
        FROM procrastinate_jobs AS j
        WHERE j.status = 'todo' AND j.scheduled_at IS NOT NULL AND stage_queue(j.task_name) IS NOT NULL
        ORDER BY j.scheduled_at DESC
        LIMIT 10000
    ) AS s
    JOIN file_extractions AS d ON d.doc_id = s.doc_id
    UNION
    SELECT d.id
    FROM file_extractions AS d
    WHERE d.state = 'working' AND (d.lease_until < now() - interval '1 minute' OR d.updated_at < now() - interval '30 minutes')
), fetched AS MATERIALIZED (
    SELECT j.args ->> 'doc_id' AS doc_id, bool_or(EXISTS (
        SELECT FROM worker_health AS w JOIN worker_registry AS r USING (worker) WHERE w.health IN ('alive', 'stopping') AND j.id = ANY(r.active_jobs)
    )) AS in_hand
    FROM procrastinate_jobs AS j
    WHERE j.status = 'doing' AND stage_queue(j.task_name) IS NOT NULL
    GROUP BY 1
), queues AS MATERIALIZED (
    SELECT q.queue,
        (SELECT count(*) FROM worker_health AS w WHERE w.health = 'alive' AND (w.queues IS NULL OR q.queue = ANY(w.queues))) AS listeners,
        EXISTS (
            SELECT FROM document_events AS e
            WHERE e.id >= event_id_since(now() - interval '11 minutes') AND e.at > now() - interval '10 minutes' AND e.worker IS NOT NULL
                AND stage_queue(e.stage) = q.queue
        ) AS moves
    FROM unnest(ARRAY['cpu', 'embed', 'extract']) AS q (queue)
), looked AS (
    SELECT d.id, d.doc_id, d.file_name, d.batch_id, d.user_id, d.content_sha256, d.milestone, d.state, due_stage(d.milestone) AS stage,
        stage_queue(due_stage(d.milestone)) AS queue, d.updated_at, d.created_at, d.not_before, d.lease_until, d.claimed_by, d.crash_count,
        d.requeue_count, d.retry_count, d.error_type, d.error_message, f.in_hand,
        f.doc_id IS NOT NULL OR EXISTS (
            SELECT FROM procrastinate_jobs AS j
            WHERE j.status = 'todo' AND j.queueing_lock = due_stage(d.milestone) || ':' || d.doc_id
        ) AS has_job
    FROM candidates AS c
    JOIN file_extractions AS d ON d.id = c.id
    LEFT JOIN fetched AS f ON f.doc_id = d.doc_id
    WHERE d.state IN ('queued', 'retrying', 'working')
)
SELECT
    l.doc_id, l.file_name, l.batch_id, l.user_id, l.stage, l.queue, l.state, r.cause, r.reason, r.since,
    date_trunc('second', now() - r.since) AS stuck_for, l.not_before AS next_try_at, r.what_to_do, l.claimed_by AS worker
FROM looked AS l
JOIN queues AS q ON q.queue = l.queue
LEFT JOIN LATERAL (
    SELECT e.at AS last_try_at, NOT coalesce((e.detail ->> 'counts')::boolean, TRUE) AS waits,
        coalesce((
            SELECT max(p.at) FROM document_events AS p WHERE p.doc_id = l.doc_id AND p.event NOT IN ('retry_scheduled', 'handed_on', 'rescued', 'requeued')
        ), l.created_at) AS since
    FROM document_events AS e
    WHERE l.state = 'retrying' AND e.doc_id = l.doc_id AND e.event = 'retry_scheduled'
    ORDER BY e.id DESC
    LIMIT 1
) AS t ON TRUE
LEFT JOIN LATERAL (
    SELECT o.doc_id, due_stage(o.milestone) AS stage
    FROM file_extractions AS o
    WHERE l.state = 'queued' AND l.milestone = 'upload_validated' AND o.user_id = l.user_id AND o.content_sha256 = l.content_sha256
        AND o.owns_content AND o.id <> l.id
) AS o ON TRUE
CROSS JOIN LATERAL (
    SELECT v.cause, v.reason, v.since, v.what_to_do
    FROM (VALUES
        (1, l.state = 'working' AND l.lease_until < now() - interval '1 minute', 'worker_lost', l.lease_until,
            format('the worker that had it, %s, has fallen silent and nobody has taken the document over', l.claimed_by),
            CASE WHEN (SELECT max(a.listeners) FROM queues AS a) = 0 THEN 'start a worker: any one takes it over within seconds'
                ELSE 'the workers alive should take it over within seconds: look at their logs, restart them' END),
        (2, l.state = 'working', 'slow', l.updated_at,
            format('%s has been at %s for a long time without a result', l.claimed_by, l.stage),
            'it is cut off and tried again at STAGE_TIMEOUT_SECONDS; to end it now: SELECT fail_document_by_operator(doc_id, reason);'),
        (3, q.listeners = 0 AND l.updated_at < now() - interval '1 minute', 'no_worker', l.updated_at,
            format('no worker alive listens to the queue %s', l.queue),
            format('start one: docmill worker, or docmill worker --queues %s', l.queue)),
        (4, NOT l.has_job AND l.updated_at < now() - interval '1 minute', 'job_lost', l.updated_at,
            'it waits, but has no job in the queue',
            'the workers alive queue it again within a minute; if they do not, look at their logs: do all run the present version of docmill?'),
        (5, NOT l.in_hand AND l.updated_at < now() - interval '2 minutes', 'job_lost', l.updated_at,
            'its job was fetched by a worker that no longer knows of it',
            'the workers alive end that job and queue the document again within a minute; if they do not, look at their logs'),
        (6, l.crash_count > 0, 'crashing', l.updated_at,
            format('its worker died or hung %s times during %s', l.crash_count, l.stage),
            'it is tried again alone in its worker and becomes a dead letter at MAX_CRASHES; look at worker memory and the file'),
        (7, l.requeue_count > 1, 'job_lost', l.updated_at,
            format('its job was lost %s times before a worker began it', l.requeue_count),
            'do all workers run the present version of docmill, and does anything delete from procrastinate_jobs?'),
        (8, t.waits AND t.since < now() - interval '10 minutes', 'service', t.since,
            format('it waits for an outside service: %s', l.error_message),
            'it goes on by itself when the service is back; look at provider_health, SELECT reset_breaker(service) tries at once'),
        (9, l.state = 'retrying' AND t.since < now() - interval '10 minutes', 'failing', t.since,
            format('%s keeps failing (%s times): %s', l.stage, l.retry_count, l.error_message),
            'it is tried again by itself and becomes a dead letter after MAX_RETRY_ATTEMPTS retries'),
        (10, o.doc_id IS NOT NULL AND l.updated_at < now() - interval '10 minutes', 'equal', l.updated_at,
            format('it waits for %s, which has the same content and is due for %s', o.doc_id, o.stage),
            'nothing, if that one gets on: SELECT * FROM explain_document(' || quote_literal(o.doc_id) || ');'),
        (11, NOT q.moves AND l.not_before IS NULL AND l.updated_at < now() - interval '10 minutes', 'queue_stands', l.updated_at,
            format('workers listen to the queue %s, but none has brought anything to an end for 10 minutes', l.queue),
            'look at worker_health: busy with long documents, or hung? Their logs say; restarting a worker loses nothing')
    ) AS v (place, holds, cause, since, reason, what_to_do)
    WHERE v.holds
    ORDER BY v.place
    LIMIT 1
) AS r
ORDER BY r.since;
COMMENT ON VIEW stuck_documents IS
    'Unfinished documents that do not get on, each with the first reason that holds and what to do. Looks at all in work, the 10,000 that were submitted first of those that wait, and the 10,000 put off for longest. A document that just waits for its turn is not stuck.';
COMMENT ON COLUMN stuck_documents.doc_id IS 'The document.';
COMMENT ON COLUMN stuck_documents.file_name IS 'The name that the submitter gave.';
COMMENT ON COLUMN stuck_documents.batch_id IS 'Its batch, if any.';
COMMENT ON COLUMN stuck_documents.user_id IS 'Whose it is.';
COMMENT ON COLUMN stuck_documents.stage IS 'The stage that is due or runs.';
COMMENT ON COLUMN stuck_documents.queue IS 'The queue of that stage.';
COMMENT ON COLUMN stuck_documents.state IS 'queued, working or retrying.';
COMMENT ON COLUMN stuck_documents.cause IS
    'To group by: worker_lost, slow, no_worker, job_lost, crashing, service, failing, equal (waits for the same content) or queue_stands.';
COMMENT ON COLUMN stuck_documents.reason IS 'The cause in plain words.';
COMMENT ON COLUMN stuck_documents.since IS 'Since when it has not got on.';
COMMENT ON COLUMN stuck_documents.stuck_for IS 'How long that is.';
COMMENT ON COLUMN stuck_documents.next_try_at IS 'No worker takes it up before; null for at once.';
COMMENT ON COLUMN stuck_documents.what_to_do IS 'What an operator can do, in plain words.';
COMMENT ON COLUMN stuck_documents.worker IS 'host:pid of the worker that has it or last had it.';

CALL pin_search_path();
