-- Row-level security: who may see and change whose rows. docs/row-security.md describes it for people.
--
-- Roles belong to the cluster and not to a database, and not everybody who migrates may create them. So nothing here names one that must
-- exist: the tables below say what each role may do with each relation, and secure_relation() does it, once `docmill roles create` has made
-- the roles (`docmill migrate` calls it again for what has changed since). Until then nobody but the owner has a right to anything, as before.
--
-- Whose rows a session sees is decided by who has logged in (session_user), which no SET changes: a person's login is mapped to its user by
-- the table user_logins; a login that is a member of docmill_app is an application that names the user itself, by docmill.user_id.
-- The owner of the tables is not bound by any of it, nor is a superuser.

CREATE TABLE user_logins (
    login name PRIMARY KEY CHECK (login <> ''),
    user_id text NOT NULL CHECK (length(user_id) BETWEEN 1 AND 200 AND user_id !~ '[[:cntrl:]]'),
    granted_at timestamptz NOT NULL DEFAULT now(),
    granted_by name NOT NULL DEFAULT session_user
);
COMMENT ON TABLE user_logins IS 'Which user a person who logs in is: `docmill roles grant LOGIN --user USER` writes it. A login that is not here sees nothing.';
COMMENT ON COLUMN user_logins.login IS 'Name of the role that logs in. Take the row away with the role: a new role of the same name would inherit it.';
COMMENT ON COLUMN user_logins.user_id IS 'The user whose rows it sees.';
COMMENT ON COLUMN user_logins.granted_at IS 'When it was so decided.';
COMMENT ON COLUMN user_logins.granted_by IS 'Who did.';

CREATE TABLE relation_rights (
    relation name PRIMARY KEY,
    rows_of_user text,
    reader text NOT NULL DEFAULT '' CHECK (reader ~ '^(SELECT( \([a-z_, ]+\))?)?$'),
    app text NOT NULL DEFAULT '',
    worker text NOT NULL DEFAULT 'SELECT, INSERT, UPDATE, DELETE',
    operator text NOT NULL DEFAULT 'SELECT' CHECK (operator IN ('', 'SELECT'))
);
COMMENT ON TABLE relation_rights IS 'What each role may do with each table, view and free-standing sequence; a migration that makes one adds its row. SELECT secure_relation(relation) grants it.';
COMMENT ON COLUMN relation_rights.relation IS 'The table, view or sequence.';
COMMENT ON COLUMN relation_rights.rows_of_user IS
    'Condition for the rows that docmill_reader and docmill_app see and write. Null: none, whatever they are granted. TRUE: there is nothing of any user''s in it, so no row-level security. A view shows what the tables below it do.';
COMMENT ON COLUMN relation_rights.reader IS 'What docmill_reader, a person, may do with those rows.';
COMMENT ON COLUMN relation_rights.app IS 'What docmill_app, an application that names the user, may do with those rows.';
COMMENT ON COLUMN relation_rights.worker IS 'What docmill_worker may do with all rows.';
COMMENT ON COLUMN relation_rights.operator IS 'What docmill_operator may do with all rows.';

