-- Zip archives in batches: which there are, how far each has been unpacked, and what became of it. A batch cannot end before they have.

CREATE TABLE batch_archives (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    batch_id text NOT NULL REFERENCES processing_jobs (batch_id) ON DELETE CASCADE,
    run_id uuid NOT NULL,
    user_id text NOT NULL,
    parent_id bigint REFERENCES batch_archives (id) ON DELETE CASCADE,
    entry_path text NOT NULL,
    source_prefix text NOT NULL,
    file_path text NOT NULL,
    content_sha256 text CHECK (content_sha256 ~ '^[0-9a-f]{64}$'),
    depth integer NOT NULL DEFAULT 1 CHECK (depth >= 1),
    state text NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'unpacking', 'unpacked', 'failed', 'cancelled')),
    entry_count integer CHECK (entry_count >= 0),
    unpacked_count integer NOT NULL DEFAULT 0 CHECK (unpacked_count >= 0),
    skipped_count integer NOT NULL DEFAULT 0 CHECK (skipped_count >= 0),
    unpacked_bytes bigint CHECK (unpacked_bytes >= 0),
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    retry_count integer NOT NULL DEFAULT 0 CHECK (retry_count >= 0),
    requeue_count integer NOT NULL DEFAULT 0 CHECK (requeue_count >= 0),
    priority integer NOT NULL DEFAULT 0,
    error_message text,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    ended_at timestamptz,
    UNIQUE (run_id, entry_path),
    CHECK ((state IN ('unpacked', 'failed', 'cancelled')) = (ended_at IS NOT NULL)),
    CHECK (state <> 'failed' OR error_message IS NOT NULL)
);
COMMENT ON TABLE batch_archives IS 'Zip archives of a batch''s runs: the batch''s own, those in its folder, and those inside of archives.';
COMMENT ON COLUMN batch_archives.id IS 'Surrogate key.';
COMMENT ON COLUMN batch_archives.batch_id IS 'The batch.';
COMMENT ON COLUMN batch_archives.run_id IS 'The run of the batch.';
COMMENT ON COLUMN batch_archives.user_id IS 'Whose batch it is.';
COMMENT ON COLUMN batch_archives.parent_id IS 'The archive that it was found in; null for one that lies in no other.';
COMMENT ON COLUMN batch_archives.entry_path IS 'Path of the archive inside the batch, with a slash at its end; empty for the zip that is the batch. Its entries'' paths begin with it.';
COMMENT ON COLUMN batch_archives.source_prefix IS 'What the source_path of its entries'' documents begins with.';
COMMENT ON COLUMN batch_archives.file_path IS 'The stored archive, relative to the storage base path.';
COMMENT ON COLUMN batch_archives.content_sha256 IS 'SHA-256 of the stored archive, lowercase hex; null until it is unpacked where the submitter did not know it.';
COMMENT ON COLUMN batch_archives.depth IS '1 for an archive that lies in no other.';
COMMENT ON COLUMN batch_archives.state IS 'waiting, unpacking, unpacked, failed or cancelled.';
COMMENT ON COLUMN batch_archives.entry_count IS 'Files in it, archives among them, without the skipped ones; null until it has been opened.';
COMMENT ON COLUMN batch_archives.unpacked_count IS 'Files of it that have been submitted, or refused with a reason, so far.';
COMMENT ON COLUMN batch_archives.skipped_count IS 'Folders, hidden and system files.';
COMMENT ON COLUMN batch_archives.unpacked_bytes IS 'Size of its files when unpacked, as the archive declares it; null until it has been opened.';
COMMENT ON COLUMN batch_archives.attempts IS 'Times that unpacking was begun since it last got on; those that came to an orderly end do not count.';
COMMENT ON COLUMN batch_archives.retry_count IS 'Times that unpacking failed, for a reason that can pass, since it last got on.';
COMMENT ON COLUMN batch_archives.requeue_count IS 'Times that its job was lost before any worker began it, since it last got on.';
COMMENT ON COLUMN batch_archives.priority IS 'Priority of its documents.';
COMMENT ON COLUMN batch_archives.error_message IS 'Why it could not be unpacked, or what held it up last, in plain words.';
COMMENT ON COLUMN batch_archives.created_at IS 'When it was submitted or found.';
COMMENT ON COLUMN batch_archives.updated_at IS 'When this row last changed.';
COMMENT ON COLUMN batch_archives.ended_at IS 'When it was unpacked, failed or cancelled.';
CREATE INDEX batch_archives_parent ON batch_archives (parent_id) WHERE parent_id IS NOT NULL;
CREATE INDEX batch_archives_batch ON batch_archives (batch_id);
CREATE INDEX batch_archives_open ON batch_archives (id) WHERE state IN ('waiting', 'unpacking');

ALTER TABLE processing_jobs ADD COLUMN content_sha256 text CHECK (content_sha256 ~ '^[0-9a-f]{64}$');
ALTER TABLE processing_jobs ADD COLUMN direct_files integer NOT NULL DEFAULT 0 CHECK (direct_files >= 0);
UPDATE processing_jobs SET direct_files = total_files;
COMMENT ON COLUMN processing_jobs.direct_files IS 'Files of the current run that lie in no archive; total_files adds those in archives as these are opened.';
COMMENT ON COLUMN processing_jobs.content_sha256 IS 'SHA-256 of the zip of the current run, lowercase hex; null for a folder or a list.';

CREATE PROCEDURE pin_search_path() LANGUAGE plpgsql AS $$
-- As 0005_search_path did for the functions that there were then.
DECLARE
    ours regprocedure;
BEGIN
    FOR ours IN
        SELECT p.oid
        FROM pg_proc AS p
        WHERE p.pronamespace = current_schema()::regnamespace AND p.prokind = 'f' AND p.prosqlbody IS NULL
            AND p.prolang IN (SELECT l.oid FROM pg_language AS l WHERE l.lanname IN ('sql', 'plpgsql'))
            AND p.proname NOT LIKE 'procrastinate\_%'
            AND pg_has_role(p.proowner, 'USAGE')
            AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = p.oid AND d.deptype = 'e')
            AND NOT coalesce(array_to_string(p.proconfig, ',') LIKE '%search_path=%', FALSE)
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path FROM CURRENT', ours);
    END LOOP;
END;
$$;
COMMENT ON PROCEDURE pin_search_path IS 'Lets every function of docmill find what it names whatever the caller''s search_path is. Each migration that makes functions ends with it.';
