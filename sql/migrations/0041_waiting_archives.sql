-- A batch is not failed as stalled while its archive only waits for its turn: the job that goes on with it may stand behind a long queue.

CREATE FUNCTION waits_to_be_unpacked(archive_id bigint) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (SELECT FROM procrastinate_jobs AS j WHERE j.status = 'todo' AND j.queueing_lock = 'unpack:' || archive_id);
$$;
COMMENT ON FUNCTION waits_to_be_unpacked IS 'Whether the job that begins an archive, or goes on with it, waits for a worker or for its time.';

CREATE OR REPLACE FUNCTION stall_of(batch processing_jobs, timeout_seconds double precision, undisturbed_seconds double precision) RETURNS text
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
    SELECT count(*) FILTER (WHERE a.state = 'unpacking' AND NOT a.waits) AS unpacking,
        count(*) FILTER (WHERE a.state = 'waiting' OR a.state = 'unpacking' AND a.waits) AS waiting, max(a.updated_at) AS latest INTO archives
    FROM (
        SELECT r.state, r.updated_at, r.state = 'unpacking' AND waits_to_be_unpacked(r.id) AS waits
        FROM batch_archives AS r
        WHERE r.run_id = batch.run_id
    ) AS a;
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

CALL pin_search_path();