INSERT INTO relation_rights (relation, rows_of_user, reader, app) VALUES
    -- Rows that name their user.
    ('processing_jobs', 'user_id = (SELECT acting_user())', 'SELECT', 'SELECT, INSERT, UPDATE, DELETE'),
    ('file_extractions', 'user_id = (SELECT acting_user())', 'SELECT', 'SELECT, INSERT, UPDATE, DELETE'),
    ('document_chunks', 'user_id = (SELECT acting_user())', 'SELECT', 'SELECT'),
    ('chunk_embeddings', 'user_id = (SELECT acting_user())', 'SELECT', 'SELECT'),
    ('document_events', 'user_id = (SELECT acting_user())', 'SELECT', 'SELECT, INSERT'),
    ('dead_letters', 'user_id = (SELECT acting_user())', 'SELECT', 'SELECT, INSERT, UPDATE'),
    ('run_summaries', 'user_id = (SELECT acting_user())', 'SELECT', 'SELECT, INSERT, UPDATE, DELETE'),
    ('batch_archives', 'user_id = (SELECT acting_user())', 'SELECT', 'SELECT, INSERT, UPDATE, DELETE'),
    -- A call that several users shared is nobody's to see; cost_totals has everybody's part of it.
    ('provider_usage', 'cardinality(user_ids) > 0 AND user_ids <@ ARRAY[(SELECT acting_user())]', 'SELECT', 'SELECT'),
    ('procrastinate_jobs', 'docmill_user = (SELECT acting_user())', 'SELECT', 'SELECT, INSERT, UPDATE'),
    -- Rows of a document, batch or job.
    ('document_markdown', 'EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = document_markdown.doc_id AND d.user_id = (SELECT acting_user()))', 'SELECT', 'SELECT, DELETE'),
    ('chunk_buffer', 'EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = chunk_buffer.doc_id AND d.user_id = (SELECT acting_user()))', '', 'SELECT, DELETE'),
    ('vector_buffer', 'EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = vector_buffer.doc_id AND d.user_id = (SELECT acting_user()))', '', 'SELECT, DELETE'),
    ('extraction_buffer', 'EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = extraction_buffer.doc_id AND d.user_id = (SELECT acting_user()))', '', 'SELECT, DELETE'),
    ('hosted_jobs', 'EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = hosted_jobs.doc_id AND d.user_id = (SELECT acting_user()))', '', 'SELECT, DELETE'),
    ('folder_files', 'EXISTS (SELECT FROM processing_jobs AS b WHERE b.batch_id = folder_files.batch_id AND b.user_id = (SELECT acting_user()))', '', 'SELECT, INSERT, UPDATE, DELETE'),
    ('cost_totals', 'CASE scope WHEN ''document'' THEN EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = cost_totals.name AND d.user_id = (SELECT acting_user())) ELSE EXISTS (SELECT FROM processing_jobs AS b WHERE b.batch_id = cost_totals.name AND b.user_id = (SELECT acting_user())) END', 'SELECT', 'SELECT'),
    ('procrastinate_events', 'EXISTS (SELECT FROM procrastinate_jobs AS j WHERE j.id = procrastinate_events.job_id AND j.docmill_user = (SELECT acting_user()))', 'SELECT', 'SELECT, INSERT'),
    -- Of all users together, or of none: for workers and operators.
    ('alerts', NULL, '', ''),
    ('alert_rules', NULL, '', ''),
    ('alert_conditions', NULL, '', ''),
    ('provider_budgets', NULL, '', ''),
    ('circuit_breakers', NULL, '', ''),
    ('embeddings_to_make', NULL, '', ''),
    ('reembeddings', NULL, '', ''),
    ('procrastinate_periodic_defers', NULL, '', ''),
    -- Nothing of any user's to see. Deletions write to the first two; their rows name files and batches that are gone.
    ('files_to_remove', 'TRUE', '', 'SELECT, INSERT, UPDATE, DELETE'),
    ('summaries_to_renew', 'TRUE', '', 'SELECT, INSERT, DELETE'),
    ('serving_embeddings', 'TRUE', 'SELECT', 'SELECT'),
    -- But for the documents in hand: the view worker_health has each asker's own.
    ('worker_registry', 'TRUE', 'SELECT (worker, active_jobs)', 'SELECT (worker, active_jobs)'),
    ('procrastinate_workers', 'TRUE', 'SELECT', 'SELECT'),
    ('docmill_migrations', 'TRUE', 'SELECT', 'SELECT'),
    -- Views.
    ('document_status', NULL, 'SELECT', 'SELECT'),
    ('batch_status', NULL, 'SELECT', 'SELECT'),
    ('batch_progress', NULL, 'SELECT', 'SELECT'),
    ('dead_letter_queue', NULL, 'SELECT', 'SELECT'),
    ('duplicate_documents', NULL, 'SELECT', 'SELECT'),
    ('stuck_documents', NULL, 'SELECT', 'SELECT'),
    ('queue_depth', NULL, 'SELECT', 'SELECT'),
    ('worker_health', NULL, 'SELECT', 'SELECT'),
    ('throughput', NULL, 'SELECT', 'SELECT'),
    ('stage_latency', NULL, 'SELECT', 'SELECT'),
    ('cost_by_document', NULL, 'SELECT', 'SELECT'),
    ('cost_by_batch', NULL, 'SELECT', 'SELECT'),
    ('provider_health', NULL, '', ''),
    ('provider_budget_use', NULL, '', ''),
    ('reembedding_status', NULL, '', ''),
    ('embedding_coverage', NULL, '', ''),
    ('index_health', NULL, '', ''),
    ('alert_findings', NULL, '', ''),
    ('open_alerts', NULL, '', '');
INSERT INTO relation_rights (relation, rows_of_user, worker) VALUES ('user_logins', NULL, ''), ('relation_rights', NULL, '');
INSERT INTO relation_rights (relation, rows_of_user, app, worker, operator) VALUES ('document_claims', 'TRUE', 'USAGE', 'USAGE', '');
UPDATE relation_rights SET worker = 'SELECT' WHERE relation = 'docmill_migrations';

-- Who is asking. These run as the owner, because nobody else may read user_logins, and ask session_user, because current_user is the owner.

CREATE FUNCTION acting_user() RETURNS text LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER AS $$
    -- An empty setting is what SET LOCAL leaves behind when its transaction ends.
    SELECT CASE
        WHEN EXISTS (SELECT FROM pg_roles AS r WHERE r.rolname = 'docmill_app' AND pg_has_role(session_user, r.oid, 'MEMBER'))
            THEN nullif(current_setting('docmill.user_id', TRUE), '')
        ELSE (SELECT l.user_id FROM user_logins AS l WHERE l.login = session_user)
    END;
