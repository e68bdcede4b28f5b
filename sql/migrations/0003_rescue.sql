-- What the reconciler needs: which workers live, and the repairs.
--
-- The repairs are functions, one document or job a call, so that each is a small transaction of its own and an operator can run them by
-- hand. Each locks the document first (skipping one that somebody works on this very moment), then looks again in a new statement, because
-- what the finder saw may have changed while it waited. They never reuse a job row: the old one is ended and a new one deferred.

CREATE TABLE worker_registry (
    worker text PRIMARY KEY,
    host text NOT NULL,
    pid integer NOT NULL,
    queues text[],
    concurrency integer NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    heartbeat_at timestamptz NOT NULL DEFAULT now(),
    stopping boolean NOT NULL DEFAULT FALSE,
    active_jobs bigint[] NOT NULL DEFAULT '{}',
    documents text[] NOT NULL DEFAULT '{}',
    memory_mb double precision,
    cpu_seconds double precision,
    version text NOT NULL
);
COMMENT ON TABLE worker_registry IS 'Worker processes, each with a heartbeat that goes on until the process ends.';
COMMENT ON COLUMN worker_registry.worker IS 'host:pid.';
COMMENT ON COLUMN worker_registry.host IS 'Host name.';
COMMENT ON COLUMN worker_registry.pid IS 'Process id on that host.';
COMMENT ON COLUMN worker_registry.queues IS 'The queues that it listens to; null for all.';
COMMENT ON COLUMN worker_registry.concurrency IS 'How many jobs it runs at a time.';
COMMENT ON COLUMN worker_registry.started_at IS 'When it started.';
COMMENT ON COLUMN worker_registry.heartbeat_at IS 'When it was last heard of.';
COMMENT ON COLUMN worker_registry.stopping IS 'Whether it has been asked to stop and finishes what it holds.';
COMMENT ON COLUMN worker_registry.active_jobs IS 'procrastinate_jobs.id of the jobs in hand.';
COMMENT ON COLUMN worker_registry.documents IS 'doc_id of the documents whose lease it renews.';
COMMENT ON COLUMN worker_registry.memory_mb IS 'Resident memory of the process, children not included.';
COMMENT ON COLUMN worker_registry.cpu_seconds IS 'CPU time of the process so far, children not included.';
COMMENT ON COLUMN worker_registry.version IS 'Version of docmill.';

CREATE INDEX procrastinate_jobs_docmill_doing ON procrastinate_jobs (id) WHERE status = 'doing';

CREATE FUNCTION alert(kind text, message text, detail jsonb DEFAULT '{}') RETURNS void LANGUAGE sql AS $$
    -- NOTIFY takes 8,000 bytes at most.
    SELECT pg_notify('docmill_alerts', jsonb_build_object(
        'kind', kind, 'message', left(message, 1000), 'at', now(),
        'detail', CASE WHEN length(detail::text) < 1500 THEN detail ELSE '{}' END
    )::text);
$$;
COMMENT ON FUNCTION alert IS 'Tells whoever listens on the channel docmill_alerts; delivered when the transaction commits.';

CREATE FUNCTION alert_of_dead_letter() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM alert('dead_letter', NEW.error_message, jsonb_build_object(
        'dead_letter', NEW.id, 'doc_id', NEW.doc_id, 'batch_id', NEW.batch_id, 'stage', NEW.stage, 'error_type', NEW.error_type,
        'correlation_id', NEW.correlation_id));
    RETURN NULL;
END;
$$;
COMMENT ON FUNCTION alert_of_dead_letter IS 'Raises an alert for each new dead letter.';

CREATE TRIGGER dead_letters_alert AFTER INSERT ON dead_letters FOR EACH ROW EXECUTE FUNCTION alert_of_dead_letter();

CREATE FUNCTION fail_document(d file_extractions, error_type document_error_type, message text, context jsonb) RETURNS void
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
END;
$$;
COMMENT ON FUNCTION fail_document IS 'Fails a document whose lock is held and writes its dead letter.';

