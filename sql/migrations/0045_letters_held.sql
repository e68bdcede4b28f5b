-- Who takes up or puts away a dead letter waits five seconds for a transaction that holds its document, as with all else that changes one. And
-- requeue_document speaks of a last dead letter only where there is one.

CREATE OR REPLACE FUNCTION lock_dead_letter(letter_id bigint) RETURNS dead_letters LANGUAGE plpgsql SET lock_timeout = '5s' AS $$
DECLARE
    letter dead_letters;
BEGIN
    SELECT l.* INTO letter FROM dead_letters AS l WHERE l.id = letter_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no dead letter %', coalesce(letter_id::text, 'null') USING ERRCODE = 'no_data_found';
    END IF;
    BEGIN
        PERFORM FROM file_extractions AS f WHERE f.doc_id = letter.doc_id FOR UPDATE;
    EXCEPTION WHEN lock_not_available THEN
        RAISE EXCEPTION 'another transaction holds document "%" of dead letter %; try again once it has ended', letter.doc_id, letter.id
            USING ERRCODE = 'lock_not_available';
    END;
    -- A statement of its own: it sees what was done to the letter while the one before waited for the lock.
    SELECT l.* INTO letter FROM dead_letters AS l WHERE l.id = letter_id;
    IF letter.resolved_at IS NOT NULL THEN
        RAISE EXCEPTION 'dead letter % (document "%", version %) was % at %', letter.id, letter.doc_id, letter.version,
            CASE letter.resolution
                WHEN 'superseded' THEN 'superseded by new content'
                WHEN 'deleted' THEN 'closed because the document was deleted'
                ELSE letter.resolution
            END, letter.resolved_at
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    RETURN letter;
END;
$$;
COMMENT ON FUNCTION lock_dead_letter IS
    'Locks the document of an open dead letter and returns the letter; an error if the number is unknown, the letter resolved, or somebody holds the document for more than five seconds.';

CREATE OR REPLACE FUNCTION requeue_document(doc_id text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    letter dead_letters;
    known file_extractions;
BEGIN
    SELECT l.* INTO letter FROM dead_letters AS l WHERE l.doc_id = requeue_document.doc_id ORDER BY l.id DESC LIMIT 1;
    IF letter.id IS NOT NULL AND letter.resolved_at IS NULL THEN
        RETURN requeue_dead_letter(letter.id);
    END IF;
    SELECT f.* INTO known FROM file_extractions AS f WHERE f.doc_id = requeue_document.doc_id;
    IF known.id IS NULL THEN
        RAISE EXCEPTION 'there is no document "%"', requeue_document.doc_id USING ERRCODE = 'no_data_found';
    END IF;
    RAISE EXCEPTION 'document "%" is % and has no open dead letter%', known.doc_id, known.state,
        CASE WHEN letter.id IS NULL THEN '' ELSE format(' (the last one, %s, was %s)', letter.id, letter.resolution) END
        USING ERRCODE = 'object_not_in_prerequisite_state';
END;
$$;

CALL pin_search_path();