$$;
COMMENT ON FUNCTION acting_user IS
    'The user whose rows this session may see: the one its login is mapped to or, for an application, the one that docmill.user_id names; null for nobody.';

CREATE FUNCTION confined_to() RETURNS text LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER AS $$
    SELECT CASE
        WHEN NOT c.relrowsecurity OR EXISTS (
            SELECT FROM pg_roles AS r
            WHERE (r.oid = c.relowner OR r.rolsuper OR r.rolbypassrls OR r.rolname IN ('docmill_worker', 'docmill_operator'))
                AND pg_has_role(session_user, r.oid, 'MEMBER')
        ) THEN NULL
        ELSE coalesce(acting_user(), '')
    END
    FROM pg_class AS c
    WHERE c.oid = 'document_chunks'::regclass;
$$;
COMMENT ON FUNCTION confined_to IS
    'The user whose rows a search of this session is confined to; empty for nobody''s; null for a session that sees all, as everybody does who may read at all before `docmill roles create`.';

CREATE FUNCTION may_select(relation text) RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER AS $$
    SELECT has_table_privilege(session_user, relation::regclass, 'SELECT') OR EXISTS (
        SELECT FROM pg_roles AS r
        WHERE pg_has_role(session_user, r.oid, 'MEMBER') AND has_table_privilege(r.oid, relation::regclass, 'SELECT')
    );
$$;
COMMENT ON FUNCTION may_select IS 'Whether whoever has logged in may read a table or view, by itself or as a role it may take on. For functions that run as their owner.';

CREATE FUNCTION workers_seen() RETURNS SETOF worker_registry LANGUAGE sql STABLE SECURITY DEFINER AS $$
    SELECT w.worker, w.host, w.pid, w.queues, w.concurrency, w.started_at, w.heartbeat_at, w.stopping, w.active_jobs,
        CASE WHEN confined_to() IS NULL THEN w.documents ELSE ARRAY(
            SELECT d.doc_id FROM file_extractions AS d WHERE d.doc_id = ANY(w.documents) AND d.user_id = confined_to()
        ) END,
        w.memory_mb, w.cpu_seconds, w.version, w.connections, w.cpu_share
    FROM worker_registry AS w
    WHERE may_select('worker_health');
$$;
COMMENT ON FUNCTION workers_seen IS 'worker_registry for whoever may read worker_health, with no documents in hand but the asker''s own.';

CREATE OR REPLACE VIEW worker_health WITH (security_invoker = true) AS
SELECT
    w.worker, w.host, w.pid,
    CASE
        WHEN w.heartbeat_at < now() - interval '2 minutes' THEN 'dead'
        WHEN w.heartbeat_at < now() - interval '30 seconds' THEN 'silent'
        WHEN w.stopping THEN 'stopping'
        ELSE 'alive'
    END AS health,
    w.queues, w.concurrency, cardinality(w.active_jobs) AS jobs, w.documents, w.memory_mb, w.cpu_share, w.cpu_seconds, w.connections,
    w.started_at, w.heartbeat_at, date_trunc('second', now() - w.heartbeat_at) AS silent_for, w.version
FROM workers_seen() AS w;

-- Searches. A condition that a user writes is checked behind row-level security unless it can leak nothing, and Postgres holds `@@` to be able
-- to: a reader's search by word could not use its index. So these run as the owner and confine themselves, by a condition that the planner
-- sees as any other; whatever they find is then read from the tables under row-level security by search_by_text and its like.

CREATE OR REPLACE FUNCTION search_filter(user_id text, batch_id text, file_type text, metadata jsonb) RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
RETURN concat(
    'true',
    ' AND c.user_id = ' || quote_literal(confined_to()),
    ' AND c.user_id = ' || quote_literal(user_id),
    ' AND c.doc_id IN (SELECT d.doc_id FROM file_extractions AS d WHERE true' || nullif(concat(
        ' AND d.batch_id = ' || quote_literal(batch_id),
        ' AND d.file_type = ' || quote_literal(file_type),
        ' AND d.metadata @> ' || quote_literal(metadata) || '::jsonb'
    ), '') || ')'
);
COMMENT ON FUNCTION search_filter IS
    'An SQL condition on document_chunks AS c with every value quoted; a filter that is null lets all pass. Holds for the asker''s own passages alone where confined_to() says so.';

CREATE OR REPLACE FUNCTION weigh_words(query_text text, language text) RETURNS TABLE (query tsquery, weight double precision, passages double precision)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET enable_seqscan = off
SET jit = off
AS $$
-- How many passages hold a word is counted in a small table. In a large one that would cost more than the search for common words, so
-- words that are frequent in a sample are estimated from it, and the others are counted up to a limit. Only what the asker may see counts:
-- else the score of a passage of one's own would tell how rare its words are in everybody's.
DECLARE
    counted CONSTANT integer := 1000;
    confined CONSTANT text := confined_to();
    own CONSTANT text := coalesce('c.user_id = ' || quote_literal(confined), 'true');
    total double precision;
    few double precision;
    sample tsvector[];
    sampled double precision := 0;
    variants integer;
