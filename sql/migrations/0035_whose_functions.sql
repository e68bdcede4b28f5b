-- Whose the functions are. Under row-level security they stayed whoever's had made them, often a superuser's, because secure_routines() looked
-- in pg_catalog, the first schema of its search path, and gave functions of Postgres away instead. docmill's go to docmill_owner now, and those
-- of Postgres back. `docmill migrate` has done both before this, or this file could not replace a function in such a database.
--
-- And what else let people go further than their rights: whoever may make functions in docmill's schema can have one called as the owner, so
-- nobody else may; every table has row-level security, so that a login without a role sees nothing even where it was granted SELECT; and
-- the schema of vector is opened to all roles.

-- As before, and with the type of the weights named: it must not depend on which functions of that name there are.
CREATE OR REPLACE FUNCTION matching_chunks(
    query_text text, user_id text, batch_id text, file_type text, metadata jsonb, limit_to integer, language text
) RETURNS TABLE (chunk_id uuid, score double precision) LANGUAGE plpgsql STABLE SECURITY DEFINER
SET jit = off
AS $$
-- Ranking every passage that holds any of the words would read half the table for a word like "contract". The passages that hold the rarest
-- words are ranked and, if they are too few (because of a filter, say), others that hold any beside them.
DECLARE
    ranked CONSTANT integer := 3000;
    filter text := search_filter(user_id, batch_id, file_type, metadata);
    queries tsquery[];
    weights double precision[];
    rarest text;
    everything text;
    anything text;
    first text;
    source text;
    ids uuid[];
    scores double precision[];
BEGIN
    PERFORM check_search_limit(limit_to);
    SELECT array_agg(w.query), array_agg(w.weight), string_agg(w.query::text, '|') FILTER (WHERE w.upto <= ranked),
        string_agg(format('(%s)', w.query), '&'), string_agg(w.query::text, '|')
    INTO queries, weights, rarest, everything, anything
    FROM (SELECT w.*, sum(w.passages) OVER (ORDER BY w.passages, w.query::text) AS upto FROM weigh_words(query_text, language) AS w) AS w;
    first := coalesce(rarest, everything);
    IF first IS NULL THEN
        RETURN;
    END IF;
    FOR pass IN 1..2 LOOP
        source := format(
            '(SELECT c.id, c.fulltext || '''' AS fulltext FROM document_chunks AS c WHERE c.fulltext @@ %L AND %s LIMIT %s)',
            first, filter, ranked
        );
        IF pass = 2 THEN
            source := source || format(
                ' UNION ALL (SELECT c.id, c.fulltext || '''' FROM document_chunks AS c WHERE c.fulltext @@ %L AND NOT c.fulltext @@ %L AND %s LIMIT %s)',
                anything, first, filter, ranked
            );
        END IF;
        EXECUTE format(
            'SELECT array_agg(f.id ORDER BY f.score DESC, f.id), array_agg(f.score ORDER BY f.score DESC, f.id)
             FROM (
                 SELECT c.id, (
                     SELECT sum(w.weight * ts_rank(''{1, 1, 1, 1}''::float4[], c.fulltext, w.query, 1))
                     FROM unnest($1, $2) AS w (query, weight)
                 ) AS score
                 FROM (%s) AS c
                 ORDER BY score DESC, c.id
                 LIMIT %s
             ) AS f', source, limit_to
        ) INTO ids, scores USING queries, weights;
        EXIT WHEN cardinality(ids) = limit_to OR anything = first;
    END LOOP;
    RETURN QUERY SELECT f.id, f.score FROM unnest(ids, scores) AS f (id, score);
END;
$$;

