-- Deleting a batch removes the archives that were stored for it, and no others: a zip that was submitted from SQL where it lay is its
-- submitter's, and the path given there may be that of another batch's archive. The note of a document's file names the document, so that
-- whoever removes it can tell; one of an archive's cannot, and is written only where the file lies in the folder of its own.

CREATE FUNCTION is_stored_archive(file_path text, batch_id text, entry_path text) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT split_part(is_stored_archive.file_path, '/', -2)
        = encode(sha256(convert_to(E'\n' || is_stored_archive.batch_id || E'\n' || is_stored_archive.entry_path, 'UTF8')), 'hex');
$$;
COMMENT ON FUNCTION is_stored_archive IS
    'Whether a file lies in the folder that docmill stores an archive of a batch in; entry_path is empty for the zip that is the batch.';

-- As before, but for which files are noted.
CREATE OR REPLACE FUNCTION delete_batch(batch_id text, lock_timeout_ms integer DEFAULT 5000) RETURNS integer
LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
-- Documents first, then the batch, then the documents that were submitted meanwhile: while the batch is locked like this, none can be.
#variable_conflict use_column
DECLARE
    batch processing_jobs;
    done integer;
BEGIN
    PERFORM set_config('lock_timeout', delete_batch.lock_timeout_ms || 'ms', TRUE);
    done := delete_documents(delete_batch.batch_id, NULL, delete_batch.lock_timeout_ms);
    SELECT b.* INTO batch FROM processing_jobs AS b WHERE b.batch_id = delete_batch.batch_id FOR UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    done := done + delete_documents(delete_batch.batch_id, NULL, delete_batch.lock_timeout_ms);
    PERFORM note_file(a.file_path)
    FROM batch_archives AS a WHERE a.batch_id = batch.batch_id AND is_stored_archive(a.file_path, a.batch_id, a.entry_path);
    PERFORM note_file(batch.zip_path) WHERE is_stored_archive(batch.zip_path, batch.batch_id, '');
    DELETE FROM processing_jobs AS b WHERE b.id = batch.id;
    RETURN done;
END;
$$;

COMMENT ON TABLE files_to_remove IS
    'Files of deleted documents and batches. Each goes once nobody can need it any more, if docmill has stored it itself; else the note goes alone.';

CALL pin_search_path();