BEGIN
    IF NOT may_select('document_chunks') THEN
        RAISE EXCEPTION 'permission denied for table document_chunks' USING ERRCODE = 'insufficient_privilege';
    END IF;
    SELECT r.reltuples INTO total FROM pg_class AS r WHERE r.oid = 'document_chunks'::regclass;
    IF total < 20 * counted OR confined IS NOT NULL THEN
        EXECUTE format('SELECT count(*) FROM (SELECT FROM document_chunks AS c WHERE %s LIMIT %s) AS c', own, 20 * counted) INTO few;
    END IF;
    IF few < 20 * counted OR total < 20 * counted THEN
        total := few;
    ELSE
        SELECT array_agg(c.fulltext || '') FILTER (WHERE coalesce(c.user_id = confined, TRUE)),
            greatest(20 * counted, total * count(*) FILTER (WHERE coalesce(c.user_id = confined, TRUE)) / nullif(count(*), 0))
        INTO sample, total
        FROM document_chunks AS c TABLESAMPLE system (100 * 2000 / total) REPEATABLE (0);
    END IF;
    FOR query, variants IN SELECT w.query, w.variants FROM search_words(query_text, language) AS w LOOP
        IF sample IS NOT NULL THEN
            SELECT count(*) FILTER (WHERE s.fulltext @@ query) INTO sampled FROM unnest(sample) AS s (fulltext);
        END IF;
        passages := total * sampled / greatest(cardinality(sample), 1);
        IF sampled < 20 THEN
            EXECUTE format(
                'SELECT greatest(count(*), CASE WHEN count(*) = %s THEN %s ELSE 0 END)
                 FROM (SELECT FROM document_chunks AS c WHERE c.fulltext @@ %L AND %s LIMIT %1$s) AS c',
                CASE WHEN sample IS NULL THEN 20 * counted ELSE counted END, passages, query, own
            ) INTO passages;
            CONTINUE WHEN passages = 0;
        END IF;
        -- ts_rank divides by the number of stems.
        weight := variants * ln(1 + (greatest(total, passages) - passages + 0.5) / (passages + 0.5));
        RETURN NEXT;
    END LOOP;
END;
$$;
COMMENT ON FUNCTION weigh_words IS
    'The words of a query that occur, with their weights by rarity and (about) the number of passages that hold them, among those that the asker may see.';

-- It asks weigh_words first, which refuses whoever may not read passages.
ALTER FUNCTION matching_chunks(text, text, text, text, jsonb, integer, text) SECURITY DEFINER;

-- As before, with each passage looked up by itself: under row-level security the planner takes a user's rows for few, and would rather read
-- all of them first.
CREATE OR REPLACE FUNCTION search_by_vector(
    query_vector vector, embedding_model text, user_id text DEFAULT NULL, batch_id text DEFAULT NULL, file_type text DEFAULT NULL,
    metadata jsonb DEFAULT NULL, limit_to integer DEFAULT 10
) RETURNS TABLE (
    chunk_id uuid, doc_id text, file_name text, version integer, chunk_index integer, content text, heading_path text[],
    page_start integer, page_end integer, score double precision, vector_rank integer, text_rank integer
) LANGUAGE sql STABLE AS $$
    SELECT f.chunk_id, p.doc_id, p.file_name, p.version, p.chunk_index, p.content, p.heading_path, p.page_start, p.page_end,
        f.score, f.rank::integer, NULL::integer
    FROM nearest_chunks(query_vector, embedding_model, user_id, batch_id, file_type, metadata, limit_to)
        WITH ORDINALITY AS f (chunk_id, score, rank)
    CROSS JOIN LATERAL (
        SELECT c.doc_id, d.file_name, c.version, c.chunk_index, c.content, c.heading_path, c.page_start, c.page_end
        FROM document_chunks AS c
        JOIN file_extractions AS d ON d.doc_id = c.doc_id
        WHERE c.id = f.chunk_id
        LIMIT 1
    ) AS p
    ORDER BY f.rank;
$$;

CREATE OR REPLACE FUNCTION search_by_text(
    query_text text, user_id text DEFAULT NULL, batch_id text DEFAULT NULL, file_type text DEFAULT NULL, metadata jsonb DEFAULT NULL,
    limit_to integer DEFAULT 10, language text DEFAULT NULL
) RETURNS TABLE (
    chunk_id uuid, doc_id text, file_name text, version integer, chunk_index integer, content text, heading_path text[],
    page_start integer, page_end integer, score double precision, vector_rank integer, text_rank integer
) LANGUAGE sql STABLE AS $$
    SELECT f.chunk_id, p.doc_id, p.file_name, p.version, p.chunk_index, p.content, p.heading_path, p.page_start, p.page_end,
        f.score, NULL::integer, f.rank::integer
    FROM matching_chunks(query_text, user_id, batch_id, file_type, metadata, limit_to, language)
        WITH ORDINALITY AS f (chunk_id, score, rank)
    CROSS JOIN LATERAL (
        SELECT c.doc_id, d.file_name, c.version, c.chunk_index, c.content, c.heading_path, c.page_start, c.page_end
        FROM document_chunks AS c
        JOIN file_extractions AS d ON d.doc_id = c.doc_id
        WHERE c.id = f.chunk_id
        LIMIT 1
    ) AS p
    ORDER BY f.rank;
