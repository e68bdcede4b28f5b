-- What people say in SQL is understood as elsewhere, and what they are told says what to do: submit_document takes no user for the default one,
-- as submit_batch does; taking up what has failed can give it another priority; starting a re-embedding beside another names the way to end
-- that, and that a model is named with its version; and each column of reembedding_status says what it is.

CREATE OR REPLACE FUNCTION submit_document(
    file_path text, doc_id text DEFAULT NULL, user_id text DEFAULT 'default', metadata jsonb DEFAULT '{}', priority integer DEFAULT 0,
    correlation_id text DEFAULT NULL, file_name text DEFAULT NULL, content_sha256 text DEFAULT NULL
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    id text := doc_id;
    owner text := coalesce(user_id, 'default');
BEGIN
    IF file_path IS NULL OR file_path = '' OR file_path ~ '(^/|(^|/)\.{0,2}(/|$)|[[:cntrl:]]|\\)' THEN
        RAISE EXCEPTION 'file_path "%" must be relative to the storage base path, without empty parts, ".", "..", backslashes or control characters',
            file_path USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF id IS NULL THEN
        -- RFC 9562 version 8: Postgres has no SHA-1, which version 5 would need.
        id := encode(substring(sha256(convert_to(owner || chr(10) || file_path, 'UTF8')) FOR 16), 'hex');
        id := overlay(overlay(id PLACING '8' FROM 13 FOR 1) PLACING 'a' FROM 17 FOR 1)::uuid::text;
    END IF;
    PERFORM accept_document(id, owner, coalesce(file_name, regexp_replace(file_path, '^.*/', '')), file_path, file_path, NULL,
        content_sha256, coalesce(metadata, '{}'), coalesce(priority, 0), coalesce(correlation_id, gen_random_uuid()::text), NULL, NULL, 5000);
    RETURN id;
END;
$$;

-- Taking up what has failed. A function with one more argument that has a default would be another function beside the one without, and a call
-- with few arguments could mean either: so those go. Calls of older workers and programs mean the new ones.

CREATE OR REPLACE FUNCTION resume_failed_document(d file_extractions, letter dead_letters) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    token bigint;
    former integer;
BEGIN
    UPDATE dead_letters AS l SET resolved_at = now(), resolution = 'requeued' WHERE l.id = letter.id;
    SELECT f.priority INTO former FROM file_extractions AS f WHERE f.id = d.id;
    UPDATE file_extractions AS f
    SET state = 'queued', claim = f.claim + 1, claim_job_id = NULL, retry_count = 0, crash_count = 0, lone_crash_count = 0, not_before = NULL,
        requeue_count = 0, error_type = NULL, error_message = NULL, processing_completed_at = NULL, updated_at = now(), priority = d.priority
    WHERE f.id = d.id
    RETURNING f.claim INTO token;
    PERFORM drop_waiting_jobs(d.doc_id);
    PERFORM defer_stage(d.doc_id, due_stage(d.milestone), d.priority);
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, stage, event, claim, detail)
    VALUES (d.doc_id, d.version, d.batch_id, d.user_id, d.correlation_id, due_stage(d.milestone), 'requeued_by_operator', token,
        jsonb_build_object('dead_letter', letter.id, 'failed_as', letter.error_type, 'role', session_user)
            || jsonb_strip_nulls(jsonb_build_object('priority', nullif(d.priority, former))));
    RETURN due_stage(d.milestone);
END;
$$;
COMMENT ON FUNCTION resume_failed_document IS
    'Queues a failed document, whose lock is held, at the stage that failed, with the priority that the row given has; resolves its open letter.';

DROP FUNCTION requeue_dead_letter(bigint);
CREATE FUNCTION requeue_dead_letter(id bigint, priority integer DEFAULT NULL) RETURNS text LANGUAGE plpgsql AS $$
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
    d.priority := coalesce(requeue_dead_letter.priority, d.priority);
    RETURN resume_failed_document(d, letter);
END;
$$;
COMMENT ON FUNCTION requeue_dead_letter IS
    'Takes a failed document up again at the stage that failed, with another priority if one is given, and returns that stage; refused for an archive''s entry that has no file. Then, if it has a batch: SELECT reopen_batch(batch_id).';

DROP FUNCTION requeue_document(text);
CREATE FUNCTION requeue_document(doc_id text, priority integer DEFAULT NULL) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    letter dead_letters;
    known file_extractions;
BEGIN
    SELECT l.* INTO letter FROM dead_letters AS l WHERE l.doc_id = requeue_document.doc_id ORDER BY l.id DESC LIMIT 1;
    IF letter.id IS NOT NULL AND letter.resolved_at IS NULL THEN
        RETURN requeue_dead_letter(letter.id, requeue_document.priority);
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
COMMENT ON FUNCTION requeue_document IS 'Requeues the open dead letter of a document; see requeue_dead_letter.';

