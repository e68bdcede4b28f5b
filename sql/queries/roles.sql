-- Roles, whom they are granted to, and the rights that they have here. {login} and {role} are quoted by the caller.

-- name: is_secured
SELECT EXISTS (
    SELECT FROM pg_class AS c JOIN pg_roles AS r ON r.oid = c.relowner
    WHERE c.oid = to_regclass('relation_rights') AND r.rolname = 'docmill_owner'
);

-- name: may_secure
SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_class AS c WHERE c.oid = to_regclass('relation_rights');

-- name: act_as_owner
SELECT set_config('role', r.rolname, FALSE)
FROM pg_class AS c
JOIN pg_roles AS r ON r.oid = c.relowner
WHERE c.oid = to_regclass('file_extractions') AND r.rolname = 'docmill_owner' AND pg_has_role(r.oid, 'SET');

-- name: act_as_oneself
RESET ROLE;

-- name: grant_schema
-- Also the schema of vector, where that is another one and whoever is connected may.
DO $$
DECLARE
    here CONSTANT regnamespace := (SELECT c.relnamespace FROM pg_class AS c WHERE c.oid = 'relation_rights'::regclass);
    of_vector CONSTANT regnamespace := (SELECT e.extnamespace FROM pg_extension AS e WHERE e.extname = 'vector');
    wanted record;
BEGIN
    IF EXISTS (
        SELECT FROM pg_namespace AS n CROSS JOIN aclexplode(n.nspacl) AS g
        WHERE n.oid = here AND g.grantee = 0 AND g.privilege_type = 'CREATE'
    ) THEN
        -- Until then somebody may have put a `format` of their own there.
        EXECUTE pg_catalog.format('REVOKE CREATE ON SCHEMA %s FROM PUBLIC', here);
    END IF;
    FOR wanted IN
        SELECT r.role, p.privilege, p.schema
        FROM unnest(ARRAY['docmill_owner', 'docmill_worker', 'docmill_operator', 'docmill_reader', 'docmill_app']) AS r (role)
        CROSS JOIN (VALUES (here, 'USAGE'), (here, 'CREATE'), (of_vector, 'USAGE')) AS p (schema, privilege)
        WHERE (p.privilege = 'USAGE' OR r.role = 'docmill_owner')
            AND (p.schema = here OR has_schema_privilege(p.schema, 'USAGE WITH GRANT OPTION'))
            AND NOT has_schema_privilege(r.role, p.schema, p.privilege)
    LOOP
        EXECUTE pg_catalog.format('GRANT %s ON SCHEMA %s TO %I', wanted.privilege, wanted.schema, wanted.role);
    END LOOP;
END;
$$;

-- name: routines_to_secure
-- What secure_routines() does, as statements: a database that an older docmill has secured has one that does something else.
WITH former AS (
    SELECT r.oid
    FROM pg_roles AS r
    JOIN pg_proc AS p ON p.oid = 'acting_user()'::regprocedure
    JOIN pg_class AS c ON c.oid = 'file_extractions'::regclass
    -- Once all is docmill_owner's, what anybody makes there stays theirs.
    WHERE NOT (p.proowner = 'docmill_owner'::regrole AND c.relowner = 'docmill_owner'::regrole) AND r.rolname <> 'docmill_owner'
        AND pg_has_role(r.oid, 'USAGE') AND (r.rolname = current_user OR r.oid = p.proowner)
), ours AS (
    SELECT CASE p.prokind WHEN 'p' THEN 'PROCEDURE' ELSE 'FUNCTION' END AS kind, p.oid::regprocedure::text AS name, 'docmill_owner' AS owner
    FROM pg_class AS c
    JOIN pg_proc AS p ON p.pronamespace = c.relnamespace
    WHERE c.oid = 'relation_rights'::regclass AND p.prokind IN ('f', 'p') AND p.proowner IN (SELECT f.oid FROM former AS f)
        AND p.prolang IN (SELECT l.oid FROM pg_language AS l WHERE l.lanname IN ('sql', 'plpgsql'))
        -- Somebody else's that runs as its owner, such as a pooler's, which looks passwords up, would no longer do so.
        AND (NOT p.prosecdef OR array_to_string(p.proconfig, ',') LIKE '%%search_path=pg_catalog, %%, pg_temp%%')
        AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = p.oid AND d.deptype = 'e')
    UNION ALL
    SELECT 'TYPE', t.oid::regtype::text, 'docmill_owner'
    FROM pg_class AS c
    JOIN pg_type AS t ON t.typnamespace = c.relnamespace
    WHERE c.oid = 'relation_rights'::regclass AND t.typowner IN (SELECT f.oid FROM former AS f)
        AND (t.typtype = 'e' OR t.typtype = 'c' AND EXISTS (SELECT FROM pg_class AS k WHERE k.oid = t.typrelid AND k.relkind = 'c'))
        AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = t.oid AND d.deptype = 'e')
    UNION ALL
    SELECT 'FUNCTION', p.oid::regprocedure::text, pg_get_userbyid(10)
    FROM pg_proc AS p
    WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proowner = 'docmill_owner'::regrole
        AND EXISTS (SELECT FROM pg_roles AS r WHERE r.rolname = current_user AND r.rolsuper)
)
SELECT pg_catalog.format('ALTER %%s %%s OWNER TO %%I', o.kind, o.name, o.owner) FROM ours AS o;

