-- A document whose row an application's transaction held for longer than a lease was taken from its worker, which lives, as soon as that transaction
-- ended: the lease could not be renewed meanwhile. What was made of it was dropped, and it counted as a crash. A worker that lives says which
-- documents it holds, and renews their leases a few seconds later.

CREATE FUNCTION is_held_alive(doc_id text, worker text, alive_seconds double precision) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (
        SELECT FROM worker_registry AS w
        WHERE w.worker = is_held_alive.worker AND is_held_alive.doc_id = ANY(w.documents)
            AND w.heartbeat_at > now() - make_interval(secs => alive_seconds)
    );
$$;
COMMENT ON FUNCTION is_held_alive IS 'Whether a worker that was heard of within so many seconds says that it holds the lease of a document.';

-- Workers of the release before call it without alive_seconds.
DROP FUNCTION rescue_document(text, integer);
CREATE FUNCTION rescue_document(doc_id text, max_crashes integer, alive_seconds double precision DEFAULT 0) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    d file_extractions;
BEGIN
    SELECT f.* INTO d FROM file_extractions AS f WHERE f.doc_id = rescue_document.doc_id FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    SELECT f.* INTO d FROM file_extractions AS f WHERE f.id = d.id;
    IF d.state <> 'working' OR d.lease_until >= clock_timestamp() OR is_held_alive(d.doc_id, d.claimed_by, rescue_document.alive_seconds) THEN
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
COMMENT ON FUNCTION rescue_document IS 'Takes a document from a worker whose lease has expired and that was not heard of for alive_seconds: queued again, or failed after MAX_CRASHES crashes alone.';

CALL pin_search_path();