$$;

CREATE OR REPLACE FUNCTION search_hybrid(
    query_text text, query_vector vector, embedding_model text, user_id text DEFAULT NULL, batch_id text DEFAULT NULL,
    file_type text DEFAULT NULL, metadata jsonb DEFAULT NULL, limit_to integer DEFAULT 10, language text DEFAULT NULL
) RETURNS TABLE (
    chunk_id uuid, doc_id text, file_name text, version integer, chunk_index integer, content text, heading_path text[],
    page_start integer, page_end integer, score double precision, vector_rank integer, text_rank integer
) LANGUAGE sql STABLE AS $$
    SELECT f.chunk_id, p.doc_id, p.file_name, p.version, p.chunk_index, p.content, p.heading_path, p.page_start, p.page_end,
        f.score, f.vector_rank, f.text_rank
    FROM (
        SELECT chunk_id, coalesce(1.0 / (60 + v.rank), 0)::double precision + coalesce(1.0 / (60 + t.rank), 0)::double precision AS score,
            v.rank::integer AS vector_rank, t.rank::integer AS text_rank
        FROM nearest_chunks(
            query_vector, embedding_model, user_id, batch_id, file_type, metadata, greatest(100, check_search_limit(limit_to))
        ) WITH ORDINALITY AS v (chunk_id, score, rank)
        FULL JOIN matching_chunks(
            query_text, user_id, batch_id, file_type, metadata, greatest(100, check_search_limit(limit_to)), language
        ) WITH ORDINALITY AS t (chunk_id, score, rank) USING (chunk_id)
        ORDER BY score DESC, v.rank, chunk_id
        LIMIT limit_to
    ) AS f
    CROSS JOIN LATERAL (
        SELECT c.doc_id, d.file_name, c.version, c.chunk_index, c.content, c.heading_path, c.page_start, c.page_end
        FROM document_chunks AS c
        JOIN file_extractions AS d ON d.doc_id = c.doc_id
        WHERE c.id = f.chunk_id
        LIMIT 1
    ) AS p
    ORDER BY f.score DESC, f.vector_rank, f.chunk_id;
$$;

-- What readers could use to go further than their rights.

-- As before, and: a document that the application may not see is another's, and does not become visible by asking again.
CREATE OR REPLACE FUNCTION accept_document(
    doc_id text, user_id text, file_name text, file_path text, source_path text, file_size bigint, content_sha256 text,
    metadata jsonb, priority integer, correlation_id text, batch_id text, run_id uuid, lock_timeout_ms integer,
    OUT outcome text, OUT version integer, OUT state document_state
) LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
-- The SET clause restores the caller's own lock_timeout on the way out.
#variable_conflict use_column
DECLARE
    known file_extractions;
    run_status text;
    tries_left integer := 10;