-- As before, but row-level security is on for all tables, and of a table with columns that a person may not see nobody has rights beside a role.
CREATE OR REPLACE FUNCTION secure_relation(relation name) RETURNS boolean LANGUAGE plpgsql SET lock_timeout = '5s' AS $$
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
    IF c.relkind = 'r' THEN
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
    IF r.reader LIKE '%(%' THEN
        FOR wanted IN
            SELECT DISTINCT CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE g.grantee::regrole::text END AS role
            FROM aclexplode(c.relacl) AS g
            WHERE g.grantee NOT IN (
                c.relowner, 'docmill_owner'::regrole, 'docmill_worker'::regrole, 'docmill_operator'::regrole, 'docmill_reader'::regrole,
                'docmill_app'::regrole
            )
        LOOP
            EXECUTE format('REVOKE ALL ON TABLE %s FROM %s CASCADE', here, wanted.role);
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
            -- Of columns it must have each right itself: what it may read as somebody's member, or as anybody, may be taken away from those.
            OR wanted.rights LIKE '%(%' AND regexp_count(wanted.rights, '\(') <> (
                SELECT count(DISTINCT g.privilege_type)
                FROM pg_attribute AS a
                CROSS JOIN aclexplode(a.attacl) AS g
                WHERE a.attrelid = here AND g.grantee = wanted.role::regrole
            )
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
COMMENT ON COLUMN relation_rights.rows_of_user IS
    'Condition for the rows that docmill_reader and docmill_app see and write. Null: none, whatever they are granted. TRUE: all, because there is nothing of any user''s in them. A view shows what the tables below it do.';

CREATE OR REPLACE FUNCTION secure_routines() RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    ours record;
    changed integer := 0;
    owner CONSTANT oid := 'docmill_owner'::regrole;
    here CONSTANT oid := (SELECT c.relnamespace FROM pg_class AS c WHERE c.oid = 'relation_rights'::regclass);
    -- Whoever made docmill's functions owned its tables too: what else of theirs lies in the schema, types and procrastinate's parts, belongs to
    -- it. Some may be the caller's, who has helped with a migration. Once all is docmill_owner's, what anybody makes there stays theirs.
    maker CONSTANT oid := (SELECT p.proowner FROM pg_proc AS p WHERE p.oid = 'acting_user()'::regprocedure);
    has_all CONSTANT boolean := maker = owner AND (SELECT c.relowner FROM pg_class AS c WHERE c.oid = 'file_extractions'::regclass) = owner;
    former CONSTANT oid[] := (SELECT array_agg(r.oid) FROM pg_roles AS r
        WHERE NOT has_all AND r.oid <> owner AND pg_has_role(r.oid, 'USAGE') AND (r.rolname = current_user OR r.oid = maker));
BEGIN
    FOR ours IN
        SELECT CASE p.prokind WHEN 'p' THEN 'PROCEDURE' ELSE 'FUNCTION' END AS kind, p.oid::regprocedure::text AS name, 'docmill_owner' AS owner
        FROM pg_proc AS p
        WHERE p.pronamespace = here AND p.prokind IN ('f', 'p') AND p.proowner = ANY(former)
            AND p.prolang IN (SELECT l.oid FROM pg_language AS l WHERE l.lanname IN ('sql', 'plpgsql'))
            -- Somebody else's that runs as its owner, such as a pooler's, which looks passwords up, would no longer do so.
            AND (NOT p.prosecdef OR array_to_string(p.proconfig, ',') LIKE '%search_path=pg_catalog, %, pg_temp%')
            AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = p.oid AND d.deptype = 'e')
        UNION ALL
        SELECT 'TYPE', t.oid::regtype::text, 'docmill_owner'
        FROM pg_type AS t
        WHERE t.typnamespace = here AND t.typowner = ANY(former)
            AND (t.typtype = 'e' OR t.typtype = 'c' AND EXISTS (SELECT FROM pg_class AS c WHERE c.oid = t.typrelid AND c.relkind = 'c'))
            AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = t.oid AND d.deptype = 'e')
        UNION ALL
        -- The role that made the cluster has this number, whatever its name.
        SELECT 'FUNCTION', p.oid::regprocedure::text, pg_get_userbyid(10)
        FROM pg_proc AS p
        WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proowner = owner
            AND EXISTS (SELECT FROM pg_roles AS r WHERE r.rolname = current_user AND r.rolsuper)
    LOOP
        EXECUTE format('ALTER %s %s OWNER TO %I', ours.kind, ours.name, ours.owner);
        changed := changed + 1;
    END LOOP;
    RETURN changed;
