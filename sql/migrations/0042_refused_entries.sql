-- A dead letter of an archive's entry that has no file is not requeued: there is nothing to work on, and its reason would be lost.

CREATE FUNCTION is_refused_entry(d file_extractions) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT d.content_sha256 IS NULL AND d.file_path ~ '/[0-9a-f]{64}/refused$';
$$;
COMMENT ON FUNCTION is_refused_entry IS 'Whether a document stands for an entry of an archive that could not be unpacked, so that there is no file of it.';

CREATE OR REPLACE FUNCTION requeue_dead_letter(id bigint) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    letter dead_letters := lock_dead_letter(id);
    d file_extractions;
BEGIN
    SELECT f.* INTO d FROM file_extractions AS f WHERE f.doc_id = letter.doc_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'document "%" of dead letter % no longer exists; the letter can only be discarded', letter.doc_id, letter.id
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    IF d.version <> letter.version OR d.state <> 'failed' THEN
        RAISE EXCEPTION 'dead letter % is of version % of document "%", which is now % at version %',
            letter.id, letter.version, d.doc_id, d.state, d.version
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    IF is_refused_entry(d) THEN
        RAISE EXCEPTION 'document "%" has no file, because it could not be unpacked; submit a repaired archive (%)', d.doc_id, d.error_message
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    RETURN resume_failed_document(d, letter);
END;
$$;
COMMENT ON FUNCTION requeue_dead_letter IS
    'Takes a failed document up again at the stage that failed and returns that stage; refused for an archive''s entry that has no file. Then, if it has a batch: SELECT reopen_batch(batch_id).';

CREATE OR REPLACE FUNCTION requeue_dead_letters(
    error_type document_error_type DEFAULT NULL, stage text DEFAULT NULL, batch_id text DEFAULT NULL, user_id text DEFAULT NULL,
    max_count integer DEFAULT 1000, up_to_id bigint DEFAULT NULL
) RETURNS integer LANGUAGE plpgsql AS $$
-- Documents that somebody else holds are passed over rather than waited for: this transaction locks many, and whoever else does so may
-- take them in another order.
DECLARE
    candidate record;
    letter dead_letters;
    d file_extractions;
    done integer := 0;
BEGIN
    FOR candidate IN
        SELECT f.id AS document, l.id AS letter
        FROM dead_letters AS l
        JOIN file_extractions AS f ON f.doc_id = l.doc_id AND f.version = l.version AND f.state = 'failed' AND NOT is_refused_entry(f)
        WHERE l.resolved_at IS NULL
            AND (requeue_dead_letters.error_type IS NULL OR l.error_type = requeue_dead_letters.error_type)
            AND (requeue_dead_letters.stage IS NULL OR l.stage = requeue_dead_letters.stage)
            AND (requeue_dead_letters.batch_id IS NULL OR f.batch_id = requeue_dead_letters.batch_id)
            AND (requeue_dead_letters.user_id IS NULL OR l.user_id = requeue_dead_letters.user_id)
            AND (up_to_id IS NULL OR l.id <= up_to_id)
        ORDER BY f.id
    LOOP
        EXIT WHEN done >= max_count;
        SELECT f.* INTO d FROM file_extractions AS f WHERE f.id = candidate.document FOR UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND;
        SELECT l.* INTO letter FROM dead_letters AS l WHERE l.id = candidate.letter;
        IF letter.resolved_at IS NULL AND d.state = 'failed' AND d.version = letter.version THEN
            PERFORM resume_failed_document(d, letter);
            done := done + 1;
        END IF;
    END LOOP;
    RETURN done;
END;
$$;
COMMENT ON FUNCTION requeue_dead_letters IS
    'Requeues open dead letters that match all filters given, at most max_count (null: all), and returns how many; call it until it returns 0. Entries of archives that have no file are passed over. Then SELECT reopen_batches().';

CALL pin_search_path();