BEGIN
    PERFORM set_config('lock_timeout', accept_document.lock_timeout_ms || 'ms', TRUE);
    IF accept_document.run_id IS NOT NULL THEN
        SELECT b.status INTO run_status
        FROM processing_jobs AS b WHERE b.batch_id = accept_document.batch_id AND b.run_id = accept_document.run_id;
        IF run_status IS NULL OR run_status = 'cancelled' THEN
            RAISE EXCEPTION 'batch "%": %', accept_document.batch_id, CASE
                WHEN run_status = 'cancelled' THEN 'this run of it has been cancelled'
                WHEN EXISTS (SELECT FROM processing_jobs AS b WHERE b.batch_id = accept_document.batch_id) THEN 'a newer run has begun'
                ELSE 'it has been deleted'
            END USING ERRCODE = 'object_not_in_prerequisite_state';
        END IF;
    END IF;
    LOOP
        INSERT INTO file_extractions AS d (
            doc_id, batch_id, run_id, user_id, file_name, file_path, source_path, file_size, content_sha256, priority, correlation_id, metadata
        ) VALUES (
            accept_document.doc_id, accept_document.batch_id, accept_document.run_id, accept_document.user_id,
            accept_document.file_name, accept_document.file_path, accept_document.source_path, accept_document.file_size,
            accept_document.content_sha256, accept_document.priority, accept_document.correlation_id, accept_document.metadata
        ) ON CONFLICT (doc_id) DO NOTHING
        RETURNING d.* INTO known;
        IF FOUND THEN
            outcome := 'accepted';
            EXIT;
        END IF;
        SELECT d.* INTO known FROM file_extractions AS d WHERE d.doc_id = accept_document.doc_id FOR UPDATE;
        EXIT WHEN FOUND;
        -- Deleted while this waited for the lock: then it is a new document. Or there for good, and hidden by row-level security.
        tries_left := tries_left - 1;
        EXIT WHEN tries_left = 0;
    END LOOP;
    IF outcome IS NULL THEN
        IF known.user_id IS DISTINCT FROM accept_document.user_id THEN
            RAISE EXCEPTION 'doc_id "%" is taken; choose another', accept_document.doc_id USING ERRCODE = 'unique_violation';
        END IF;
        IF known.content_sha256 = accept_document.content_sha256 THEN
            -- The same content again: nothing happens, except that a cancelled document is taken up where it was left.
            UPDATE file_extractions AS d SET batch_id = accept_document.batch_id, run_id = accept_document.run_id
            WHERE d.id = known.id AND d.run_id IS DISTINCT FROM accept_document.run_id AND accept_document.run_id IS NOT NULL;
            IF known.replaced_by IS NOT NULL THEN
                -- Its file is back where it was before it was moved.
                UPDATE file_extractions AS d SET replaced_by = NULL WHERE d.id = known.id;
            END IF;
            IF known.state <> 'cancelled' THEN
                outcome := 'unchanged';
                version := known.version;
                state := known.state;
                RETURN;
            END IF;
            UPDATE file_extractions AS d
            SET state = 'queued', claim = d.claim + 1, claim_job_id = NULL, retry_count = 0, crash_count = 0, lone_crash_count = 0,
                requeue_count = 0, alone = FALSE, not_before = NULL, processing_completed_at = NULL, updated_at = now()
            WHERE d.id = known.id RETURNING d.* INTO known;
            outcome := 'resumed';
            UPDATE dead_letters AS l SET resolved_at = now(), resolution = 'requeued'
            WHERE l.doc_id = known.doc_id AND l.resolved_at IS NULL;
        ELSE
            UPDATE file_extractions AS d
            SET version = d.version + 1, milestone = 'uploaded', state = 'queued', claim = d.claim + 1, claim_job_id = NULL,
                lease_until = NULL, batch_id = accept_document.batch_id, run_id = accept_document.run_id,
                file_name = accept_document.file_name, file_path = accept_document.file_path,
                source_path = accept_document.source_path, file_size = accept_document.file_size,
                content_sha256 = accept_document.content_sha256, file_type = NULL, mime_type = NULL, page_count = NULL,
                chunk_count = NULL, duplicate_of = NULL, priority = accept_document.priority,
                correlation_id = accept_document.correlation_id, metadata = accept_document.metadata, retry_count = 0,
                crash_count = 0, lone_crash_count = 0, requeue_count = 0, alone = FALSE, not_before = NULL,
                error_type = NULL, error_message = NULL, updated_at = now(),
                processing_started_at = NULL, processing_completed_at = NULL
            WHERE d.id = known.id RETURNING d.* INTO known;
            outcome := 'new_version';
            DELETE FROM chunk_buffer AS b WHERE b.doc_id = known.doc_id;
            DELETE FROM vector_buffer AS b WHERE b.doc_id = known.doc_id;
            DELETE FROM extraction_buffer AS b WHERE b.doc_id = known.doc_id;
            DELETE FROM document_markdown AS m
            WHERE m.doc_id = known.doc_id AND m.version IS DISTINCT FROM known.served_version;
            UPDATE dead_letters AS l SET resolved_at = now(), resolution = 'superseded'
            WHERE l.doc_id = known.doc_id AND l.resolved_at IS NULL;
        END IF;
        PERFORM drop_waiting_jobs(known.doc_id);
    END IF;
    PERFORM defer_stage(known.doc_id, due_stage(known.milestone), known.priority);
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, event, claim, detail)
    VALUES (known.doc_id, known.version, known.batch_id, known.user_id, known.correlation_id,
        CASE outcome WHEN 'accepted' THEN 'submitted' ELSE 'resubmitted' END, known.claim,
        jsonb_build_object('outcome', outcome, 'file_name', known.file_name, 'file_size', known.file_size));
    version := known.version;
    state := known.state;
END;
$$;

CREATE OR REPLACE FUNCTION alert(kind text, message text, detail jsonb DEFAULT '{}') RETURNS void LANGUAGE plpgsql AS $$
-- The row is the alert; the notification only says that there is one, with as much of it as fits. NOTIFY takes less than 8,000 bytes and
-- more is an error, which would undo whatever the alert is about. A character takes 6 bytes at most. Whoever may connect may listen, so
-- where users are kept apart it says nothing of what happened to whom.
DECLARE
    alert_id bigint;
    told jsonb;
