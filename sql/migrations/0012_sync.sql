-- Folder sync: what was last seen of each file, so that unchanged ones need not be read, and documents whose place another one takes.
--
-- A moved file is a new document and an old one. The old one answers searches until the new one is complete; only then is it deleted, by
-- whichever reconciler sees it first. Nobody has to wait for that, and a sync that dies half way has lost nothing.

CREATE TABLE folder_files (
    batch_id text NOT NULL REFERENCES processing_jobs (batch_id) ON DELETE CASCADE,
    path_id uuid NOT NULL,
    seen_as text NOT NULL,
    content_sha256 text NOT NULL CHECK (content_sha256 ~ '^[0-9a-f]{64}$'),
    seen_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (batch_id, path_id)
);
COMMENT ON TABLE folder_files IS 'What a file of a synced folder looked like when it was read: as long as it looks so, it need not be read again. Only a shortcut; may be emptied.';
COMMENT ON COLUMN folder_files.batch_id IS 'The folder''s batch.';
COMMENT ON COLUMN folder_files.path_id IS 'UUIDv5 of user and absolute path: the doc_id of a document at that path.';
COMMENT ON COLUMN folder_files.seen_as IS 'Size in bytes, modification and change time in nanoseconds, and inode, with spaces between them.';
COMMENT ON COLUMN folder_files.content_sha256 IS 'SHA-256 of what was read, lowercase hex.';
COMMENT ON COLUMN folder_files.seen_at IS 'When it was read.';

CREATE INDEX file_extractions_replaced ON file_extractions (id) WHERE replaced_by IS NOT NULL;

CREATE FUNCTION keep_document() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.replaced_by := NULL;
    RETURN NEW;
END;
$$;
COMMENT ON FUNCTION keep_document IS 'A document that is submitted again, with new content or in a new run, is there again: nothing takes its place.';

CREATE TRIGGER file_extractions_kept BEFORE UPDATE OF version, run_id ON file_extractions
    FOR EACH ROW WHEN (OLD.replaced_by IS NOT NULL AND (NEW.version <> OLD.version OR NEW.run_id IS DISTINCT FROM OLD.run_id))
    EXECUTE FUNCTION keep_document();

CREATE FUNCTION is_replaced(old file_extractions) RETURNS boolean LANGUAGE sql STABLE AS $$
    -- The same content, so that a successor whose new content has not been submitted yet, or has changed since, does not count.
    SELECT EXISTS (
        SELECT FROM file_extractions AS d
        LEFT JOIN file_extractions AS original ON original.doc_id = d.duplicate_of
        WHERE d.doc_id = old.replaced_by AND d.user_id = old.user_id AND d.content_sha256 = old.content_sha256
            AND (d.state = 'complete' OR (
                d.state = 'duplicate' AND original.doc_id <> old.doc_id AND original.state = 'complete'
                AND original.content_sha256 = old.content_sha256 AND original.replaced_by IS NULL
            ))
    );
$$;
COMMENT ON FUNCTION is_replaced IS 'Whether the document that takes this one''s place holds the same content and is complete, or is a duplicate of a third one that is and stays.';

CREATE FUNCTION delete_replaced_document(doc_id text) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    old file_extractions;
    locked integer;
BEGIN
    -- Both, in the order of ids, so that neither changes between the look and the deletion.
    PERFORM FROM file_extractions AS f
    WHERE f.doc_id = delete_replaced_document.doc_id
        OR f.doc_id = (SELECT g.replaced_by FROM file_extractions AS g WHERE g.doc_id = delete_replaced_document.doc_id)
    ORDER BY f.id FOR UPDATE SKIP LOCKED;
    GET DIAGNOSTICS locked = ROW_COUNT;
    IF locked < 2 THEN
        RETURN NULL;
    END IF;
    SELECT f.* INTO old FROM file_extractions AS f WHERE f.doc_id = delete_replaced_document.doc_id;
    IF NOT is_replaced(old) THEN
        RETURN NULL;
    END IF;
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, event, claim, detail)
    VALUES (old.doc_id, old.version, old.batch_id, old.user_id, old.correlation_id, 'replaced', old.claim,
        jsonb_build_object('replaced_by', old.replaced_by, 'source_path', old.source_path));
    RETURN CASE WHEN delete_document(old.doc_id) THEN 'replaced' END;
END;
$$;
COMMENT ON FUNCTION delete_replaced_document IS 'Deletes a document once the one that takes its place is complete with the same content; null if it is too early or somebody works on either.';

CALL pin_search_path();
