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
DO $$
DECLARE
    wanted record;
BEGIN
    FOR wanted IN
        SELECT r.role, p.privilege
        FROM unnest(ARRAY['docmill_owner', 'docmill_worker', 'docmill_operator', 'docmill_reader', 'docmill_app']) AS r (role)
        CROSS JOIN unnest(ARRAY['USAGE', 'CREATE']) AS p (privilege)
        WHERE (p.privilege = 'USAGE' OR r.role = 'docmill_owner')
            AND NOT has_schema_privilege(r.role, current_schema()::regnamespace, p.privilege)
    LOOP
        EXECUTE format('GRANT %s ON SCHEMA %I TO %I', wanted.privilege, current_schema(), wanted.role);
    END LOOP;
END;
$$;

-- name: secure_routines
SELECT secure_routines();

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
    (SELECT l.user_id FROM user_logins AS l WHERE l.login = r.rolname) AS user_id
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
