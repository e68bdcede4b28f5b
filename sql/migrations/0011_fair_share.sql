-- Fair share: workers take jobs user by user, so that one user's backlog does not stand in the way of another's single document.
--
-- procrastinate_fetch_job_v2 takes the oldest job of the highest priority, whoever's it is, and reads past every job that is scheduled for
-- later. docmill_fetch_job asks whose turn it is: it walks through the users with waiting jobs, beginning behind the one who was served
-- last, and takes a job of the first who has nothing in work, or else of the one who has least. Within a user the highest priority goes
-- first, among equals documents that have been begun, then the oldest. Everything else is as in procrastinate's function, which goes on
-- working for workers that know of no other. See docs/decisions/0006-fair-share.md.
--
-- Waiting jobs are in one of two indexes: those that may be fetched at once, by queue and user, and those scheduled for later, by time.
-- A fetch first moves what has become due from the second into the first, by setting scheduled_at to null (the time stays in
-- procrastinate_events), so it costs the same however many jobs wait and however many are scheduled ahead.

ALTER TABLE procrastinate_jobs
ADD COLUMN docmill_user text COLLATE "C" NOT NULL DEFAULT '',
ADD COLUMN docmill_begun boolean NOT NULL DEFAULT FALSE;
COMMENT ON COLUMN procrastinate_jobs.docmill_user IS 'Whose document or archive the job is for; empty for a job that is nobody''s. Set by note_job_owner.';
COMMENT ON COLUMN procrastinate_jobs.docmill_begun IS 'Whether its document had been worked on when the job was deferred: of a user''s jobs of one priority, such go first. Set by note_job_owner.';

UPDATE procrastinate_jobs AS j
SET docmill_user = d.user_id, docmill_begun = d.processing_started_at IS NOT NULL
FROM file_extractions AS d
WHERE j.status IN ('todo', 'doing') AND stage_queue(j.task_name) IS NOT NULL AND d.doc_id = j.args ->> 'doc_id';
UPDATE procrastinate_jobs AS j
SET docmill_user = a.user_id, docmill_begun = a.depth > 1 OR a.state = 'unpacking'
FROM batch_archives AS a
WHERE j.status IN ('todo', 'doing') AND j.task_name = 'unpack' AND j.args ->> 'archive_id' = a.id::text;

-- What the immediate hand-on from stage to stage had for a time is no time to wait for.
UPDATE procrastinate_jobs AS j SET scheduled_at = NULL WHERE j.status = 'todo' AND j.scheduled_at <= now();

CREATE INDEX procrastinate_jobs_docmill_ready ON procrastinate_jobs (queue_name, docmill_user, priority DESC, docmill_begun DESC, id)
    WHERE status = 'todo' AND scheduled_at IS NULL;
COMMENT ON INDEX procrastinate_jobs_docmill_ready IS 'Whose jobs wait in which queue, and each user''s in order.';
CREATE INDEX procrastinate_jobs_docmill_scheduled ON procrastinate_jobs (scheduled_at) WHERE status = 'todo' AND scheduled_at IS NOT NULL;
COMMENT ON INDEX procrastinate_jobs_docmill_scheduled IS 'Which scheduled jobs are due next.';
CREATE INDEX procrastinate_jobs_docmill_in_work ON procrastinate_jobs (docmill_user) WHERE status = 'doing';
COMMENT ON INDEX procrastinate_jobs_docmill_in_work IS 'How much each user has in work.';
CREATE INDEX procrastinate_jobs_docmill_locks ON procrastinate_jobs (lock, priority DESC, id) WHERE status = 'todo' AND lock IS NOT NULL;
COMMENT ON INDEX procrastinate_jobs_docmill_locks IS 'Which waiting job with a lock comes first; empty unless an application''s own tasks have locks.';

CREATE FUNCTION note_job_owner() RETURNS trigger LANGUAGE plpgsql AS $$
-- Docmill's own tasks only: jobs of an application may stay "doing" for ever after a crash and would count against the user.
DECLARE
    found record;
BEGIN
    IF stage_queue(NEW.task_name) IS NOT NULL THEN
        SELECT d.user_id, d.processing_started_at IS NOT NULL AS begun INTO found
        FROM file_extractions AS d WHERE d.doc_id = NEW.args ->> 'doc_id';
    ELSIF NEW.task_name = 'unpack' AND jsonb_typeof(NEW.args -> 'archive_id') = 'number' THEN
        -- What a batch under way still lacks goes before the user's next batch.
        SELECT a.user_id, a.depth > 1 OR a.state = 'unpacking' AS begun INTO found
        FROM batch_archives AS a WHERE a.id = (NEW.args ->> 'archive_id')::numeric::bigint;
    ELSE
        RETURN NEW;
    END IF;
    NEW.docmill_user := coalesce(found.user_id, '');
    NEW.docmill_begun := coalesce(found.begun, FALSE);
    RETURN NEW;
