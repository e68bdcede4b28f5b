-- A re-embedding keeps, counts and begins what it should. After the switch, what lay aside of a document that had arrived during the run was
-- dropped with the rest where one of its passages could not be embedded: its passages were found no longer, and their vectors were made
-- twice. What had been put off for a document that was then deleted held the run up for as long as it would have waited. A document that is
-- inserted in several statements was listed with the passages of the last one. A run that was resumed after it had been ready told a rate
-- below 0. And what people order waited for a job that had been put off.

-- Due.

CREATE OR REPLACE FUNCTION reembedding_steps() RETURNS TABLE (step text, embedding_model text, reembedding_id bigint) LANGUAGE plpgsql STABLE AS $$
-- What was put off for a document that is gone is due at once. OFFSET has each looked up by itself, not all documents read.
#variable_conflict use_column
DECLARE
    r reembeddings;
    serving text := serving_model();
BEGIN
    SELECT o.* INTO r FROM reembeddings AS o WHERE o.state IN ('running', 'paused', 'ready', 'switched');
    RETURN QUERY
    SELECT 'fill', serving, NULL::bigint
    WHERE EXISTS (
        SELECT FROM embeddings_to_make AS l
        WHERE l.embedding_model = serving AND l.is_urgent AND (coalesce(l.not_before, now()) <= now() OR NOT EXISTS (
            SELECT FROM file_extractions AS f WHERE f.doc_id = l.doc_id OFFSET 0
        ))
    );
    IF r.state = 'running' AND r.listed_at IS NULL THEN
        RETURN QUERY SELECT 'list', r.to_model, r.id;
    ELSIF r.state IN ('running', 'ready') THEN
        IF EXISTS (
            SELECT FROM embeddings_to_make AS l
            WHERE l.embedding_model = r.to_model AND (coalesce(l.not_before, now()) <= now() OR NOT EXISTS (
                SELECT FROM file_extractions AS f WHERE f.doc_id = l.doc_id OFFSET 0
            ))
        ) THEN
            RETURN QUERY SELECT 'fill', r.to_model, r.id;
        ELSIF NOT EXISTS (SELECT FROM embeddings_to_make AS l WHERE l.embedding_model = r.to_model) THEN
            RETURN QUERY SELECT 'index', r.to_model, r.id WHERE r.state = 'running';
            RETURN QUERY SELECT 'switch', r.to_model, r.id WHERE r.state = 'ready' AND r.switch = 'auto';
        END IF;
    ELSIF r.state = 'switched' THEN
        RETURN QUERY SELECT CASE
            WHEN r.move_listed_at IS NULL THEN 'list'
            WHEN EXISTS (SELECT FROM embeddings_to_make AS l WHERE l.embedding_model = r.to_model AND NOT l.is_urgent) THEN 'move'
            WHEN r.moved_at IS NULL THEN 'settle'
            WHEN has_unwanted_embeddings() THEN 'clear'
            ELSE 'finish'
        END, r.to_model, r.id;
    END IF;
    RETURN QUERY
    SELECT 'clear', NULL::text, NULL::bigint WHERE has_unwanted_embeddings();
    RETURN QUERY
    SELECT 'forget', c.to_model, c.id FROM reembeddings AS c WHERE c.state = 'cancelled' AND c.ended_at IS NULL;
END;
$$;

CREATE FUNCTION hasten_reembedding() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE procrastinate_jobs AS j SET scheduled_at = NULL
    WHERE j.status = 'todo' AND j.queueing_lock = 'reembed' AND j.scheduled_at IS NOT NULL;
    PERFORM queue_reembedding();
END;
$$;
COMMENT ON FUNCTION hasten_reembedding IS 'Has the next steps done at once, as somebody has ordered: also where the job had been put off.';

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
        RAISE EXCEPTION 're-embedding % from "%" to "%" is % and must end first', open.id, open.from_model, open.to_model, open.state
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

