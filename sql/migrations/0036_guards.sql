-- What the tables and functions still let through, and what could keep a caller for ever.
--
-- A document is advanced only by whoever works on it, taken up only under a new claim, and keeps its name and its user. A batch takes in
-- documents, summaries and archives of its own user alone, whoever writes them; the foreign keys, which look past row-level security, ask for
-- no user. The audit trail cannot be emptied, an application writes to it under no time or number of its own choice, and one
-- odd number in it breaks no view. A job that waits already, but cannot be seen, is no reason to look for it without an end.

-- Documents.

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
    IF NEW.doc_id <> OLD.doc_id OR NEW.user_id <> OLD.user_id THEN
        -- Its passages, events and jobs name both.
        RAISE EXCEPTION 'document %: its doc_id and its user_id stay as they are', OLD.doc_id USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.version > OLD.version THEN
        allowed := NEW.version = OLD.version + 1 AND NEW.milestone = 'uploaded' AND NEW.state = 'queued' AND NEW.claim > OLD.claim;
    ELSE
        allowed := NEW.version = OLD.version AND NEW.milestone >= OLD.milestone AND NEW.claim >= OLD.claim AND (
            NEW.milestone = OLD.milestone
            OR OLD.state = 'working'
            -- As resume_extraction does with the new version that has everything but the extraction, and perhaps vectors.
            OR NEW.milestone IN ('chunks_stored', 'embeddings_stored') AND OLD.milestone = 'uploaded' AND OLD.state = 'queued' AND NEW.state = 'queued'
                AND OLD.served_version = OLD.version - 1 AND OLD.raw_extraction ? 'failure'
        ) AND (
            NEW.state = OLD.state
            OR CASE OLD.state
                WHEN 'queued' THEN NEW.state IN ('working', 'failed', 'cancelled')
                WHEN 'working' THEN TRUE
                WHEN 'retrying' THEN NEW.state IN ('working', 'queued', 'failed', 'cancelled')
                WHEN 'failed' THEN NEW.state IN ('queued', 'cancelled')
                WHEN 'duplicate' THEN NEW.state = 'queued'
                WHEN 'cancelled' THEN NEW.state = 'queued'
                ELSE FALSE
            END AND (NEW.state <> 'working' OR NEW.claim > OLD.claim)
        );
    END IF;
    IF NOT allowed THEN
        RAISE EXCEPTION 'document %: version % % % claim % cannot become version % % % claim %', NEW.doc_id,
            OLD.version, OLD.milestone, OLD.state, OLD.claim, NEW.version, NEW.milestone, NEW.state, NEW.claim
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
COMMENT ON FUNCTION refuse_invalid_transition IS
    'Within a version milestones only go forward, under a claim; versions go up by one, and a document keeps its name and its user. Anything else is refused.';

CREATE OR REPLACE TRIGGER file_extractions_transition
    BEFORE INSERT OR UPDATE OF milestone, state, version, claim, doc_id, user_id ON file_extractions
    FOR EACH ROW EXECUTE FUNCTION refuse_invalid_transition();

-- Not validated, because to look through what is there would keep writers waiting; nothing has ever written such a row.
ALTER TABLE file_extractions ADD CONSTRAINT file_extractions_duplicate_check
    CHECK (state <> 'duplicate' OR duplicate_of IS NOT NULL) NOT VALID;

-- Batches.

CREATE FUNCTION refuse_others_batch() RETURNS trigger LANGUAGE plpgsql AS $$
-- No foreign key on batch and user: it wants a second unique index on processing_jobs, which ON CONFLICT (batch_id) does not watch, and two
-- that begin a batch at once would meet there in an error.
BEGIN
    IF NOT EXISTS (SELECT FROM processing_jobs AS b WHERE b.batch_id = NEW.batch_id AND b.user_id = NEW.user_id) THEN
        RAISE EXCEPTION 'there is no batch "%" of user "%"', NEW.batch_id, NEW.user_id USING ERRCODE = 'foreign_key_violation';
    END IF;
    RETURN NEW;
END;
$$;
COMMENT ON FUNCTION refuse_others_batch IS 'What belongs to a batch belongs to its user.';

CREATE TRIGGER file_extractions_of_batch BEFORE INSERT OR UPDATE OF batch_id, user_id ON file_extractions
    FOR EACH ROW WHEN (NEW.batch_id IS NOT NULL) EXECUTE FUNCTION refuse_others_batch();
CREATE TRIGGER run_summaries_of_batch BEFORE INSERT OR UPDATE OF batch_id, user_id ON run_summaries
    FOR EACH ROW EXECUTE FUNCTION refuse_others_batch();