END;
$$;
COMMENT ON FUNCTION secure_routines IS
    'Gives the functions and types in docmill''s schema that belong to whoever made them to docmill_owner, those of Postgres that it was given back, and returns how many.';

CREATE FUNCTION strangers_in_schema() RETURNS SETOF name LANGUAGE sql STABLE AS $$
    SELECT r.rolname
    FROM pg_roles AS r
    JOIN pg_class AS c ON c.oid = 'relation_rights'::regclass
    WHERE NOT r.rolsuper AND NOT pg_has_role(r.oid, 'docmill_owner', 'MEMBER') AND (
        EXISTS (SELECT FROM pg_proc AS p WHERE p.pronamespace = c.relnamespace AND p.proowner = r.oid)
        OR EXISTS (SELECT FROM pg_operator AS o WHERE o.oprnamespace = c.relnamespace AND o.oprowner = r.oid)
        OR has_schema_privilege(r.oid, c.relnamespace, 'CREATE') AND (
            EXISTS (SELECT FROM user_logins AS l WHERE l.login = r.rolname) OR EXISTS (
                SELECT FROM pg_roles AS g
                WHERE g.rolname IN ('docmill_worker', 'docmill_operator', 'docmill_reader', 'docmill_app') AND pg_has_role(r.oid, g.oid, 'MEMBER')
            )
        )
    )
    ORDER BY r.rolname;
$$;
COMMENT ON FUNCTION strangers_in_schema IS
    'Roles that could have functions of theirs called as docmill_owner: they have put functions or operators into docmill''s schema or, as docmill''s roles and people, may do so. There should be none.';

CREATE OR REPLACE PROCEDURE secure_database() LANGUAGE plpgsql AS $$
DECLARE
    here CONSTANT regnamespace := (SELECT c.relnamespace FROM pg_class AS c WHERE c.oid = 'relation_rights'::regclass);
    of_vector CONSTANT regnamespace := (SELECT e.extnamespace FROM pg_extension AS e WHERE e.extname = 'vector');
    strangers text;
    secured name;
BEGIN
    EXECUTE format('REVOKE CREATE ON SCHEMA %s FROM PUBLIC', here);
    EXECUTE format('GRANT USAGE, CREATE ON SCHEMA %s TO docmill_owner', here);
    EXECUTE format('GRANT USAGE ON SCHEMA %s TO docmill_worker, docmill_operator, docmill_reader, docmill_app', here);
    IF of_vector <> here THEN
        EXECUTE format('GRANT USAGE ON SCHEMA %s TO docmill_owner, docmill_worker, docmill_operator, docmill_reader, docmill_app', of_vector);
    END IF;
    SELECT string_agg(s.name, ', ') INTO strangers FROM strangers_in_schema() AS s (name);
    IF strangers IS NOT NULL THEN
        RAISE EXCEPTION 'strangers in schema %: % may create functions there, or have', here, strangers USING ERRCODE = 'insufficient_privilege';
    END IF;
    PERFORM secure_routines();
    -- Not from a query that is still being read: relation_rights is one of those to be altered.
    FOREACH secured IN ARRAY ARRAY(
        SELECT r.relation FROM relation_rights AS r WHERE to_regclass(quote_ident(r.relation)) IS NOT NULL ORDER BY r.relation
    ) LOOP
        PERFORM secure_relation(secured);
    END LOOP;
END;
$$;

CALL pin_search_path();