CREATE OR REPLACE FUNCTION resume_reembedding() RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    r reembeddings := open_reembedding();
BEGIN
    IF r.state = 'paused' THEN
        UPDATE reembeddings AS o
        SET state = CASE WHEN o.switched_at IS NULL THEN 'running' ELSE 'switched' END, done_before = o.done, resumed_at = now(),
            updated_at = now(), error_message = NULL
        WHERE o.id = r.id
        RETURNING o.state INTO r.state;
    END IF;
    -- Whoever resumes wants to see at once whether what failed works now.
    UPDATE embeddings_to_make AS l SET not_before = NULL WHERE l.embedding_model = r.to_model AND l.not_before IS NOT NULL;
    PERFORM hasten_reembedding();
    RETURN r.state;
END;
$$;

CREATE OR REPLACE FUNCTION cancel_reembedding() RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    r reembeddings := open_reembedding();
BEGIN
    IF r.switched_at IS NOT NULL THEN
        RAISE EXCEPTION 're-embedding % has switched to "%" already; start one back to "%" instead', r.id, r.to_model, r.from_model
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    UPDATE reembeddings AS o SET state = 'cancelled', updated_at = now(), error_message = NULL WHERE o.id = r.id;
    PERFORM hasten_reembedding();
    RETURN 'cancelled';
END;
$$;

CREATE OR REPLACE FUNCTION switch_reembedding(despite_lacking boolean DEFAULT FALSE) RETURNS text LANGUAGE plpgsql SET lock_timeout = '5s' AS $$
-- The lock first, then the run, as everybody. While it is held nobody can be inserting passages, so what is not listed lacks nothing.
DECLARE
    r reembeddings;
BEGIN
    PERFORM pg_advisory_xact_lock(embedding_sets_lock());
    r := open_reembedding();
    IF r.switched_at IS NOT NULL THEN
        RETURN r.state;
    END IF;
    UPDATE reembeddings AS o SET switch = 'auto', updated_at = now() WHERE o.id = r.id;
    IF r.state = 'ready' AND NOT EXISTS (SELECT FROM embeddings_to_make AS l WHERE l.embedding_model = r.to_model)
        OR despite_lacking AND r.listed_at IS NOT NULL AND r.dimensions IS NOT NULL
    THEN
        UPDATE serving_embeddings AS s
        SET embedding_model = r.to_model, dimensions = coalesce(r.dimensions, r.from_dimensions), since = now();
        UPDATE reembeddings AS o SET state = 'switched', switched_at = now() WHERE o.id = r.id RETURNING o.state INTO r.state;
    END IF;
    PERFORM share_embeddings_with_readers();
    PERFORM hasten_reembedding();
    RETURN r.state;
END;
$$;

-- Listed and counted.

CREATE OR REPLACE FUNCTION list_lacking_embeddings() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
-- Whoever may insert passages may list them. Each statement sees what was committed while the lock was waited for.
BEGIN
    PERFORM pg_advisory_xact_lock_shared(embedding_sets_lock());
    IF NOT EXISTS (SELECT FROM serving_embeddings) THEN
        INSERT INTO serving_embeddings (embedding_model, dimensions)
        SELECT f.embedding_model, vector_dims(f.embedding) FROM fresh AS f LIMIT 1
        ON CONFLICT DO NOTHING;
    END IF;
    INSERT INTO chunk_embeddings (chunk_id, embedding_model, doc_id, user_id, embedding)
    SELECT f.id, f.embedding_model, f.doc_id, f.user_id, f.embedding
    FROM reembeddings AS r
    JOIN fresh AS f ON f.embedding_model = r.to_model
    WHERE r.state IN ('running', 'paused', 'ready', 'switched') AND r.moved_at IS NULL;
    -- A document's passages come in order, in one statement or several: the first of all begins the count of its version.
    INSERT INTO embeddings_to_make AS l (embedding_model, doc_id, passages, is_urgent)
    SELECT w, f.doc_id, count(*), TRUE
    FROM wanted_embedding_models() AS w
    JOIN fresh AS f ON f.embedding_model <> w
    GROUP BY w, f.doc_id
    ON CONFLICT (embedding_model, doc_id) DO UPDATE
    SET passages = EXCLUDED.passages + CASE
            WHEN EXISTS (SELECT FROM fresh AS f WHERE f.doc_id = EXCLUDED.doc_id AND f.chunk_index = 0) THEN 0 ELSE l.passages
        END, is_urgent = TRUE, attempts = 0, not_before = NULL, error_message = NULL;
    RETURN NULL;