CREATE TRIGGER batch_archives_of_batch BEFORE INSERT OR UPDATE OF batch_id, user_id ON batch_archives
    FOR EACH ROW EXECUTE FUNCTION refuse_others_batch();

-- The audit trail.

CREATE TRIGGER document_events_not_emptied BEFORE TRUNCATE ON document_events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_deletion();

-- All columns to read, and all but id and at to write. With a list for both, because secure_relation compares what is granted on the table.
UPDATE relation_rights AS r
SET app = format('SELECT (%s), INSERT (%s)', c.all_columns, c.written)
FROM (
    SELECT string_agg(a.attname, ', ' ORDER BY a.attnum) AS all_columns,
        string_agg(a.attname, ', ' ORDER BY a.attnum) FILTER (WHERE a.attname NOT IN ('id', 'at')) AS written
    FROM pg_attribute AS a
    WHERE a.attrelid = 'document_events'::regclass AND a.attnum > 0 AND NOT a.attisdropped
) AS c
WHERE r.relation = 'document_events';

CREATE OR REPLACE FUNCTION event_id_since(since timestamptz) RETURNS bigint LANGUAGE plpgsql STABLE SECURITY DEFINER AS $$
-- Ids and times go up together, but for moments. Halving takes one look into the primary key a step, whatever lies between. It tells
-- nothing but a number, so it sees all events also for those who may see few. A number that the sequence has not given counts for nothing:
-- one old event at the end of all numbers would have all before it taken for older, and the last of them has no successor.
DECLARE
    low bigint;
    high bigint;
    middle bigint;
    found record;
BEGIN
    SELECT greatest(min(e.id), 0), least(max(e.id), (SELECT s.last_value FROM document_events_id_seq AS s)) + 1 INTO low, high
    FROM document_events AS e;
    WHILE low < high LOOP
        middle := low + (high - low) / 2;
        SELECT e.id, e.at INTO found FROM document_events AS e WHERE e.id >= middle ORDER BY e.id LIMIT 1;
        IF found.at < since THEN
            low := least(found.id, high - 1) + 1;
        ELSE
            high := middle;
        END IF;
    END LOOP;
    RETURN coalesce(low, 0);
END;
$$;

-- Jobs that wait already.

CREATE FUNCTION adopt_job(doc_id text, stage text) RETURNS void LANGUAGE sql SECURITY DEFINER AS $$
    UPDATE procrastinate_jobs AS j SET docmill_user = d.user_id
    FROM file_extractions AS d
    WHERE d.doc_id = adopt_job.doc_id AND d.user_id = acting_user()
        AND j.status = 'todo' AND j.queueing_lock = adopt_job.stage || ':' || adopt_job.doc_id AND j.docmill_user = '';
$$;
COMMENT ON FUNCTION adopt_job IS
    'Gives a job that was deferred before its document was there, and so is nobody''s, to the document''s user, who could not see it otherwise. Only for that user''s own documents.';

CREATE OR REPLACE FUNCTION defer_stage(doc_id text, stage text, priority integer, scheduled_at timestamptz DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql AS $$
-- A twin that already waits serves as well, if it is made to wait no longer than this one would, so the unique queueing lock is no error
-- here. The block keeps it from aborting the caller. A twin that is fetched in between makes room for a new job. One that came after this
-- transaction's snapshot can neither be taken nor be replaced.
DECLARE
    later timestamptz := CASE WHEN defer_stage.scheduled_at > now() THEN defer_stage.scheduled_at END;
    twin bigint;
    tries_left integer := 10;
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
        tries_left := tries_left - 1;
        IF tries_left = 0 THEN
            RAISE EXCEPTION 'document %: its job for % waits already and cannot be seen from this transaction; try again', doc_id, stage
                USING ERRCODE = 'serialization_failure';
        END IF;
        PERFORM adopt_job(doc_id, stage);
    END LOOP;
END;
$$;

CREATE OR REPLACE FUNCTION defer_unpacking(archive_id bigint, scheduled_at timestamptz DEFAULT NULL) RETURNS bigint LANGUAGE plpgsql AS $$
-- As defer_stage does: a twin that already waits serves as well, if it is made to wait no longer than this one would.
DECLARE
    twin bigint;
    wanted integer := (SELECT a.priority FROM batch_archives AS a WHERE a.id = archive_id);
    tries_left integer := 10;
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
        tries_left := tries_left - 1;
        IF tries_left = 0 THEN
            RAISE EXCEPTION 'archive %: its job waits already and cannot be seen from this transaction; try again', archive_id
                USING ERRCODE = 'serialization_failure';
        END IF;
    END LOOP;
END;
$$;

CALL pin_search_path();