-- name: strangers_in_schema
SELECT s.name FROM strangers_in_schema() AS s (name);

-- name: relations_to_secure
SELECT r.relation FROM relation_rights AS r WHERE to_regclass(quote_ident(r.relation)) IS NOT NULL ORDER BY r.relation;

-- name: secure_relation
SELECT secure_relation(%(relation)s);

-- name: missing_roles
SELECT w.name
FROM unnest(%(roles)s::text[]) WITH ORDINALITY AS w (name, place)
WHERE NOT EXISTS (SELECT FROM pg_roles AS r WHERE r.rolname = w.name)
ORDER BY w.place;

-- name: lock_roles
-- Roles are the cluster's, and this lock is the database's: who runs this in two databases at once is told by Postgres.
SELECT pg_advisory_xact_lock(hashtextextended('docmill roles', 0));

-- name: about_oneself
SELECT r.rolname AS name, r.rolsuper AS superuser, r.rolcreaterole OR r.rolsuper AS may_create,
    (SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_class AS c WHERE c.oid = to_regclass('relation_rights')) AS owns_tables,
    (SELECT pg_get_userbyid(c.relowner) FROM pg_class AS c WHERE c.oid = to_regclass('relation_rights')) AS owner,
    (SELECT o.rolsuper FROM pg_class AS c JOIN pg_roles AS o ON o.oid = c.relowner WHERE c.oid = to_regclass('relation_rights')) AS owner_is_superuser
FROM pg_roles AS r
WHERE r.rolname = current_user;

-- name: create_role
CREATE ROLE {role} NOLOGIN;

-- name: comment_role
COMMENT ON ROLE {role} IS {comment};

-- name: take_on_owner
-- Of roles that one has created one is an administrator but not a member; tables can be given to those only that one may take on.
GRANT docmill_owner TO CURRENT_USER WITH INHERIT TRUE, SET TRUE;

-- name: is_member_of_owner
SELECT pg_has_role('docmill_owner', 'USAGE') AND pg_has_role('docmill_owner', 'SET') AS is_member;

-- name: about_login
SELECT r.rolname AS name, r.rolcanlogin AS can_login, r.rolsuper OR r.rolbypassrls AS sees_all,
    ARRAY(
        SELECT g.rolname::text FROM pg_roles AS g
        WHERE g.rolname = ANY(%(roles)s::text[]) AND g.oid <> r.oid AND NOT r.rolsuper AND pg_has_role(r.oid, g.oid, 'MEMBER')
        ORDER BY g.rolname
    ) AS roles,
    (SELECT l.user_id FROM user_logins AS l WHERE l.login = r.rolname) AS user_id,
    has_schema_privilege(r.oid, (SELECT c.relnamespace FROM pg_class AS c WHERE c.oid = 'user_logins'::regclass), 'CREATE') AS may_create
FROM pg_roles AS r
WHERE r.rolname = %(login)s;

-- name: grant_role
GRANT {role} TO {login};

-- name: let_take_on_owner
GRANT docmill_owner TO {login} WITH INHERIT FALSE, SET TRUE;

-- name: revoke_role
REVOKE {role} FROM {login};

-- name: map_login
INSERT INTO user_logins AS l (login, user_id) VALUES (%(login)s, %(user_id)s)
ON CONFLICT (login) DO UPDATE SET user_id = EXCLUDED.user_id, granted_at = now(), granted_by = session_user;

-- name: unmap_login
DELETE FROM user_logins AS l WHERE l.login = %(login)s RETURNING l.login;

-- name: list_logins
-- Those that may take on one of docmill's roles, and those that are mapped to a user.
SELECT coalesce(r.rolname, l.login)::text AS login, array_remove(array_agg(g.rolname::text ORDER BY g.rolname), NULL) AS roles, l.user_id,
    r.oid IS NOT NULL AS exists
FROM user_logins AS l
FULL JOIN pg_roles AS r ON r.rolname = l.login
LEFT JOIN pg_roles AS g ON g.rolname = ANY(%(roles)s::text[]) AND g.oid <> r.oid AND pg_has_role(r.oid, g.oid, 'MEMBER')
WHERE l.login IS NOT NULL OR (g.oid IS NOT NULL AND NOT r.rolsuper AND r.rolname <> ALL(%(roles)s::text[]))
GROUP BY r.oid, r.rolname, l.login, l.user_id
ORDER BY 1;