BEGIN
    INSERT INTO alerts AS a (kind, message, detail) VALUES (alert.kind, alert.message, coalesce(alert.detail, '{}')) RETURNING a.id INTO alert_id;
    told := jsonb_build_object('id', alert_id, 'at', now(), 'kind', left(alert.kind, 100));
    IF NOT (SELECT c.relrowsecurity FROM pg_class AS c WHERE c.oid = 'alerts'::regclass) THEN
        told := told || jsonb_build_object('message', left(alert.message, 1000));
        IF octet_length((told || jsonb_build_object('detail', alert.detail))::text) < 7900 THEN
            told := told || jsonb_build_object('detail', alert.detail);
        END IF;
    END IF;
    PERFORM pg_notify('docmill_alerts', told::text);
END;
$$;
COMMENT ON FUNCTION alert IS
    'Keeps an alert in the table alerts and tells whoever listens on the channel docmill_alerts when the transaction commits: all of it, or under row-level security its number and kind.';

-- An application may fail a document of its user, but not write alerts.
ALTER FUNCTION alert_of_dead_letter() SECURITY DEFINER;

CREATE OR REPLACE PROCEDURE pin_search_path() LANGUAGE plpgsql AS $$
-- As before, and the caller's temporary tables are looked into last, where everybody may put what they like: what runs as its owner, and
-- whatever that calls, would take them for ours.
DECLARE
    ours regprocedure;
    path CONSTANT text := (
        SELECT string_agg(quote_ident(s), ', ' ORDER BY place) FROM unnest(current_schemas(FALSE)) WITH ORDINALITY AS p (s, place)
    );
BEGIN
    FOR ours IN
        SELECT p.oid
        FROM pg_proc AS p
        WHERE p.pronamespace = current_schema()::regnamespace AND p.prokind = 'f' AND p.prosqlbody IS NULL
            AND p.prolang IN (SELECT l.oid FROM pg_language AS l WHERE l.lanname IN ('sql', 'plpgsql'))
            AND p.proname NOT LIKE 'procrastinate\_%'
            AND pg_has_role(p.proowner, 'USAGE')
            AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = p.oid AND d.deptype = 'e')
            AND NOT coalesce(array_to_string(p.proconfig, ',') LIKE '%search_path=%pg_temp%', FALSE)
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path TO pg_catalog, %s, pg_temp', ours, path);
    END LOOP;
END;
$$;
COMMENT ON PROCEDURE pin_search_path IS
    'Lets every function of docmill find what it names whatever the caller''s search_path and temporary tables are. Each migration that makes functions ends with it.';

-- Who may run it could make a trigger of it on a table of their own, and have vectors written as the owner.
REVOKE EXECUTE ON FUNCTION list_lacking_embeddings(), alert_of_dead_letter() FROM PUBLIC;

-- Granting.

CREATE FUNCTION secure_relation(relation name) RETURNS boolean LANGUAGE plpgsql SET lock_timeout = '5s' AS $$
-- Changes only what is not so already, so that it takes no lock where there is nothing to do.
DECLARE
    here CONSTANT regclass := to_regclass(quote_ident(relation));
    r relation_rights;
    c pg_class;
    kind text;
    wanted record;
    part record;
    changed boolean := FALSE;