END;
$$;
COMMENT ON FUNCTION note_job_owner IS 'Notes on a new job of a stage or of unpack whose it is and whether its work has been begun, however it was deferred.';

CREATE TRIGGER docmill_note_job_owner BEFORE INSERT ON procrastinate_jobs FOR EACH ROW EXECUTE FUNCTION note_job_owner();

CREATE OR REPLACE FUNCTION defer_stage(doc_id text, stage text, priority integer, scheduled_at timestamptz DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql AS $$
-- A twin that already waits serves as well, if it is made to wait no longer than this one would, so the unique queueing lock is no error
-- here. The block keeps it from aborting the caller. A twin that is fetched in between makes room for a new job.
DECLARE
    later timestamptz := CASE WHEN defer_stage.scheduled_at > now() THEN defer_stage.scheduled_at END;
    twin bigint;
BEGIN
    LOOP
        BEGIN
            RETURN (procrastinate_defer_jobs_v1(ARRAY[ROW(
                stage_queue(stage), stage, priority, NULL, stage || ':' || doc_id, jsonb_build_object('doc_id', doc_id), later
            )::procrastinate_job_to_defer_v1]))[1];
        EXCEPTION WHEN unique_violation THEN
            UPDATE procrastinate_jobs AS job
            SET scheduled_at = CASE WHEN later IS NOT NULL AND job.scheduled_at IS NOT NULL THEN least(job.scheduled_at, later) END
            WHERE job.status = 'todo' AND job.queueing_lock = defer_stage.stage || ':' || defer_stage.doc_id
            RETURNING job.id INTO twin;
            IF FOUND THEN
                RETURN twin;
            END IF;
        END;
    END LOOP;
END;
$$;

CREATE FUNCTION release_due_jobs(at_most integer) RETURNS void LANGUAGE plpgsql AS $$
-- Nobody else sees them before this transaction ends, and then idle workers are told, as procrastinate tells them of a new job.
DECLARE
    released bigint;
    released_queue text;
BEGIN
    FOR released_queue, released IN
        WITH ready AS (
            UPDATE procrastinate_jobs AS j
            SET scheduled_at = NULL
            WHERE j.id = ANY(ARRAY(
                SELECT d.id FROM procrastinate_jobs AS d
                WHERE d.status = 'todo' AND d.scheduled_at <= now()
                ORDER BY d.scheduled_at
                LIMIT at_most
                FOR UPDATE SKIP LOCKED
            ))
            RETURNING j.queue_name, j.id
        )
        SELECT r.queue_name, min(r.id) FROM ready AS r GROUP BY r.queue_name
    LOOP
        PERFORM pg_notify(channel, json_build_object('type', 'job_inserted', 'job_id', released)::text)
        FROM unnest(ARRAY['procrastinate_any_queue_v1', 'procrastinate_queue_v1#' || released_queue]) AS channel;
    END LOOP;
END;
$$;
COMMENT ON FUNCTION release_due_jobs IS 'Lets jobs whose scheduled time has come be fetched, at most so many, and tells idle workers.';

CREATE FUNCTION take_job(queues character varying[], of_user text, first_id bigint, p_worker_id bigint) RETURNS procrastinate_jobs
LANGUAGE plpgsql AS $$
-- first_id, the user's best job as it was just seen, spares looking for it again. If somebody else has it by now, the queue whose first job
-- comes first is tried first. Only the row that is taken is locked, or others would find nothing meanwhile.
DECLARE
    queue character varying;
    found_id bigint;
    job procrastinate_jobs;
BEGIN
    UPDATE procrastinate_jobs AS j SET status = 'doing', worker_id = p_worker_id
    WHERE j.id = (
        SELECT c.id FROM procrastinate_jobs AS c
        WHERE c.id = first_id AND c.status = 'todo' AND c.scheduled_at IS NULL AND c.lock IS NULL
        FOR UPDATE SKIP LOCKED
    )
    RETURNING j.* INTO job;
    IF FOUND THEN
        RETURN job;
    END IF;
    FOR queue IN
        SELECT q.name
        FROM unnest(queues) AS q (name)
        CROSS JOIN LATERAL (
            SELECT j.priority, j.docmill_begun, j.id
            FROM procrastinate_jobs AS j
            WHERE j.status = 'todo' AND j.scheduled_at IS NULL AND j.queue_name = q.name AND j.docmill_user = of_user
            ORDER BY j.priority DESC, j.docmill_begun DESC, j.id
            LIMIT 1
        ) AS first
        ORDER BY first.priority DESC, first.docmill_begun DESC, first.id
    LOOP
        SELECT c.id INTO found_id
        FROM procrastinate_jobs AS c
        WHERE c.status = 'todo' AND c.scheduled_at IS NULL AND c.queue_name = queue AND c.docmill_user = of_user
            -- As procrastinate has it: one job of a lock at a time, in their order.
            AND (c.lock IS NULL OR NOT EXISTS (
                SELECT FROM procrastinate_jobs AS o WHERE o.lock = c.lock AND o.status = 'doing'
            ) AND NOT EXISTS (
                SELECT FROM procrastinate_jobs AS o
                WHERE o.lock = c.lock AND o.status = 'todo' AND (o.priority > c.priority OR o.priority = c.priority AND o.id < c.id)
            ))
        ORDER BY c.priority DESC, c.docmill_begun DESC, c.id
        LIMIT 1
        FOR UPDATE SKIP LOCKED;
        IF FOUND THEN
            UPDATE procrastinate_jobs AS j SET status = 'doing', worker_id = p_worker_id WHERE j.id = found_id RETURNING j.* INTO job;
            RETURN job;
        END IF;
    END LOOP;
    RETURN NULL;
END;
$$;
COMMENT ON FUNCTION take_job IS 'Takes the best waiting job of one user in these queues for a worker; null if none is free. Inside of docmill_fetch_job.';

CREATE FUNCTION take_users_job(
    queues character varying[], of_user text, first_id bigint, p_worker_id bigint, max_documents integer
) RETURNS procrastinate_jobs LANGUAGE plpgsql AS $$
-- Who takes a job of a user with a limit does so alone and counts again, so that the limit holds exactly. Where nothing is taken the lock
-- is given back with the block's savepoint: a fetch that goes on to the next user holds no other lock, so no two wait for each other.
DECLARE
    documents bigint;
    job procrastinate_jobs;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('docmill documents of ' || of_user, 0));
    SELECT count(*) INTO documents FROM procrastinate_jobs AS j
    WHERE j.status = 'doing' AND j.docmill_user = of_user AND stage_queue(j.task_name) IS NOT NULL;
    IF documents < max_documents THEN
        -- Not first_id, which was seen before this waited for the lock: a document that was handed on meanwhile goes before it.
        job := take_job(queues, of_user, NULL, p_worker_id);
    END IF;
    IF job.id IS NULL THEN
        RAISE EXCEPTION 'nothing taken' USING ERRCODE = 'DM001';
    END IF;
    RETURN job;