DROP FUNCTION requeue_dead_letters(document_error_type, text, text, text, integer, bigint);
CREATE FUNCTION requeue_dead_letters(
    error_type document_error_type DEFAULT NULL, stage text DEFAULT NULL, batch_id text DEFAULT NULL, user_id text DEFAULT NULL,
    max_count integer DEFAULT 1000, up_to_id bigint DEFAULT NULL, priority integer DEFAULT NULL
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
                d.priority := coalesce(requeue_dead_letters.priority, d.priority);
                PERFORM resume_failed_document(d, letter);
                done := done + 1;
            END IF;
        END LOOP;
        EXIT WHEN cardinality(letters) < portion;
    END LOOP;
    RETURN done;
END;
$$;
COMMENT ON FUNCTION requeue_dead_letters IS
    'Requeues open dead letters that match all filters given, at most max_count (null: all), with another priority if one is given, and returns how many; call it until it returns 0. Entries of archives that have no file are passed over. Then SELECT reopen_batches().';

CREATE OR REPLACE FUNCTION start_reembedding(to_model text, switch text DEFAULT 'auto', priority integer DEFAULT -10) RETURNS bigint LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    serving serving_embeddings;
    open reembeddings;
    made bigint;
BEGIN
    IF coalesce(start_reembedding.to_model, '') = '' OR coalesce(start_reembedding.switch, '') NOT IN ('auto', 'manual') THEN
        RAISE EXCEPTION 'to_model must name a model, and switch be auto or manual' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    -- Of two who start at once the second sees the first one's run.
    PERFORM pg_advisory_xact_lock(hashtextextended('docmill start of a re-embedding', 0));
    SELECT s.* INTO serving FROM serving_embeddings AS s;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there are no passages yet: the first document will be embedded as EMBEDDING_PROVIDER says'
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    SELECT r.* INTO open FROM reembeddings AS r WHERE r.state IN ('running', 'paused', 'ready', 'switched');
    IF FOUND THEN
        RAISE EXCEPTION 're-embedding % from "%" to "%" is % and must end first%', open.id, open.from_model, open.to_model, open.state,
            CASE WHEN open.switched_at IS NULL THEN '; cancel_reembedding() ends it' ELSE '' END
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    IF serving.embedding_model = start_reembedding.to_model THEN
        RAISE EXCEPTION '"%" serves searches already', start_reembedding.to_model USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    INSERT INTO reembeddings (from_model, from_dimensions, to_model, switch, priority)
    VALUES (
        serving.embedding_model, serving.dimensions, start_reembedding.to_model, start_reembedding.switch,
        coalesce(start_reembedding.priority, -10)
    ) RETURNING id INTO made;
    -- What is left of a cancelled run to the same model is taken up, and what had failed is tried at once.
    UPDATE embeddings_to_make AS l SET attempts = 0, not_before = NULL, error_message = NULL
    WHERE l.embedding_model = start_reembedding.to_model AND l.not_before IS NOT NULL;
    UPDATE reembeddings AS r SET ended_at = now()
    WHERE r.state = 'cancelled' AND r.ended_at IS NULL AND r.to_model = start_reembedding.to_model;
    PERFORM share_embeddings_with_readers();
    PERFORM hasten_reembedding();
    RETURN made;
END;
$$;
COMMENT ON FUNCTION start_reembedding IS
    'Begins to make the vectors of another model and returns the number of the run. to_model is the model''s name with its version, as passages have it in embedding_model, and not a value of EMBEDDING_PROVIDER; a name that no worker can make is taken as well, and waits until cancel_reembedding().';

COMMENT ON COLUMN reembedding_status.id IS 'Number of the run.';
COMMENT ON COLUMN reembedding_status.state IS 'running: vectors are made. ready: all are there, indexed. switched: they serve, and are moved into document_chunks. paused is either side of the switch. complete and cancelled are the ends.';
COMMENT ON COLUMN reembedding_status.from_model IS 'The model that served when it was started.';
COMMENT ON COLUMN reembedding_status.to_model IS 'The model that is to serve, named with its version.';
COMMENT ON COLUMN reembedding_status.switch IS 'auto: switches as soon as it is ready. manual: waits for switch_reembedding().';
COMMENT ON COLUMN reembedding_status.priority IS 'Of its jobs: below 0, waiting documents go first.';
COMMENT ON COLUMN reembedding_status.done IS 'Passages that have got their vector so far.';
COMMENT ON COLUMN reembedding_status.error_message IS 'What keeps it, or one of its documents, in plain words; null while it gets on.';
COMMENT ON COLUMN reembedding_status.worker IS 'host:pid of the worker that last worked on it.';
COMMENT ON COLUMN reembedding_status.started_at IS 'When it was asked for.';
COMMENT ON COLUMN reembedding_status.updated_at IS 'When it last got on.';
COMMENT ON COLUMN reembedding_status.ready_at IS 'When the new set was first whole and indexed.';
COMMENT ON COLUMN reembedding_status.switched_at IS 'When searches went over to it.';
COMMENT ON COLUMN reembedding_status.ended_at IS 'When nothing of the set that is not used was left.';

CALL pin_search_path();
