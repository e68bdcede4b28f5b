-- Work that is done in portions costs what a portion holds, not what the table does. Deleting a batch looked for its first documents among
-- all that were submitted before it, for each portion. Requeuing dead letters joined and sorted all that were open for each portion, and
-- requeuing failed extractions read every extraction that there is. Each index takes some seconds for a million documents.

CREATE INDEX file_extractions_without_extraction ON file_extractions (id) WHERE state = 'complete' AND raw_extraction ? 'failure';
COMMENT ON INDEX file_extractions_without_extraction IS 'Complete documents whose extraction failed and can be tried again.';

CREATE INDEX dead_letters_open_in_order ON dead_letters (id) WHERE resolved_at IS NULL;
COMMENT ON INDEX dead_letters_open_in_order IS 'Open dead letters in their order, however many have been resolved.';

CREATE OR REPLACE FUNCTION delete_documents(batch_id text, max_count integer DEFAULT NULL, lock_timeout_ms integer DEFAULT 5000) RETURNS integer
LANGUAGE plpgsql AS $$
-- A portion is taken as the batch's index has it. A range, so that ordering by the batch means something: with `=` Postgres would look for
-- the batch's documents among all that were submitted before.
DECLARE
    candidate text;
    done integer := 0;
BEGIN
    FOR candidate IN
        SELECT p.doc_id
        FROM (
            SELECT f.doc_id, f.id
            FROM file_extractions AS f
            WHERE f.batch_id BETWEEN delete_documents.batch_id AND delete_documents.batch_id
            ORDER BY f.batch_id
            LIMIT max_count
        ) AS p
        ORDER BY p.id
    LOOP
        done := done + delete_document(candidate, lock_timeout_ms)::integer;
    END LOOP;
    RETURN done;
END;
$$;

CREATE OR REPLACE FUNCTION requeue_dead_letters(
    error_type document_error_type DEFAULT NULL, stage text DEFAULT NULL, batch_id text DEFAULT NULL, user_id text DEFAULT NULL,
    max_count integer DEFAULT 1000, up_to_id bigint DEFAULT NULL
) RETURNS integer LANGUAGE plpgsql AS $$
-- Documents that somebody else holds are passed over rather than waited for: this transaction locks many, and whoever else does so may
-- take them in another order.
DECLARE
    portion CONSTANT integer := 500;
    letters bigint[];
    letter dead_letters;
    letter_id bigint := 0;
    d file_extractions;
    done integer := 0;
BEGIN
    LOOP
        letters := ARRAY(
            SELECT l.id
            FROM dead_letters AS l
            WHERE l.resolved_at IS NULL AND l.id > letter_id
                AND (requeue_dead_letters.error_type IS NULL OR l.error_type = requeue_dead_letters.error_type)
                AND (requeue_dead_letters.stage IS NULL OR l.stage = requeue_dead_letters.stage)
                AND (requeue_dead_letters.user_id IS NULL OR l.user_id = requeue_dead_letters.user_id)
                AND (requeue_dead_letters.batch_id IS NULL OR EXISTS (
                    SELECT FROM file_extractions AS f WHERE f.doc_id = l.doc_id AND f.batch_id = requeue_dead_letters.batch_id
                ))
                AND (up_to_id IS NULL OR l.id <= up_to_id)
            ORDER BY l.id
            LIMIT portion
        );
        FOREACH letter_id IN ARRAY letters LOOP
            IF done >= max_count THEN
                RETURN done;
            END IF;
            SELECT f.* INTO d
            FROM dead_letters AS l
            JOIN file_extractions AS f ON f.doc_id = l.doc_id AND f.version = l.version
            WHERE l.id = letter_id AND f.state = 'failed' AND NOT is_refused_entry(f)
                AND (requeue_dead_letters.batch_id IS NULL OR f.batch_id = requeue_dead_letters.batch_id)
            FOR UPDATE OF f SKIP LOCKED;
            CONTINUE WHEN NOT FOUND;
            SELECT l.* INTO letter FROM dead_letters AS l WHERE l.id = letter_id;
            IF letter.resolved_at IS NULL AND d.version = letter.version THEN
                PERFORM resume_failed_document(d, letter);
                done := done + 1;
            END IF;
        END LOOP;
        EXIT WHEN cardinality(letters) < portion;
    END LOOP;
    RETURN done;
END;
$$;

CALL pin_search_path();
