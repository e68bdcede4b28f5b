-- A path that SQL submits says one file in one way. Deleting a document compares paths, and removed the file of another one that had
-- spelled it differently.

CREATE OR REPLACE FUNCTION submit_document(
    file_path text, doc_id text DEFAULT NULL, user_id text DEFAULT 'default', metadata jsonb DEFAULT '{}', priority integer DEFAULT 0,
    correlation_id text DEFAULT NULL, file_name text DEFAULT NULL, content_sha256 text DEFAULT NULL
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    id text := doc_id;
BEGIN
    IF file_path IS NULL OR file_path = '' OR file_path ~ '(^/|(^|/)\.{0,2}(/|$)|[[:cntrl:]]|\\)' THEN
        RAISE EXCEPTION 'file_path "%" must be relative to the storage base path, without empty parts, ".", "..", backslashes or control characters',
            file_path USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF id IS NULL THEN
        -- RFC 9562 version 8: Postgres has no SHA-1, which version 5 would need.
        id := encode(substring(sha256(convert_to(user_id || chr(10) || file_path, 'UTF8')) FOR 16), 'hex');
        id := overlay(overlay(id PLACING '8' FROM 13 FOR 1) PLACING 'a' FROM 17 FOR 1)::uuid::text;
    END IF;
    PERFORM accept_document(id, user_id, coalesce(file_name, regexp_replace(file_path, '^.*/', '')), file_path, file_path, NULL,
        content_sha256, coalesce(metadata, '{}'), coalesce(priority, 0), coalesce(correlation_id, gen_random_uuid()::text), NULL, NULL, 5000);
    RETURN id;
END;
$$;

CREATE OR REPLACE FUNCTION submit_batch(
    zip_path text, batch_id text DEFAULT NULL, user_id text DEFAULT 'default', metadata jsonb DEFAULT '{}', priority integer DEFAULT 0,
    correlation_id text DEFAULT NULL, content_sha256 text DEFAULT NULL
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    id text := batch_id;
    owner text := coalesce(user_id, 'default');
BEGIN
    IF zip_path IS NULL OR zip_path = '' OR zip_path ~ '(^/|(^|/)\.{0,2}(/|$)|[[:cntrl:]]|\\)' THEN
        RAISE EXCEPTION 'zip_path "%" must be relative to the storage base path, without empty parts, ".", "..", backslashes or control characters',
            zip_path USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF id IS NULL THEN
        -- As in submit_document: RFC 9562 version 8.
        id := encode(substring(sha256(convert_to(owner || chr(10) || zip_path, 'UTF8')) FOR 16), 'hex');
        id := overlay(overlay(id PLACING '8' FROM 13 FOR 1) PLACING 'a' FROM 17 FOR 1)::uuid::text;
    END IF;
    PERFORM submit_zip(id, owner, zip_path, zip_path, content_sha256, coalesce(metadata, '{}'),
        coalesce(priority, 0), coalesce(correlation_id, gen_random_uuid()::text), 5000);
    RETURN id;
END;
$$;

CALL pin_search_path();