CREATE FUNCTION end_job(job_id bigint) RETURNS void LANGUAGE sql AS $$
    UPDATE procrastinate_jobs AS j SET status = 'aborted', attempts = j.attempts + 1, abort_requested = FALSE
    WHERE j.id = end_job.job_id AND j.status = 'doing';
$$;
COMMENT ON FUNCTION end_job IS 'Ends a job that nobody runs any more; procrastinate refuses its late acknowledgement.';

CREATE FUNCTION rescue_document(doc_id text, max_crashes integer) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    d file_extractions;
BEGIN
    SELECT f.* INTO d FROM file_extractions AS f WHERE f.doc_id = rescue_document.doc_id FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    SELECT f.* INTO d FROM file_extractions AS f WHERE f.id = d.id;
    IF d.state <> 'working' OR d.lease_until >= clock_timestamp() THEN
        RETURN NULL;
    END IF;
    -- A checkpoint that moves the milestone sets the counts back, so they speak of this milestone only.
    d.crash_count := d.crash_count + 1;
    d.lone_crash_count := d.lone_crash_count + d.alone::integer;
    UPDATE file_extractions AS f SET crash_count = d.crash_count, lone_crash_count = d.lone_crash_count WHERE f.id = d.id;
    IF d.claim_job_id IS NOT NULL THEN
        PERFORM end_job(d.claim_job_id);
    END IF;
    IF d.lone_crash_count >= max_crashes THEN
        PERFORM fail_document(d, 'UNKNOWN', format(
            '%s: the worker died or hung %s times while %s had it to itself (MAX_CRASHES).', d.file_name, d.lone_crash_count, due_stage(d.milestone)),
            jsonb_build_object('crash_count', d.crash_count, 'lone_crash_count', d.lone_crash_count, 'worker', d.claimed_by, 'milestone', d.milestone));
        RETURN 'failed';
    END IF;
    UPDATE file_extractions AS f
    SET state = 'queued', claim = f.claim + 1, claim_job_id = NULL, lease_until = NULL, updated_at = now()
    WHERE f.id = d.id;
    PERFORM defer_stage(d.doc_id, due_stage(d.milestone), d.priority,
        now() + make_interval(secs => CASE d.crash_count WHEN 1 THEN 0 ELSE least(300, 2.0 ^ least(d.crash_count, 10)) END));
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, stage, event, worker, claim, detail)
    VALUES (d.doc_id, d.version, d.batch_id, d.user_id, d.correlation_id, due_stage(d.milestone), 'rescued', d.claimed_by, d.claim,
        jsonb_build_object('reason', 'lease expired', 'crash_count', d.crash_count, 'lone_crash_count', d.lone_crash_count));
    RETURN 'rescued';
END;
$$;
COMMENT ON FUNCTION rescue_document IS 'Takes a document from a worker whose lease has expired: queued again, or failed after MAX_CRASHES crashes alone.';

CREATE FUNCTION requeue_lost_document(doc_id text, max_requeues integer) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    d file_extractions;
BEGIN
    SELECT f.* INTO d FROM file_extractions AS f WHERE f.doc_id = requeue_lost_document.doc_id FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    SELECT f.* INTO d FROM file_extractions AS f WHERE f.id = d.id;
    IF d.state NOT IN ('queued', 'retrying') OR has_live_job(d.doc_id) THEN
        RETURN NULL;
    END IF;
    d.requeue_count := d.requeue_count + 1;
    UPDATE file_extractions AS f SET requeue_count = d.requeue_count, updated_at = now() WHERE f.id = d.id;
    IF d.requeue_count > max_requeues THEN
        PERFORM fail_document(d, 'UNKNOWN', format(
            '%s: the job of stage %s was lost %s times before any worker began it; do all workers run the present version of docmill?',
            d.file_name, due_stage(d.milestone), d.requeue_count),
            jsonb_build_object('requeue_count', d.requeue_count, 'milestone', d.milestone));
        RETURN 'failed';
    END IF;
    PERFORM defer_stage(d.doc_id, due_stage(d.milestone), d.priority,
        now() + make_interval(secs => CASE d.requeue_count WHEN 1 THEN 0 ELSE least(300, 2.0 ^ least(d.requeue_count, 10)) END));
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, stage, event, claim, detail)
    VALUES (d.doc_id, d.version, d.batch_id, d.user_id, d.correlation_id, due_stage(d.milestone), 'requeued', d.claim,
        jsonb_build_object('reason', 'no live job', 'requeue_count', d.requeue_count));
    RETURN 'requeued';
