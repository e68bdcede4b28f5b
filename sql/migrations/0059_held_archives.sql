-- An application may cancel, submit anew or delete zip batches in a transaction that it keeps open. What unpacks an archive waited for the
-- archive's row as long as that lasted, with a worker's place and one of its connections: a few such archives stopped a worker. Now each step
-- gives up after a moment (lock_not_available), and the archive is looked at again later, by a job that is deferred without its row.

-- A beginning has nothing in hand yet. It waits less long, because it comes again and again while the transaction lasts, for each archive.
ALTER FUNCTION begin_unpacking(bigint, integer) SET lock_timeout = '20ms';
ALTER FUNCTION record_listing(bigint, text, integer, integer, bigint) SET lock_timeout = '1s';
ALTER FUNCTION end_archive(bigint, text, text) SET lock_timeout = '1s';
ALTER FUNCTION put_off_archive(bigint, double precision, text, boolean) SET lock_timeout = '1s';

CREATE FUNCTION put_off_held_archive(archive_id bigint) RETURNS void LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
-- Soon where it has just been worked on, as with documents in the queue that are held; never waits for the archive's row.
DECLARE
    seconds double precision := (
        SELECT least(10, greatest(1, extract(epoch FROM now() - a.updated_at) / 4)) FROM batch_archives AS a
        WHERE a.id = archive_id AND a.state IN ('waiting', 'unpacking')
    );
BEGIN
    IF seconds IS NULL THEN
        RETURN;
    END IF;
    -- Where it is something else that is held, as the batch: what was begun has come to an orderly end.
    UPDATE batch_archives AS a SET attempts = 0, error_message = NULL
    WHERE a.id = (SELECT f.id FROM batch_archives AS f WHERE f.id = archive_id AND f.attempts > 0 FOR NO KEY UPDATE SKIP LOCKED)
        AND a.state IN ('waiting', 'unpacking');
    PERFORM defer_unpacking(archive_id, now() + make_interval(secs => seconds));
END;
$$;
COMMENT ON FUNCTION put_off_held_archive IS
    'Has an archive that somebody''s open transaction holds looked at again in 1 to 10 seconds, without waiting for its row.';

-- A file that is noted for removal was waited for in the same way, where an open transaction had noted it too.
CREATE FUNCTION note_file_unless_held(path text, doc_id text) RETURNS boolean LANGUAGE plpgsql SET lock_timeout = '20ms' AS $$
BEGIN
    INSERT INTO files_to_remove AS n (path, doc_id) VALUES (note_file_unless_held.path, note_file_unless_held.doc_id)
    ON CONFLICT ON CONSTRAINT files_to_remove_pkey DO NOTHING;
    RETURN TRUE;
EXCEPTION WHEN lock_not_available THEN
    RETURN FALSE;
END;
$$;
COMMENT ON FUNCTION note_file_unless_held IS
    'Notes a stored file for removal unless it is noted already; false where an open transaction is about to, or about to refer to the file.';

CALL pin_search_path();
