-- Where a sync meets archives, and a search meets a version that is not served yet.
--
-- A sync leaves alone what was cancelled and brings back what was deleted by hand, but of what lies in archives it did neither: each run
-- unpacks all archives anew, which took up cancelled entries, and an entry that had been deleted stayed away until something else made a run.
-- And a filter by type went by what a new version had been found to be, so that it missed the old one that searches still see.

ALTER TABLE batch_archives ADD COLUMN keeps_cancelled boolean NOT NULL DEFAULT FALSE;
COMMENT ON COLUMN batch_archives.keeps_cancelled IS 'Whether its entries that are cancelled stay so while their content is the same, as in a sync.';

DROP FUNCTION add_archive(text, uuid, text, text, text, text, text, integer, bigint, integer);
CREATE FUNCTION add_archive(
    batch_id text, run_id uuid, user_id text, entry_path text, source_prefix text, file_path text, content_sha256 text, priority integer,
    parent_id bigint, lock_timeout_ms integer, keeps_cancelled boolean DEFAULT FALSE
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
        batch_id, run_id, user_id, parent_id, entry_path, source_prefix, file_path, content_sha256, depth, priority, keeps_cancelled
    ) VALUES (
        add_archive.batch_id, add_archive.run_id, add_archive.user_id, add_archive.parent_id, add_archive.entry_path,
        add_archive.source_prefix, add_archive.file_path, add_archive.content_sha256, coalesce(parent.depth, 0) + 1, add_archive.priority,
        coalesce(parent.keeps_cancelled, add_archive.keeps_cancelled)
    ) ON CONFLICT (run_id, entry_path) DO NOTHING
    RETURNING a.id INTO made;
    IF made IS NOT NULL THEN
        PERFORM defer_unpacking(made);
    END IF;
    RETURN made;
END;
$$;
COMMENT ON FUNCTION add_archive IS
    'Takes an archive into a run with the job that unpacks it and returns its id; null if the run has it already. One inside of another keeps what is cancelled as that one does.';

CREATE FUNCTION run_lacks_deleted(batch processing_jobs) RETURNS boolean LANGUAGE sql STABLE AS $$
    -- The deletion must be later than the run, so that one run for it is enough, whatever else it may lack.
    SELECT batch.status <> 'cancelled' AND NOT EXISTS (
        SELECT FROM batch_archives AS a WHERE a.run_id = batch.run_id AND a.state IN ('waiting', 'unpacking')
    ) AND (
        SELECT count(*) FROM file_extractions AS d WHERE d.batch_id = batch.batch_id AND d.run_id = batch.run_id
    ) < batch.direct_files + (
        SELECT coalesce(sum(CASE a.state WHEN 'unpacked' THEN a.entry_count ELSE a.unpacked_count END)
            - count(*) FILTER (WHERE a.parent_id IS NOT NULL), 0)
        FROM batch_archives AS a WHERE a.run_id = batch.run_id
    ) AND EXISTS (
        SELECT FROM document_events AS e
        WHERE e.id >= event_id_since(batch.run_started_at - interval '1 minute') AND e.event = 'deleted' AND e.at >= batch.run_started_at
            AND e.batch_id = batch.batch_id AND NOT EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = e.doc_id)
    );
$$;
COMMENT ON FUNCTION run_lacks_deleted IS
    'Whether the current run of a batch, unpacked as far as can be, has fewer documents than it was given because some were deleted since.';

ALTER TABLE file_extractions ADD COLUMN served_file_type text;
COMMENT ON COLUMN file_extractions.served_file_type IS
    'Type of the version that searches see, while a newer one is known to be of another type, or has failed as such; else null, and file_type holds.';

CREATE FUNCTION keep_served_type() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.served_file_type := CASE
        WHEN NEW.served_version = OLD.served_version THEN nullif(coalesce(OLD.served_file_type, OLD.file_type), NEW.file_type)
    END;
    RETURN NEW;
END;
$$;
COMMENT ON FUNCTION keep_served_type IS 'Keeps by what type searches find the version that is served, until another one is.';
CREATE TRIGGER file_extractions_served_type BEFORE UPDATE ON file_extractions
    FOR EACH ROW WHEN (
        OLD.served_version IS NOT NULL AND (NEW.file_type IS DISTINCT FROM OLD.file_type OR OLD.served_file_type IS NOT NULL)
    )
    EXECUTE FUNCTION keep_served_type();

-- Said twice, because what it compares a column with is what the planner can count on.
CREATE OR REPLACE FUNCTION search_filter(user_id text, batch_id text, file_type text, metadata jsonb) RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
RETURN concat(
    'true',
    ' AND c.user_id = ' || quote_literal(confined_to()),
    ' AND c.user_id = ' || quote_literal(user_id),
    ' AND c.doc_id IN (SELECT d.doc_id FROM file_extractions AS d WHERE true' || nullif(concat(
        ' AND d.batch_id = ' || quote_literal(batch_id),
        ' AND (d.file_type = ' || quote_literal(file_type) || ' AND d.served_file_type IS NULL OR d.served_file_type = '
            || quote_literal(file_type) || ')',
        ' AND d.metadata @> ' || quote_literal(metadata) || '::jsonb'
    ), '') || ')'
);

CALL pin_search_path();
