-- Where workers listen to some queues alone, or each stage waits in its queue, small documents were taken up together for the first stage or for none,
-- and each came to the next by itself, at a transaction and a claim of its own for each. Now those that were handed on go together there too.

CREATE OR REPLACE FUNCTION take_along(
    leader_job_id bigint, worker text, lease_seconds double precision, serialise boolean, at_most integer, max_bytes bigint, max_documents integer
) RETURNS SETOF file_extractions LANGUAGE plpgsql
ROWS 16
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET plan_cache_mode = force_generic_plan
AS $$
-- Small documents of the same user whose jobs come next in the same queue and are for the same stage. Behind validate: new ones unlike any other
-- of the user's, so that none of them waits for another or can be spared. Behind any other stage: those that own their content. All others are left
-- to be fetched alone. No more is taken than each worker would get if those that listen to the queue shared what waits. Whatever
-- somebody's transaction holds is skipped, so this waits for nobody. Claims as claim_document does.
DECLARE
    most_passages CONSTANT integer := 100;  -- a small file can hold a large text
    leader procrastinate_jobs;
    workers integer;
    seen bigint[];
    room integer;
    documents bigint;
BEGIN
    -- A job's arguments can be changed after its owner was noted; what is worked on together must be of one user.
    SELECT j.* INTO leader
    FROM procrastinate_jobs AS j
    JOIN file_extractions AS d ON d.doc_id = j.args ->> 'doc_id'
    WHERE j.id = leader_job_id AND j.status = 'doing' AND d.user_id = j.docmill_user
        -- Jobs of documents that were begun go before new ones: behind one of validate that was, it is those that come next.
        AND CASE j.task_name WHEN 'validate' THEN NOT j.docmill_begun ELSE coalesce(d.chunk_count, 0) <= most_passages END;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT greatest(1, count(*)) INTO workers
    FROM worker_registry AS w
    WHERE NOT w.stopping AND w.heartbeat_at > now() - interval '30 seconds' AND (w.queues IS NULL OR leader.queue_name = ANY (w.queues));
    SELECT array_agg(w.id) INTO seen
    FROM (
        SELECT j.id
        FROM procrastinate_jobs AS j
        WHERE j.status = 'todo' AND j.scheduled_at IS NULL AND j.queue_name = leader.queue_name AND j.docmill_user = leader.docmill_user
            AND j.priority = leader.priority AND j.docmill_begun = leader.docmill_begun
        ORDER BY j.id
        LIMIT least(workers + 1, 100) * at_most
    ) AS w;
    room := least(at_most, coalesce(cardinality(seen), 0) / workers);
    IF room > 0 AND max_documents > 0 THEN
        -- As take_users_job has it, so that the limit holds exactly, but not waited for: the lease on the leader's document is not renewed yet.
        IF NOT pg_try_advisory_xact_lock(hashtextextended('docmill documents of ' || leader.docmill_user, 0)) THEN
            RETURN;
        END IF;
        SELECT count(*) INTO documents FROM procrastinate_jobs AS j
        WHERE j.status = 'doing' AND j.docmill_user = leader.docmill_user AND stage_queue(j.task_name) IS NOT NULL;
        room := least(room, max_documents - documents);
    END IF;
    IF room <= 0 THEN
        RETURN;
    END IF;
    RETURN QUERY
    WITH free AS MATERIALIZED (
        SELECT d.id, j.id AS job_id
        FROM unnest(seen[1:4 * room]) AS s (id)  -- where fewer of them will do, looking further would cost more than it brings
        JOIN procrastinate_jobs AS j ON j.id = s.id
        JOIN file_extractions AS d ON d.doc_id = j.args ->> 'doc_id'
        WHERE j.status = 'todo' AND j.task_name = leader.task_name AND j.lock IS NULL AND d.user_id = leader.docmill_user
            AND d.served_version IS NULL AND d.crash_count = 0 AND d.retry_count = 0
            AND d.file_size <= max_bytes AND d.content_sha256 IS NOT NULL
            AND CASE leader.task_name
                WHEN 'validate' THEN d.state = 'queued' AND d.milestone = 'uploaded' AND d.waiting_since IS NULL
                    AND NOT EXISTS (
                        SELECT FROM file_extractions AS o
                        WHERE o.user_id = d.user_id AND o.content_sha256 = d.content_sha256 AND o.id <> d.id
                    )
                -- Those that waited for a service until now, or that were handed on.
                ELSE d.state IN ('queued', 'retrying') AND coalesce(d.not_before, now()) <= now() AND due_stage(d.milestone) = leader.task_name
                    AND coalesce(d.chunk_count, 0) <= most_passages AND (d.owns_content OR NOT serialise)
            END
        LIMIT room
        FOR NO KEY UPDATE OF d, j SKIP LOCKED
    ), claimed AS (
        UPDATE file_extractions AS d
        SET state = 'working',
            claim = d.claim + 1,
            claim_job_id = f.job_id,
            claimed_by = take_along.worker,
            lease_until = now() + make_interval(secs => take_along.lease_seconds),
            alone = FALSE,
            owns_content = d.owns_content OR take_along.serialise,
            not_before = NULL,
            processing_started_at = coalesce(d.processing_started_at, now()),
            updated_at = now()
        FROM free AS f
        WHERE d.id = f.id
        RETURNING d.*
    ), fetched AS (
        -- Of two jobs for the same document, one of them a stray, the other goes on waiting.
        UPDATE procrastinate_jobs AS j SET status = 'doing', worker_id = leader.worker_id FROM claimed AS c WHERE j.id = c.claim_job_id
    )
    SELECT c.* FROM claimed AS c;
END;
$$;
COMMENT ON FUNCTION take_along IS
    'Fetches and claims for a worker small documents that wait behind the one whose job it has, new ones behind a job of validate, those that have come as far behind one of another stage: at most so many, and no more than its part of what waits. max_bytes: of each file. max_documents: in work at once per user, 0 for any number.';

CALL pin_search_path();