END;
$$;

CREATE OR REPLACE FUNCTION list_documents_to_embed(reembedding_id bigint) RETURNS void LANGUAGE plpgsql AS $$
-- After await_passage_writers, in a later transaction: what this does not see has listed itself.
DECLARE
    r reembeddings;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(embedding_sets_lock());
    SELECT o.* INTO r FROM reembeddings AS o
    WHERE o.id = list_documents_to_embed.reembedding_id
        AND (o.state = 'running' AND o.listed_at IS NULL OR o.state = 'switched' AND o.move_listed_at IS NULL)
    FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    -- Those that lack nothing are found out when their turn comes: telling them here would read all vectors.
    -- After the switch what lies aside of a document that arrived meanwhile is moved before the rest of it is embedded.
    INSERT INTO embeddings_to_make (embedding_model, doc_id, passages, is_urgent)
    SELECT r.to_model, c.doc_id, count(*), FALSE FROM document_chunks AS c GROUP BY c.doc_id ORDER BY c.doc_id
    ON CONFLICT (embedding_model, doc_id) DO UPDATE SET passages = EXCLUDED.passages, is_urgent = FALSE
    WHERE r.state = 'switched' AND EXISTS (
        SELECT FROM chunk_embeddings AS s WHERE s.embedding_model = EXCLUDED.embedding_model AND s.doc_id = EXCLUDED.doc_id
    );
    IF r.state = 'switched' THEN
        UPDATE reembeddings AS o SET move_listed_at = clock_timestamp(), updated_at = clock_timestamp() WHERE o.id = r.id;
        RETURN;
    END IF;
    UPDATE reembeddings AS o
    SET listed_at = clock_timestamp(), resumed_at = clock_timestamp(), updated_at = clock_timestamp(),
        total = (SELECT coalesce(sum(l.passages), 0) FROM embeddings_to_make AS l WHERE l.embedding_model = r.to_model)
    WHERE o.id = r.id;
END;
$$;

CREATE OR REPLACE FUNCTION store_embeddings(
    embedding_model text, doc_ids text[], chunk_ids uuid[], embeddings vector[], OUT stored integer, OUT settled integer,
    OUT got_on integer
) LANGUAGE plpgsql AS $$
-- The run's row is not touched here: who holds it, pausing in an open transaction, say, must not make documents wait.
#variable_conflict use_column
DECLARE
    is_serving boolean;
    is_aside boolean;
    held text[];
    replaced integer := 0;
