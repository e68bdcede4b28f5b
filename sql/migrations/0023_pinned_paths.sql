-- No caller's temporary table stands in for one of ours. A search path that does not name pg_temp is searched there first, for tables and
-- views: whoever may make temporary ones, which by default is everybody who may connect, could have the SECURITY DEFINER functions read a
-- view of his own, and run what it calls with the rights of docmill's owner. So pg_temp is named, last; and the path is a list of schemas
-- instead of "$user", which means another one for each owner.

CREATE OR REPLACE PROCEDURE pin_search_path() LANGUAGE plpgsql AS $$
-- The schemas are those of the migration's own path that exist: docmill's, and wherever pgvector is.
DECLARE
    path CONSTANT text := (
        SELECT string_agg(quote_ident(s.name), ', ' ORDER BY s.place) || ', pg_temp'
        FROM unnest(current_schemas(FALSE)) WITH ORDINALITY AS s (name, place)
        WHERE s.name NOT LIKE 'pg\_temp%'
    );
    ours regprocedure;
BEGIN
    FOR ours IN
        SELECT p.oid
        FROM pg_proc AS p
        WHERE p.pronamespace = current_schema()::regnamespace AND p.prokind = 'f' AND p.prosqlbody IS NULL
            AND p.prolang IN (SELECT l.oid FROM pg_language AS l WHERE l.lanname IN ('sql', 'plpgsql'))
            AND p.proname NOT LIKE 'procrastinate\_%'
            AND pg_has_role(p.proowner, 'USAGE')
            AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = p.oid AND d.deptype = 'e')
            AND NOT coalesce('search_path=' || path = ANY(p.proconfig), FALSE)
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = %s', ours, path);
    END LOOP;
END;
$$;
COMMENT ON PROCEDURE pin_search_path IS
    'Lets every function of docmill find what it names whatever the caller''s search_path and temporary tables are. Each migration that makes functions ends with it.';

CALL pin_search_path();