END;
$$;
COMMENT ON FUNCTION requeue_lost_document IS 'Queues a waiting document that has no live job again; after too many times it is failed, visibly.';

CREATE FUNCTION has_live_job(doc_id text) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (
        SELECT FROM procrastinate_jobs AS j
        WHERE j.status = 'todo' AND j.queueing_lock IN (
            SELECT stage || ':' || has_live_job.doc_id
            FROM unnest(ARRAY['validate', 'parse', 'check', 'chunk', 'embed', 'extract', 'finalize']) AS stage
        )
    ) OR EXISTS (
        SELECT FROM procrastinate_jobs AS j
        WHERE j.status = 'doing' AND stage_queue(j.task_name) IS NOT NULL AND j.args ->> 'doc_id' = has_live_job.doc_id
    );
$$;
COMMENT ON FUNCTION has_live_job IS 'Whether a stage job of the document waits or has been fetched.';

CREATE FUNCTION is_in_hand(job_id bigint, grace_seconds double precision) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (
        SELECT FROM worker_registry AS w
        WHERE is_in_hand.job_id = ANY(w.active_jobs) AND w.heartbeat_at > now() - make_interval(secs => grace_seconds)
    ) OR EXISTS (
        SELECT FROM procrastinate_events AS e
        WHERE e.job_id = is_in_hand.job_id AND e.type = 'started' AND e.at > now() - make_interval(secs => grace_seconds)
    );
$$;
COMMENT ON FUNCTION is_in_hand IS 'Whether a live worker says that it has a fetched job in hand, or it was fetched so lately that no worker had to say so yet.';

CREATE FUNCTION end_abandoned_job(job_id bigint, grace_seconds double precision) RETURNS text LANGUAGE plpgsql AS $$
-- A fetched stage job that holds no claim, long after its fetch: its worker died between the two, or could not save the outcome.
DECLARE
    job procrastinate_jobs;
    d file_extractions;
BEGIN
    SELECT j.* INTO job FROM procrastinate_jobs AS j WHERE j.id = end_abandoned_job.job_id;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    -- Document before job, as everywhere. The document may be gone; then there is nothing to wait for.
    PERFORM FROM file_extractions AS f WHERE f.doc_id = job.args ->> 'doc_id' FOR UPDATE SKIP LOCKED;
    IF NOT FOUND AND EXISTS (SELECT FROM file_extractions AS f WHERE f.doc_id = job.args ->> 'doc_id') THEN
        RETURN NULL;
    END IF;
    PERFORM FROM procrastinate_jobs AS j WHERE j.id = job.id AND j.status = 'doing' FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    SELECT f.* INTO d FROM file_extractions AS f WHERE f.doc_id = job.args ->> 'doc_id';
    IF d.state = 'working' AND d.claim_job_id = job.id THEN
        RETURN NULL;
    END IF;
    IF is_in_hand(job.id, grace_seconds) THEN
        RETURN NULL;
    END IF;
    PERFORM end_job(job.id);
    RETURN 'ended';
END;
$$;
COMMENT ON FUNCTION end_abandoned_job IS 'Ends a fetched stage job that holds no claim long after its fetch; its document is then queued again if need be.';
