-- Re-embedding: searches go from one model's vectors to another's without parsing again and without downtime.
--
-- The database, not anybody's settings, says which model serves searches. The first passage decides; afterwards only a re-embedding changes it.
-- The vectors of the model that a run goes over to lie aside, in chunk_embeddings, all of them, also those of passages that arrive meanwhile:
-- a search looks in one table, the one where its model's set is whole. After the switch document_chunks takes the new vectors over, without
-- an index, which would cost ten times as much to insert into as to build afterwards; once it is built, searches look there, and what lies
-- aside is deleted. What lacks a wanted vector is listed in embeddings_to_make by a trigger, so that no writer can forget it: a worker of an
-- older release, or one that cannot make the serving model, only causes work.
--
-- One advisory lock orders all this: whoever inserts passages or writes the tables below shares it until the transaction ends; the switch,
-- the going back to document_chunks, and the listing at the start of a run hold it alone for a moment. Whoever waits for it while holding
-- documents waits for nobody who wants documents. Where a document must not change its row is locked, or skipped if somebody has it.
-- docs/decisions/0007-reembedding.md has the reasons.

CREATE TABLE serving_embeddings (
    is_only boolean PRIMARY KEY DEFAULT TRUE CHECK (is_only),
    embedding_model text NOT NULL,
    dimensions integer NOT NULL CHECK (dimensions > 0),
    since timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE serving_embeddings IS 'One row: the model whose vectors serve searches, and which documents are embedded with. Empty until the first passage.';
COMMENT ON COLUMN serving_embeddings.is_only IS 'True: there is one row at most.';
COMMENT ON COLUMN serving_embeddings.embedding_model IS 'Name and version of the model.';
COMMENT ON COLUMN serving_embeddings.dimensions IS 'Length of its vectors.';
COMMENT ON COLUMN serving_embeddings.since IS 'When it began to serve.';
-- Applications that embed their queries themselves must be able to ask; a model's name is no secret.
GRANT SELECT ON serving_embeddings TO PUBLIC;

CREATE TABLE chunk_embeddings (
    chunk_id uuid NOT NULL REFERENCES document_chunks (id) ON DELETE CASCADE,
    embedding_model text NOT NULL,
    doc_id text NOT NULL,
    user_id text NOT NULL,
    embedding vector NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (chunk_id, embedding_model)
);
COMMENT ON TABLE chunk_embeddings IS 'The whole set of vectors of the model that a re-embedding goes over to, until document_chunks holds it, indexed. Searches with that model look here.';
COMMENT ON COLUMN chunk_embeddings.chunk_id IS 'The passage.';
COMMENT ON COLUMN chunk_embeddings.embedding_model IS 'Name and version of the model that made the vector.';
COMMENT ON COLUMN chunk_embeddings.doc_id IS 'The passage''s document.';
COMMENT ON COLUMN chunk_embeddings.user_id IS 'Whose passage it is.';
COMMENT ON COLUMN chunk_embeddings.embedding IS 'L2-normalised vector of the content.';
COMMENT ON COLUMN chunk_embeddings.created_at IS 'When it was made.';
CREATE INDEX chunk_embeddings_model ON chunk_embeddings (embedding_model, doc_id);
COMMENT ON INDEX chunk_embeddings_model IS 'Tells which models there are, and finds a model''s vectors by document.';

CREATE TABLE embeddings_to_make (
    embedding_model text NOT NULL,
    doc_id text NOT NULL,
    passages integer NOT NULL,
    is_urgent boolean NOT NULL,
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    not_before timestamptz,
    error_message text,
    PRIMARY KEY (embedding_model, doc_id)
);
COMMENT ON TABLE embeddings_to_make IS 'Documents with passages that lack a vector of a wanted model. Entries of documents that are gone vanish when their turn comes.';
COMMENT ON COLUMN embeddings_to_make.embedding_model IS 'The wanted model.';
COMMENT ON COLUMN embeddings_to_make.doc_id IS 'The document.';
COMMENT ON COLUMN embeddings_to_make.passages IS 'How many passages lack it, when last looked at.';
COMMENT ON COLUMN embeddings_to_make.is_urgent IS 'Arrived with vectors of another model. The others were listed by a run: to be embedded, or after its switch to be moved.';
COMMENT ON COLUMN embeddings_to_make.attempts IS 'Failures since it last got on.';
COMMENT ON COLUMN embeddings_to_make.not_before IS 'When it may be tried again; null for at once.';
COMMENT ON COLUMN embeddings_to_make.error_message IS 'The last failure in plain words.';

CREATE INDEX embeddings_to_make_urgent ON embeddings_to_make (embedding_model, doc_id) WHERE is_urgent;
COMMENT ON INDEX embeddings_to_make_urgent IS 'Finds the few that arrived among many that a run listed.';

CREATE TABLE reembeddings (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    from_model text NOT NULL,
    from_dimensions integer NOT NULL,
    to_model text NOT NULL CHECK (to_model <> from_model),
    dimensions integer CHECK (dimensions > 0),
    state text NOT NULL DEFAULT 'running' CHECK (state IN ('running', 'paused', 'ready', 'switched', 'complete', 'cancelled')),
    switch text NOT NULL DEFAULT 'auto' CHECK (switch IN ('auto', 'manual')),
    priority integer NOT NULL DEFAULT -10,
    total bigint NOT NULL DEFAULT 0,
    done bigint NOT NULL DEFAULT 0,
    done_before bigint NOT NULL DEFAULT 0,
    error_message text,
    worker text,
    started_at timestamptz NOT NULL DEFAULT now(),
    resumed_at timestamptz NOT NULL DEFAULT now(),
    listed_at timestamptz,
    updated_at timestamptz NOT NULL DEFAULT now(),
    ready_at timestamptz,
    switched_at timestamptz,
    move_listed_at timestamptz,
    moved_at timestamptz,
    ended_at timestamptz,
    CHECK (state <> 'ready' OR (ready_at IS NOT NULL AND switched_at IS NULL)),
    CHECK (state NOT IN ('switched', 'complete') OR switched_at IS NOT NULL),
    CHECK (state <> 'complete' OR ended_at IS NOT NULL)
);
COMMENT ON TABLE reembeddings IS 'Runs of re-embedding. At most one is open (running, paused, ready or switched). The view reembedding_status adds rate and time left.';
COMMENT ON COLUMN reembeddings.id IS 'Number of the run.';
COMMENT ON COLUMN reembeddings.from_model IS 'The model that served when it was started.';
COMMENT ON COLUMN reembeddings.from_dimensions IS 'Length of its vectors.';
COMMENT ON COLUMN reembeddings.to_model IS 'The model that is to serve.';
COMMENT ON COLUMN reembeddings.dimensions IS 'Length of its vectors; null until the first are made.';
COMMENT ON COLUMN reembeddings.state IS 'running: vectors are made. ready: all are there, indexed. switched: they serve, from chunk_embeddings, and are moved into document_chunks. paused is either side of the switch.';
COMMENT ON COLUMN reembeddings.switch IS 'auto: switches as soon as it is ready. manual: waits for switch_reembedding().';
COMMENT ON COLUMN reembeddings.priority IS 'Of its jobs: below 0, waiting documents go first.';
COMMENT ON COLUMN reembeddings.total IS 'Passages when it was listed; those that arrive later come on top.';
COMMENT ON COLUMN reembeddings.done IS 'Passages that have got their vector so far.';
COMMENT ON COLUMN reembeddings.done_before IS 'Passages done when it was last begun or resumed; what the rate counts from.';
COMMENT ON COLUMN reembeddings.error_message IS 'What keeps it, in plain words; null while it gets on.';
COMMENT ON COLUMN reembeddings.worker IS 'host:pid of the worker that last worked on it.';
COMMENT ON COLUMN reembeddings.started_at IS 'When it was asked for.';
COMMENT ON COLUMN reembeddings.resumed_at IS 'When it was last begun or resumed.';
COMMENT ON COLUMN reembeddings.listed_at IS 'When all documents of then had been listed; later ones list themselves.';
COMMENT ON COLUMN reembeddings.updated_at IS 'When it last got on.';
COMMENT ON COLUMN reembeddings.ready_at IS 'When the new set was first whole and indexed.';
COMMENT ON COLUMN reembeddings.switched_at IS 'When searches went over to it.';
COMMENT ON COLUMN reembeddings.move_listed_at IS 'After the switch: when the documents whose vectors are to be moved had been listed.';
COMMENT ON COLUMN reembeddings.moved_at IS 'When document_chunks held the whole set, indexed, and searches went back to it.';
COMMENT ON COLUMN reembeddings.ended_at IS 'When nothing of the set that is not used was left.';
CREATE UNIQUE INDEX reembeddings_open ON reembeddings ((TRUE)) WHERE state IN ('running', 'paused', 'ready', 'switched');
COMMENT ON INDEX reembeddings_open IS 'One open run at most.';

CREATE FUNCTION serving_model() RETURNS text LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT s.embedding_model FROM serving_embeddings AS s;
$$;
COMMENT ON FUNCTION serving_model IS 'The model that queries must be embedded with; null while there are no passages yet.';

CREATE FUNCTION wanted_embedding_models() RETURNS SETOF text LANGUAGE sql STABLE AS $$
    SELECT s.embedding_model FROM serving_embeddings AS s
    UNION
    SELECT r.to_model FROM reembeddings AS r WHERE r.state IN ('running', 'paused', 'ready') AND r.switched_at IS NULL;
$$;
COMMENT ON FUNCTION wanted_embedding_models IS 'Every passage is to have a vector of each of these: the serving model and that of a run before its switch.';

CREATE FUNCTION embedding_table(embedding_model text) RETURNS text LANGUAGE sql STABLE SECURITY DEFINER AS $$
    SELECT CASE WHEN EXISTS (
        SELECT FROM reembeddings AS r
        WHERE r.to_model = embedding_table.embedding_model AND r.state IN ('running', 'paused', 'ready', 'switched') AND r.moved_at IS NULL
    ) THEN 'chunk_embeddings' ELSE 'document_chunks' END;
$$;
COMMENT ON FUNCTION embedding_table IS 'The table where a model''s vectors are to be looked for: chunk_embeddings for the one that a run goes over to.';

CREATE FUNCTION has_unwanted_embeddings() RETURNS boolean LANGUAGE sql STABLE AS $$
    -- One look into an index for each model, however many vectors it has.
    WITH RECURSIVE stored (embedding_model) AS (
        SELECT min(s.embedding_model) FROM chunk_embeddings AS s
        UNION ALL
        SELECT (SELECT min(s.embedding_model) FROM chunk_embeddings AS s WHERE s.embedding_model > p.embedding_model)
        FROM stored AS p
        WHERE p.embedding_model IS NOT NULL
    ), listed (embedding_model) AS (
        SELECT min(l.embedding_model) FROM embeddings_to_make AS l
        UNION ALL
        SELECT (SELECT min(l.embedding_model) FROM embeddings_to_make AS l WHERE l.embedding_model > p.embedding_model)
        FROM listed AS p
        WHERE p.embedding_model IS NOT NULL
    )
    SELECT EXISTS (SELECT FROM stored AS s WHERE embedding_table(s.embedding_model) <> 'chunk_embeddings' AND s.embedding_model IS NOT NULL)
        OR EXISTS (
            SELECT FROM listed AS l
            WHERE l.embedding_model IS NOT NULL AND l.embedding_model NOT IN (SELECT w FROM wanted_embedding_models() AS w)
        );
$$;
COMMENT ON FUNCTION has_unwanted_embeddings IS 'Whether something lies aside or is listed for a model that no longer needs it.';

CREATE FUNCTION embedding_sets_lock() RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN hashtextextended('docmill embedding sets', 0);
COMMENT ON FUNCTION embedding_sets_lock IS 'Key of the advisory lock that writers of passages share, and that the switch and the listing hold alone.';

CREATE FUNCTION list_lacking_embeddings() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
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
    INSERT INTO embeddings_to_make AS l (embedding_model, doc_id, passages, is_urgent)
    SELECT w, f.doc_id, count(*), TRUE
    FROM wanted_embedding_models() AS w
    JOIN fresh AS f ON f.embedding_model <> w
    GROUP BY w, f.doc_id
    ON CONFLICT (embedding_model, doc_id) DO UPDATE
    SET passages = EXCLUDED.passages, is_urgent = TRUE, attempts = 0, not_before = NULL, error_message = NULL;
    RETURN NULL;
END;
$$;
COMMENT ON FUNCTION list_lacking_embeddings IS 'Lists new passages that lack a wanted vector; the first passage of all decides which model serves.';

CREATE TRIGGER document_chunks_lacking AFTER INSERT ON document_chunks REFERENCING NEW TABLE AS fresh
    FOR EACH STATEMENT EXECUTE FUNCTION list_lacking_embeddings();

-- What was there before: the commonest model serves, passages of others are listed.
INSERT INTO serving_embeddings (embedding_model, dimensions)
SELECT m.embedding_model, (SELECT vector_dims(c.embedding) FROM document_chunks AS c WHERE c.embedding_model = m.embedding_model LIMIT 1)
FROM (SELECT c.embedding_model FROM document_chunks AS c GROUP BY c.embedding_model ORDER BY count(*) DESC, c.embedding_model LIMIT 1) AS m;
INSERT INTO embeddings_to_make (embedding_model, doc_id, passages, is_urgent)
SELECT s.embedding_model, c.doc_id, count(*), TRUE
FROM serving_embeddings AS s
JOIN document_chunks AS c ON c.embedding_model <> s.embedding_model
GROUP BY s.embedding_model, c.doc_id;

-- What is due, and the job that does it.

CREATE FUNCTION reembedding_steps() RETURNS TABLE (step text, embedding_model text, reembedding_id bigint) LANGUAGE plpgsql STABLE AS $$
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
        WHERE l.embedding_model = serving AND l.is_urgent AND coalesce(l.not_before, now()) <= now()
    );
    IF r.state = 'running' AND r.listed_at IS NULL THEN
        RETURN QUERY SELECT 'list', r.to_model, r.id;
    ELSIF r.state IN ('running', 'ready') THEN
        IF EXISTS (
            SELECT FROM embeddings_to_make AS l WHERE l.embedding_model = r.to_model AND coalesce(l.not_before, now()) <= now()
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
COMMENT ON FUNCTION reembedding_steps IS 'What is to be done now to give every passage its wanted vectors, in order; no row when there is nothing to do.';

CREATE FUNCTION queue_reembedding(delay_seconds double precision DEFAULT 0, own_job_id bigint DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    wanted integer;
BEGIN
    IF EXISTS (SELECT FROM procrastinate_jobs AS j WHERE j.status = 'todo' AND j.queueing_lock = 'reembed')
        OR EXISTS (
            SELECT FROM procrastinate_jobs AS j
            WHERE j.status = 'doing' AND j.task_name = 'reembed' AND j.id IS DISTINCT FROM own_job_id
        )
        OR NOT EXISTS (SELECT FROM reembedding_steps())
    THEN
        RETURN NULL;
    END IF;
    SELECT r.priority INTO wanted FROM reembeddings AS r WHERE r.state IN ('running', 'paused', 'ready', 'switched');
    RETURN (procrastinate_defer_jobs_v1(ARRAY[ROW(
        'embed', 'reembed', coalesce(wanted, -10), NULL, 'reembed', '{}',
        CASE WHEN delay_seconds > 0 THEN clock_timestamp() + make_interval(secs => delay_seconds) END
    )::procrastinate_job_to_defer_v1]))[1];
EXCEPTION WHEN unique_violation THEN
    RETURN NULL;
END;
$$;
COMMENT ON FUNCTION queue_reembedding IS 'Defers the job that does the next steps and returns its id; null where there is nothing to do or a job waits or runs already.';

CREATE FUNCTION await_passage_writers() RETURNS void LANGUAGE sql SET lock_timeout = '2s' AS $$
    SELECT pg_advisory_xact_lock(embedding_sets_lock());
$$;
COMMENT ON FUNCTION await_passage_writers IS 'Waits until every transaction that inserted passages before has ended; in a transaction of its own it lets go at once.';

CREATE FUNCTION list_documents_to_embed(reembedding_id bigint) RETURNS void LANGUAGE plpgsql AS $$
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
    INSERT INTO embeddings_to_make (embedding_model, doc_id, passages, is_urgent)
    SELECT r.to_model, c.doc_id, count(*), FALSE FROM document_chunks AS c GROUP BY c.doc_id
    ON CONFLICT DO NOTHING;
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
COMMENT ON FUNCTION list_documents_to_embed IS 'Lists every document for a run: to be embedded, or after its switch to be moved. Only after await_passage_writers.';

CREATE FUNCTION store_embeddings(
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
        WHERE l.embedding_model = store_embeddings.embedding_model AND l.doc_id = k.doc_id AND k.lacking > 0 AND k.lacking < k.passages
        RETURNING l.doc_id
    )
    SELECT (SELECT count(*) FROM whole), coalesce(sum(k.passages - k.lacking), 0)::integer INTO settled, got_on
    FROM looked AS k
    WHERE k.doc_id IN (SELECT w.doc_id FROM whole AS w UNION ALL SELECT p.doc_id FROM parts AS p);
END;
$$;
COMMENT ON FUNCTION store_embeddings IS 'Keeps vectors of passages that still exist, and takes documents that lack nothing any more off the list; returns how many of each, and how many passages fewer are listed.';

CREATE FUNCTION put_off_embeddings(
    embedding_model text, doc_ids text[], message text, delay_seconds double precision
) RETURNS integer LANGUAGE sql AS $$
    WITH failed AS (
        UPDATE embeddings_to_make AS l
        SET attempts = l.attempts + 1, error_message = message, not_before = now() + make_interval(secs => delay_seconds * 2 ^ least(l.attempts, 10))
        WHERE l.embedding_model = put_off_embeddings.embedding_model AND l.doc_id = ANY(put_off_embeddings.doc_ids)
        RETURNING l.attempts
    )
    SELECT max(f.attempts) FROM failed AS f;
$$;
COMMENT ON FUNCTION put_off_embeddings IS 'Notes that documents could not be embedded, why, and that they wait (delay_seconds, doubled with each failure); returns the most failures of one.';

CREATE FUNCTION move_embeddings(after_doc text, most integer, OUT moved integer, OUT last_doc text) LANGUAGE plpgsql AS $$
DECLARE
    serving text;
    picked text[];
    held text[];
BEGIN
    moved := 0;
    PERFORM pg_advisory_xact_lock_shared(embedding_sets_lock());
    SELECT r.to_model INTO serving FROM reembeddings AS r WHERE r.state = 'switched' AND r.moved_at IS NULL;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT array_agg(p.doc_id), max(p.doc_id) INTO picked, last_doc
    FROM (
        SELECT l.doc_id, sum(l.passages) OVER (ORDER BY l.doc_id) - l.passages AS before
        FROM (
            SELECT e.doc_id, e.passages FROM embeddings_to_make AS e
            WHERE e.embedding_model = serving AND NOT e.is_urgent AND e.doc_id > after_doc
            ORDER BY e.doc_id
            LIMIT 64
        ) AS l
    ) AS p
    WHERE p.before < most;
    SELECT array_agg(d.doc_id) INTO held
    FROM (SELECT f.doc_id FROM file_extractions AS f WHERE f.doc_id = ANY(picked) ORDER BY f.id FOR NO KEY UPDATE SKIP LOCKED) AS d;
    WITH due AS (
        SELECT s.chunk_id, s.embedding
        FROM document_chunks AS c
        JOIN chunk_embeddings AS s ON s.chunk_id = c.id AND s.embedding_model = serving
        WHERE c.doc_id = ANY(held) AND c.embedding_model <> serving
        LIMIT most
    )
    UPDATE document_chunks AS c SET embedding = d.embedding, embedding_model = serving FROM due AS d WHERE c.id = d.chunk_id;
    GET DIAGNOSTICS moved = ROW_COUNT;
    WITH looked AS (
        SELECT p.doc_id, count(c.id) AS lacking, count(s.chunk_id) AS movable
        FROM unnest(picked) AS p (doc_id)
        LEFT JOIN document_chunks AS c ON c.doc_id = p.doc_id AND c.embedding_model <> serving
        LEFT JOIN chunk_embeddings AS s ON s.chunk_id = c.id AND s.embedding_model = serving
        WHERE p.doc_id = ANY(held) OR NOT EXISTS (SELECT FROM file_extractions AS f WHERE f.doc_id = p.doc_id)
        GROUP BY p.doc_id
    ), whole AS (
        DELETE FROM embeddings_to_make AS l
        USING looked AS k
        WHERE l.embedding_model = serving AND l.doc_id = k.doc_id AND k.lacking = 0
    )
    UPDATE embeddings_to_make AS l
    SET passages = k.lacking, is_urgent = k.movable = 0
    FROM looked AS k
    WHERE l.embedding_model = serving AND l.doc_id = k.doc_id AND k.lacking > 0;
END;
$$;
COMMENT ON FUNCTION move_embeddings IS
    'Replaces some vectors in document_chunks by those of the model that serves now. Documents that somebody holds wait. last_doc is null at the end of the list.';

CREATE FUNCTION settle_embeddings(reembedding_id bigint) RETURNS boolean LANGUAGE plpgsql SET lock_timeout = '2s' AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(embedding_sets_lock());
    UPDATE reembeddings AS r SET moved_at = clock_timestamp(), updated_at = clock_timestamp()
    WHERE r.id = settle_embeddings.reembedding_id AND r.state = 'switched' AND r.moved_at IS NULL AND r.move_listed_at IS NOT NULL
        AND NOT EXISTS (SELECT FROM embeddings_to_make AS l WHERE l.embedding_model = r.to_model AND NOT l.is_urgent);
    RETURN FOUND;
END;
$$;
COMMENT ON FUNCTION settle_embeddings IS 'Lets searches go back to document_chunks, once it holds all that has been made of the serving model''s set.';

CREATE FUNCTION clear_embeddings(most integer) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    cleared integer;
    unlisted integer;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(embedding_sets_lock());
    DELETE FROM chunk_embeddings AS s
    WHERE (s.chunk_id, s.embedding_model) IN (
        SELECT e.chunk_id, e.embedding_model
        FROM chunk_embeddings AS e
        WHERE e.embedding_model NOT IN (
            SELECT r.to_model FROM reembeddings AS r
            WHERE r.state IN ('running', 'paused', 'ready', 'switched') AND r.moved_at IS NULL
        )
        LIMIT most
    );
    GET DIAGNOSTICS cleared = ROW_COUNT;
    DELETE FROM embeddings_to_make AS l
    WHERE (l.embedding_model, l.doc_id) IN (
        SELECT e.embedding_model, e.doc_id
        FROM embeddings_to_make AS e
        WHERE e.embedding_model NOT IN (SELECT w FROM wanted_embedding_models() AS w)
        LIMIT most
    );
    GET DIAGNOSTICS unlisted = ROW_COUNT;
    RETURN cleared + unlisted;
END;
$$;
COMMENT ON FUNCTION clear_embeddings IS 'Deletes some of what lies aside or is listed for a model that no longer needs it; returns how much.';

-- What people do.

CREATE FUNCTION share_embeddings_with_readers() RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    reader record;
BEGIN
    FOR reader IN
        SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END AS name
        FROM pg_class AS c
        CROSS JOIN aclexplode(c.relacl) AS a
        WHERE c.oid = 'document_chunks'::regclass AND a.privilege_type = 'SELECT'
            AND NOT has_table_privilege(a.grantee, 'chunk_embeddings'::regclass, 'SELECT')
    LOOP
        EXECUTE format('GRANT SELECT ON chunk_embeddings TO %s', reader.name);
    END LOOP;
END;
$$;
COMMENT ON FUNCTION share_embeddings_with_readers IS 'Lets whoever may read document_chunks read chunk_embeddings, where searches look while a run is under way.';

CREATE FUNCTION start_reembedding(to_model text, switch text DEFAULT 'auto', priority integer DEFAULT -10) RETURNS bigint LANGUAGE plpgsql AS $$
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
    PERFORM queue_reembedding();
    RETURN made;
END;
$$;
COMMENT ON FUNCTION start_reembedding IS 'Begins to make the vectors of another model (named with its version) and returns the number of the run.';

CREATE FUNCTION open_reembedding() RETURNS reembeddings LANGUAGE plpgsql AS $$
DECLARE
    r reembeddings;
BEGIN
    SELECT o.* INTO r FROM reembeddings AS o WHERE o.state IN ('running', 'paused', 'ready', 'switched') FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no re-embedding is under way' USING ERRCODE = 'no_data_found';
    END IF;
    RETURN r;
END;
$$;
COMMENT ON FUNCTION open_reembedding IS 'Locks and returns the open run, or raises.';

CREATE FUNCTION pause_reembedding() RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    r reembeddings := open_reembedding();
BEGIN
    UPDATE reembeddings AS o SET state = 'paused', updated_at = now() WHERE o.id = r.id AND o.state <> 'paused';
    RETURN 'paused';
END;
$$;
COMMENT ON FUNCTION pause_reembedding IS 'Stops the open run after the batch in hand. What arrives meanwhile is listed; searches go on as they are.';

CREATE FUNCTION resume_reembedding() RETURNS text LANGUAGE plpgsql AS $$
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
    PERFORM queue_reembedding();
    RETURN r.state;
END;
$$;
COMMENT ON FUNCTION resume_reembedding IS 'Lets a paused run go on, and tries at once again what had failed; returns the state.';

CREATE FUNCTION cancel_reembedding() RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    r reembeddings := open_reembedding();
BEGIN
    IF r.switched_at IS NOT NULL THEN
        RAISE EXCEPTION 're-embedding % has switched to "%" already; start one back to "%" instead', r.id, r.to_model, r.from_model
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    UPDATE reembeddings AS o SET state = 'cancelled', updated_at = now(), error_message = NULL WHERE o.id = r.id;
    PERFORM queue_reembedding();
    RETURN 'cancelled';
END;
$$;
COMMENT ON FUNCTION cancel_reembedding IS 'Gives the open run up before its switch; a worker then removes what it has made.';

CREATE FUNCTION switch_reembedding(despite_lacking boolean DEFAULT FALSE) RETURNS text LANGUAGE plpgsql SET lock_timeout = '5s' AS $$
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
    PERFORM queue_reembedding();
    RETURN r.state;
END;
$$;
COMMENT ON FUNCTION switch_reembedding IS
    'Lets the new set serve: at once if it is ready and whole, else as soon as it is; returns the state. despite_lacking: now, although passages lack a vector.';

CREATE VIEW reembedding_status WITH (security_invoker = true) AS
SELECT
    r.id, r.state, r.from_model, r.to_model, r.switch, r.priority, r.done, r.done + l.lacking AS total, l.lacking, l.failing, l.to_move,
    p.rate, CASE WHEN r.state = 'running' THEN l.lacking / nullif(p.rate, 0) END AS seconds_left,
    coalesce(r.error_message, l.error_message) AS error_message, r.worker, r.started_at, r.updated_at, r.ready_at, r.switched_at, r.ended_at
FROM reembeddings AS r
CROSS JOIN LATERAL (
    SELECT coalesce(sum(e.passages) FILTER (WHERE e.is_urgent OR r.switched_at IS NULL), 0) AS lacking,
        coalesce(sum(e.passages) FILTER (WHERE NOT e.is_urgent AND r.switched_at IS NOT NULL), 0) AS to_move, count(e.error_message) AS failing, max(e.error_message) AS error_message
    FROM embeddings_to_make AS e
    WHERE e.embedding_model = r.to_model AND r.state IN ('running', 'paused', 'ready', 'switched')
) AS l
CROSS JOIN LATERAL (
    SELECT CASE WHEN r.done > r.done_before THEN
        (r.done - r.done_before) / nullif(extract(epoch FROM coalesce(r.ready_at, r.updated_at) - r.resumed_at), 0)::double precision
    END AS rate
) AS p;
COMMENT ON VIEW reembedding_status IS 'Every run of re-embedding with its progress in passages.';
COMMENT ON COLUMN reembedding_status.total IS 'Passages that it is about, those that arrived meanwhile included.';
COMMENT ON COLUMN reembedding_status.lacking IS 'Passages that still lack a vector of the new model.';
COMMENT ON COLUMN reembedding_status.failing IS 'Documents of them that could not be embedded when last tried.';
COMMENT ON COLUMN reembedding_status.to_move IS 'After the switch: passages whose vectors have not been moved into document_chunks yet.';
COMMENT ON COLUMN reembedding_status.rate IS 'Passages a second since it was last begun or resumed, pauses for other work included.';
COMMENT ON COLUMN reembedding_status.seconds_left IS 'Until all vectors are made, at that rate.';

-- Searching.

CREATE OR REPLACE FUNCTION nearest_chunks(
    query_vector vector, embedding_model text, user_id text, batch_id text, file_type text, metadata jsonb, limit_to integer
) RETURNS TABLE (chunk_id uuid, score double precision) LANGUAGE plpgsql STABLE
SET hnsw.iterative_scan = strict_order
SET hnsw.ef_search = 200
SET jit = off
AS $$
-- Statements are made and planned anew at each call: the planner must see the model, or it cannot use the model's partial index, and the
-- filters, or it cannot choose between walking the index and sorting the few passages that pass. All of a call's statements see one snapshot,
-- so it does not matter when searches go over to another table.
DECLARE
    dimensions integer := vector_dims(query_vector);
    filter text := search_filter(user_id, batch_id, file_type, metadata);
    place CONSTANT text := embedding_table(embedding_model);
    key CONSTANT text := CASE place WHEN 'document_chunks' THEN 'c.id' ELSE 'c.chunk_id' END;
    exact CONSTANT text := 'c.embedding <=> $1';
    indexed CONSTANT text := format('c.embedding::vector(%1$s) <=> $1::vector(%1$s)', dimensions);
    few CONSTANT integer := 3000;
    reach bigint;
    distance text;
    ids uuid[];
    scores double precision[];
BEGIN
    IF query_vector IS NULL OR vector_norm(query_vector) = 0 THEN
        RETURN;
    END IF;
    PERFORM set_config('hnsw.ef_search', greatest(200, check_search_limit(limit_to))::text, true);
    -- A few thousand passages are sorted as quickly as an index is walked past all those that a filter hides, and exactly.
    SELECT r.reltuples INTO reach FROM pg_class AS r WHERE r.oid = place::regclass;
    IF reach < few OR filter <> 'true' THEN
        EXECUTE format(
            'SELECT count(*) FROM (SELECT FROM %I AS c WHERE c.embedding_model = %L AND %s LIMIT %s) AS c',
            place, embedding_model, filter, few
        ) INTO reach;
    END IF;
    -- An index scan gives up after hnsw.max_scan_tuples: where it found too few, the search is repeated exactly.
    FOREACH distance IN ARRAY CASE WHEN reach < few THEN ARRAY[exact] ELSE ARRAY[indexed, exact] END LOOP
        EXECUTE format(
            'SELECT array_agg(f.id ORDER BY f.distance, f.id), array_agg(1 - f.distance ORDER BY f.distance, f.id)
             FROM (SELECT %5$s AS id, %1$s AS distance FROM %6$I AS c WHERE c.embedding_model = %2$L AND %3$s
                   ORDER BY %1$s LIMIT %4$s) AS f', distance, embedding_model, filter, limit_to, key, place
        ) INTO ids, scores USING query_vector;
        EXIT WHEN cardinality(ids) = limit_to;
    END LOOP;
    RETURN QUERY SELECT f.id, f.score FROM unnest(ids, scores) AS f (id, score);
END;
$$;

CALL pin_search_path();
