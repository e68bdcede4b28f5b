-- Every function of ours finds what it names whatever the caller's search_path is: applications with a schema of their own call them, and
-- triggers run under the path of whoever writes. Functions whose body was parsed when they were created need no path.

DO $$
DECLARE
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
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path FROM CURRENT', ours);
    END LOOP;
END;
$$;