BEGIN
    SELECT w.* INTO STRICT r FROM relation_rights AS w WHERE w.relation = secure_relation.relation;
    SELECT k.* INTO STRICT c FROM pg_class AS k WHERE k.oid = here;
    kind := CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END;
    IF c.relowner <> 'docmill_owner'::regrole THEN
        EXECUTE format('ALTER TABLE %s OWNER TO docmill_owner', here);
        changed := TRUE;
    END IF;
    IF c.relkind = 'r' AND r.rows_of_user IS DISTINCT FROM 'TRUE' THEN
        IF NOT c.relrowsecurity THEN
            EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', here);
            changed := TRUE;
        END IF;
        FOR wanted IN
            SELECT p.name, p.command, p.role, p.condition
            FROM (VALUES
                ('docmill_worker_all', 'ALL', 'docmill_worker', 'TRUE', r.worker <> ''),
                ('docmill_operator_all', 'SELECT', 'docmill_operator', 'TRUE', r.operator <> ''),
                ('docmill_reader_own', 'SELECT', 'docmill_reader', r.rows_of_user, r.reader <> ''),
                ('docmill_app_own', 'ALL', 'docmill_app', r.rows_of_user, r.app <> '')
            ) AS p (name, command, role, condition, is_wanted)
            WHERE p.is_wanted AND p.condition IS NOT NULL AND NOT EXISTS (
                SELECT FROM pg_policy AS q
                WHERE q.polrelid = here AND q.polname = p.name AND obj_description(q.oid, 'pg_policy') = p.condition
            )
        LOOP
            EXECUTE format('DROP POLICY IF EXISTS %I ON %s', wanted.name, here);
            EXECUTE format('CREATE POLICY %I ON %s FOR %s TO %I USING (%s)', wanted.name, here, wanted.command, wanted.role, wanted.condition);
            EXECUTE format('COMMENT ON POLICY %I ON %s IS %L', wanted.name, here, wanted.condition);
            changed := TRUE;
        END LOOP;
    END IF;
    FOR wanted IN
        SELECT p.role, p.rights
        FROM (VALUES ('docmill_worker', r.worker), ('docmill_operator', r.operator), ('docmill_reader', r.reader), ('docmill_app', r.app))
            AS p (role, rights)
    LOOP
        -- What a role holds and should not is taken away as well.
        IF (
            SELECT coalesce(string_agg(g.privilege_type, ', ' ORDER BY array_position(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'USAGE'], g.privilege_type)), '')
            FROM aclexplode(c.relacl) AS g WHERE g.grantee = wanted.role::regrole
        ) <> (CASE WHEN c.relkind = 'v' AND wanted.rights <> '' THEN 'SELECT' WHEN wanted.rights LIKE '%(%' THEN '' ELSE wanted.rights END)
            OR wanted.rights LIKE '%(%' AND NOT has_any_column_privilege(wanted.role, here, 'SELECT')
        THEN
            EXECUTE format('REVOKE ALL ON %s %s FROM %I', kind, here, wanted.role);
            IF wanted.rights <> '' THEN
                EXECUTE format('GRANT %s ON %s %s TO %I', CASE c.relkind WHEN 'v' THEN 'SELECT' ELSE wanted.rights END, kind, here, wanted.role);
            END IF;
            changed := TRUE;
        END IF;
        IF wanted.rights LIKE '%INSERT%' THEN
            FOR part IN
                SELECT d.objid::regclass AS sequence
                FROM pg_depend AS d
                JOIN pg_class AS s ON s.oid = d.objid
                WHERE d.classid = 'pg_class'::regclass AND d.refobjid = here AND d.deptype IN ('a', 'i')
                    -- The question is an error for anything else, and the planner may ask it first.
                    AND CASE s.relkind WHEN 'S' THEN NOT has_sequence_privilege(wanted.role, d.objid, 'USAGE') END
            LOOP
                EXECUTE format('GRANT USAGE ON SEQUENCE %s TO %I', part.sequence, wanted.role);
                changed := TRUE;
            END LOOP;
        END IF;
    END LOOP;
    RETURN changed;
END;
$$;
COMMENT ON FUNCTION secure_relation IS
    'Gives a table, view or sequence of docmill to docmill_owner, with policies and rights as relation_rights has them; returns whether anything was to be done. Needs the roles; its lock is waited for 5 s.';

CREATE FUNCTION secure_routines() RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    ours record;
    changed integer := 0;
    owner CONSTANT oid := 'docmill_owner'::regrole;
    former CONSTANT oid := (SELECT p.proowner FROM pg_proc AS p WHERE p.oid = 'acting_user()'::regprocedure);
BEGIN
    -- The owner of docmill's functions owned its tables too: what else of theirs lies in the schema, types and procrastinate's parts, belongs to it.
    FOR ours IN
        SELECT CASE p.prokind WHEN 'p' THEN 'PROCEDURE' ELSE 'FUNCTION' END AS kind, p.oid::regprocedure::text AS name
        FROM pg_proc AS p
        WHERE p.pronamespace = current_schema()::regnamespace AND p.prokind IN ('f', 'p') AND p.proowner = former AND former <> owner
            AND p.prolang IN (SELECT l.oid FROM pg_language AS l WHERE l.lanname IN ('sql', 'plpgsql'))
            AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = p.oid AND d.deptype = 'e')
        UNION ALL
        SELECT 'TYPE', t.oid::regtype::text
        FROM pg_type AS t
        WHERE t.typnamespace = current_schema()::regnamespace AND t.typowner = former AND former <> owner
            AND (t.typtype = 'e' OR t.typtype = 'c' AND EXISTS (SELECT FROM pg_class AS c WHERE c.oid = t.typrelid AND c.relkind = 'c'))
            AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = t.oid AND d.deptype = 'e')
    LOOP
        EXECUTE format('ALTER %s %s OWNER TO docmill_owner', ours.kind, ours.name);
        changed := changed + 1;
    END LOOP;
    RETURN changed;
END;
$$;
COMMENT ON FUNCTION secure_routines IS 'Gives the functions and types in docmill''s schema that belong to its owner to docmill_owner, and returns how many.';

CREATE PROCEDURE secure_database() LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE, CREATE ON SCHEMA %I TO docmill_owner', current_schema());
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO docmill_worker, docmill_operator, docmill_reader, docmill_app', current_schema());
    PERFORM secure_routines();
    PERFORM secure_relation(r.relation) FROM relation_rights AS r WHERE to_regclass(quote_ident(r.relation)) IS NOT NULL ORDER BY r.relation;
END;
$$;
COMMENT ON PROCEDURE secure_database IS
    'Does all that `docmill roles create` does once the roles are there, for administrators who would rather use SQL. In one transaction: best while no worker runs.';

CALL pin_search_path();