BEGIN
    stored := 0;
    settled := 0;
    got_on := 0;
    PERFORM pg_advisory_xact_lock_shared(embedding_sets_lock());
    IF store_embeddings.embedding_model NOT IN (SELECT w FROM wanted_embedding_models() AS w) THEN
        RETURN;
    END IF;
    is_serving := store_embeddings.embedding_model = serving_model();
    is_aside := embedding_table(store_embeddings.embedding_model) = 'chunk_embeddings';
    -- A document that somebody holds is left for later: it may be about to lose its passages.
    SELECT array_agg(d.doc_id) INTO held
    FROM (
        SELECT f.doc_id FROM file_extractions AS f
        WHERE f.doc_id = ANY(store_embeddings.doc_ids) ORDER BY f.id FOR NO KEY UPDATE SKIP LOCKED
    ) AS d;
    IF is_aside THEN
        INSERT INTO chunk_embeddings (chunk_id, embedding_model, doc_id, user_id, embedding)
        SELECT c.id, store_embeddings.embedding_model, c.doc_id, c.user_id, v.embedding
        FROM unnest(store_embeddings.chunk_ids, store_embeddings.embeddings) AS v (chunk_id, embedding)
        JOIN document_chunks AS c ON c.id = v.chunk_id
        WHERE c.doc_id = ANY(held)
        ON CONFLICT DO NOTHING;
        GET DIAGNOSTICS stored = ROW_COUNT;
    END IF;
    IF is_serving THEN
        UPDATE document_chunks AS c
        SET embedding = v.embedding, embedding_model = store_embeddings.embedding_model
        FROM unnest(store_embeddings.chunk_ids, store_embeddings.embeddings) AS v (chunk_id, embedding)
        WHERE c.id = v.chunk_id AND c.doc_id = ANY(held) AND c.embedding_model <> store_embeddings.embedding_model;
        GET DIAGNOSTICS replaced = ROW_COUNT;
    END IF;
    stored := greatest(stored, replaced);
    WITH looked AS (
        SELECT l.doc_id, l.passages, (
            SELECT count(*)
            FROM document_chunks AS c
            WHERE c.doc_id = l.doc_id AND (is_serving AND c.embedding_model <> l.embedding_model OR is_aside AND NOT EXISTS (
                SELECT FROM chunk_embeddings AS s WHERE s.chunk_id = c.id AND s.embedding_model = l.embedding_model
            ))
        )::integer AS lacking
        FROM embeddings_to_make AS l
        WHERE l.embedding_model = store_embeddings.embedding_model AND l.doc_id = ANY(store_embeddings.doc_ids)
            AND (l.doc_id = ANY(held) OR NOT EXISTS (SELECT FROM file_extractions AS f WHERE f.doc_id = l.doc_id))
    ), whole AS (
        DELETE FROM embeddings_to_make AS l
        USING looked AS k
        WHERE l.embedding_model = store_embeddings.embedding_model AND l.doc_id = k.doc_id AND k.lacking = 0
        RETURNING l.doc_id
    ), parts AS (
        UPDATE embeddings_to_make AS l
        SET passages = k.lacking, attempts = 0, not_before = NULL, error_message = NULL
        FROM looked AS k
        WHERE l.embedding_model = store_embeddings.embedding_model AND l.doc_id = k.doc_id AND k.lacking > 0 AND k.lacking <> k.passages
        RETURNING l.doc_id
    )
    SELECT (SELECT count(*) FROM whole), coalesce(sum(greatest(k.passages - k.lacking, 0)), 0)::integer INTO settled, got_on
    FROM looked AS k
    WHERE k.doc_id IN (SELECT w.doc_id FROM whole AS w UNION ALL SELECT p.doc_id FROM parts AS p);
END;
$$;

CREATE OR REPLACE VIEW reembedding_status WITH (security_invoker = true) AS
SELECT
    r.id, r.state, r.from_model, r.to_model, r.switch, r.priority, r.done, r.done + l.lacking AS total, l.lacking, l.failing, l.to_move,
    p.rate, CASE WHEN r.state = 'running' THEN l.lacking / nullif(p.rate, 0) END AS seconds_left,
    coalesce(r.error_message, l.error_message) AS error_message, r.worker, r.started_at, r.updated_at, r.ready_at, r.switched_at, r.ended_at
FROM reembeddings AS r
CROSS JOIN LATERAL (
    SELECT coalesce(sum(e.passages) FILTER (WHERE e.is_urgent OR r.switched_at IS NULL), 0) AS lacking,
        coalesce(sum(e.passages) FILTER (WHERE NOT e.is_urgent AND r.switched_at IS NOT NULL), 0) AS to_move,
        count(e.error_message) AS failing, max(e.error_message) AS error_message
    FROM embeddings_to_make AS e
    WHERE e.embedding_model = r.to_model AND r.state IN ('running', 'paused', 'ready', 'switched')
) AS l
CROSS JOIN LATERAL (
    SELECT CASE WHEN r.done > r.done_before THEN
        (r.done - r.done_before) / nullif(
            extract(epoch FROM CASE WHEN r.ready_at > r.resumed_at THEN r.ready_at ELSE r.updated_at END - r.resumed_at), 0
        )::double precision
    END AS rate
) AS p;

CALL pin_search_path();