EXCEPTION WHEN SQLSTATE 'DM001' THEN
    RETURN NULL;
END;
$$;
COMMENT ON FUNCTION take_users_job IS 'As take_job, but null while the user has that many documents in work: stage jobs that were fetched and have not ended.';

CREATE FUNCTION docmill_fetch_job(
    target_queue_names character varying[], p_worker_id bigint, after_user text, others_first boolean, max_documents integer
) RETURNS procrastinate_jobs LANGUAGE plpgsql
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET enable_incremental_sort = off
SET plan_cache_mode = force_generic_plan
AS $$
-- Every statement in here uses its index, also by a plan that was made when the table was empty: hence the settings.
DECLARE
    most_busy_users CONSTANT integer := 50;
    queues character varying[] := target_queue_names;
    job procrastinate_jobs;
    -- Without a collation of their own, which would be handed down to all arguments of take_job and keep it from the index.
    beginning text := coalesce(after_user, '');
    candidate text := beginning;
    until text;
    at_end boolean;
    place integer;
    in_work bigint;
    documents bigint;
    first_id bigint;
    busy text[] := '{}';
    busy_first bigint[] := '{}';
    busy_with bigint[] := '{}';
BEGIN
    -- Most of the time nothing is due, and that costs one look at an index.
    PERFORM FROM procrastinate_jobs AS j WHERE j.status = 'todo' AND j.scheduled_at <= now() ORDER BY j.scheduled_at LIMIT 1;
    IF FOUND THEN
        PERFORM release_due_jobs(1000);
    END IF;
    IF queues IS NULL THEN
        WITH RECURSIVE present (name) AS (
            (
                SELECT j.queue_name FROM procrastinate_jobs AS j
                WHERE j.status = 'todo' AND j.scheduled_at IS NULL
                ORDER BY j.queue_name, j.docmill_user LIMIT 1
            )
            UNION ALL
            SELECT (
                SELECT j.queue_name FROM procrastinate_jobs AS j
                WHERE j.status = 'todo' AND j.scheduled_at IS NULL AND j.queue_name > p.name
                ORDER BY j.queue_name, j.docmill_user LIMIT 1
            ) FROM present AS p WHERE p.name IS NOT NULL
        )
        SELECT array_agg(p.name) INTO queues FROM present AS p WHERE p.name IS NOT NULL;
    END IF;
    -- Nobody's jobs are few: a look whether there is one is cheaper than trying to take it. Those of a priority below 0, re-embedding among
    -- them, have no turn: they are for when no document waits.
    IF others_first AND EXISTS (
        SELECT FROM unnest(queues) AS q (name)
        CROSS JOIN LATERAL (
            SELECT FROM procrastinate_jobs AS j
            WHERE j.status = 'todo' AND j.scheduled_at IS NULL AND j.queue_name = q.name AND j.docmill_user = '' AND j.priority >= 0
            ORDER BY j.priority DESC, j.docmill_begun DESC, j.id
            LIMIT 1
        ) AS waiting
    ) THEN
        job := take_job(queues, '', NULL, p_worker_id);
        IF job.id IS NOT NULL THEN
            RETURN job;
        END IF;
    END IF;
    LOOP
        IF candidate = until COLLATE "C" THEN
            -- The walk began behind this one and has found nobody there.
            candidate := NULL;
        ELSE
            SELECT next.docmill_user, next.id INTO candidate, first_id
            FROM unnest(queues) AS q (name)
            CROSS JOIN LATERAL (
                SELECT j.docmill_user, j.priority, j.docmill_begun, j.id
                FROM procrastinate_jobs AS j
                WHERE j.status = 'todo' AND j.scheduled_at IS NULL AND j.queue_name = q.name AND j.docmill_user > candidate
                ORDER BY j.docmill_user, j.priority DESC, j.docmill_begun DESC, j.id
                LIMIT 1
            ) AS next
            ORDER BY next.docmill_user, next.priority DESC, next.docmill_begun DESC, next.id
            LIMIT 1;
        END IF;
        IF candidate IS NULL AND until IS NULL AND beginning <> '' THEN
            candidate := '';
            until := beginning;
            CONTINUE;
        END IF;
        at_end := candidate IS NULL OR coalesce(candidate > until COLLATE "C", FALSE);
        IF at_end OR cardinality(busy) >= most_busy_users THEN
            FOREACH place IN ARRAY CASE cardinality(busy) WHEN 0 THEN '{}' WHEN 1 THEN '{1}'::integer[] ELSE ARRAY(
                SELECT b.place FROM unnest(busy_with) WITH ORDINALITY AS b (jobs, place) ORDER BY b.jobs, b.place
            ) END LOOP
                IF max_documents = 0 THEN
                    job := take_job(queues, busy[place], busy_first[place], p_worker_id);
                ELSE
                    job := take_users_job(queues, busy[place], busy_first[place], p_worker_id, max_documents);
                END IF;
                IF job.id IS NOT NULL THEN
                    RETURN job;
                END IF;
            END LOOP;
            EXIT WHEN at_end;
            busy := '{}';
            busy_first := '{}';
            busy_with := '{}';
        END IF;
        SELECT count(*), count(*) FILTER (WHERE stage_queue(j.task_name) IS NOT NULL) INTO in_work, documents
        FROM procrastinate_jobs AS j
        WHERE j.status = 'doing' AND j.docmill_user = candidate;
        IF max_documents > 0 AND documents >= max_documents THEN
            CONTINUE;
        ELSIF in_work > 0 THEN
            busy := busy || candidate;
            busy_first := busy_first || first_id;
            busy_with := busy_with || in_work;
            CONTINUE;
        END IF;
        -- Without a limit there is no need for take_users_job, whose block costs a subtransaction.
        IF max_documents = 0 THEN
            job := take_job(queues, candidate, first_id, p_worker_id);
        ELSE
            job := take_users_job(queues, candidate, first_id, p_worker_id, max_documents);
        END IF;
        IF job.id IS NOT NULL THEN
            RETURN job;
        END IF;
    END LOOP;
    RETURN take_job(queues, '', NULL, p_worker_id);
END;
$$;
COMMENT ON FUNCTION docmill_fetch_job IS
    'Takes the job whose turn it is, as procrastinate_fetch_job_v2 does otherwise; all null if there is none. after_user: who was served last. others_first: whether jobs that are nobody''s, of a priority of 0 or more, go before. max_documents: in work at once per user, 0 for any number.';

CALL pin_search_path();
